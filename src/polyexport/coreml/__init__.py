"""MIL, the language of Core ML's ML Programs: a saved package read back and evaluated with PyTorch.

`program.py` reads the package's own protobuf and weight file, `evaluate.py` walks it, and the files of `ops/` hold one
small function for each MIL op, in PyTorch. Nothing of coremltools' conversion takes part, so what comes out speaks of
the file alone.

`composite.py`, `writes.py` and `rank.py` are for the conversion: ops and a pass that coremltools lacks or gets wrong.
"""
