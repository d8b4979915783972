"""MIL, the language of Core ML's ML Programs: a saved package read back and evaluated with PyTorch.

`program.py` reads the package's own protobuf and weight file, `evaluate.py` walks it, and the files of `ops/` hold one
small function for each MIL op, in PyTorch. Nothing of coremltools' conversion takes part, so what comes out speaks of
the file alone. An op computes what Apple documents, or what is reported of devices, also where PyTorch's namesake does
something else; its docstring then names the source.

`patches/` is for the conversion, so that a program means on a device what the module does in PyTorch: translations that
coremltools lacks or gets wrong (`*_ops.py`, registered by `composite_ops.py`), passes over the program, transforms.
"""
