"""What each MIL op computes: one function per op, its arguments named as in MIL, found by name in `OPS`.

https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html

Arguments are tensors (half precision already widened to float32), strings, or lists of tensors. The caller rounds and
checks the result, so an index may be int64 here. What samples at random has no place: it cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polyexport.coreml.ops import (
    activation,
    compression,
    convolution,
    elementwise,
    image,
    indexing,
    linear,
    normalization,
    recurrent,
    reduction,
    shape,
    sorting,
)

_FILES = (
    activation,
    compression,
    convolution,
    elementwise,
    image,
    indexing,
    linear,
    normalization,
    recurrent,
    reduction,
    shape,
    sorting,
)

OPS: Mapping[str, Callable[..., Any]] = {name: function for file in _FILES for name, function in file.OPS.items()}
"""By MIL's name."""
