"""Functions that tracers or converters do not support, decomposed into supported ones while a module is traced.

Requirements:
* The reference is computed without these decompositions, so that parity judges them too.
* A call is decomposed only if the result stays the same; every other call is left unchanged.

Each file has PyTorch's functions of one kind, with PyTorch's own signatures, and a table of them, `functions`.
"""

from polyexport.tracing.decompositions.context import decomposed as decomposed
