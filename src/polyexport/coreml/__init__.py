"""MIL, the language of Core ML's ML Programs: reads a saved package, and evaluates it with PyTorch.

`program.py` reads the package's protobuf and weight file, `evaluate.py` runs it, and the files of `ops/` have one small
function for each MIL op, in PyTorch. coremltools' conversion is not involved, so the result depends on the file only.
An op computes what Apple documents, or what is reported of devices, even if PyTorch's op of the same name differs; its
docstring then names the source.

`patches/` is for the conversion, so that a program means on a device what the module does in PyTorch: translations that
coremltools lacks or gets wrong (`*_ops.py`, registered by `composite_ops.py`), passes over the program, transforms.
"""
