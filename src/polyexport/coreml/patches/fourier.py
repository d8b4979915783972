"""Fourier transforms by the matrix of each, for any batch; coremltools' own needs static sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def register() -> None:
    """Replace coremltools' own, in this process."""
    from coremltools.converters.mil.mil.passes.defs import lower_complex_dialect_ops

    lower_complex_dialect_ops._fft_1d = transformed


def transformed(real: Any, imag: Any, n: Any, dim: Any, norm: Any, inverse: bool = False) -> tuple[Any, Any]:
    """The real and the imaginary part of a transform along `dim`, of its first `n` entries or with zeros behind them.

    Raises:
        NotImplementedError: the axis is dynamic.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil.ops.defs.complex_dialect_ops import fft_canonicalize_length_dim
    from coremltools.converters.mil.mil.types.symbolic import any_symbolic

    count, axis = fft_canonicalize_length_dim(real, n, dim)
    if any_symbolic([count, real.shape[axis]]):
        raise NotImplementedError("a Fourier transform along a dynamic axis")
    cosines, sines = _matrices(int(count), int(real.shape[axis]), norm.val or "backward", inverse)
    order = list(range(real.rank))
    order[axis], order[-1] = order[-1], order[axis]

    def times(x: Any, matrix: np.ndarray) -> Any:
        rows = mb.expand_dims(x=x, axes=[0]) if x.rank == 1 else mb.transpose(x=x, perm=order)
        product = mb.matmul(x=rows, y=matrix)
        return mb.squeeze(x=product, axes=[0]) if x.rank == 1 else mb.transpose(x=product, perm=order)

    return (
        mb.sub(x=times(real, cosines), y=times(imag, sines)),
        mb.add(x=times(real, sines), y=times(imag, cosines)),
    )


def _matrices(count: int, size: int, norm: str, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `(size, count)` of a transform, scaled; the integer products are reduced modulo one turn."""
    turns = np.outer(np.arange(size), np.arange(count)) % count / count
    angle = 2 * math.pi * turns * (1 if inverse else -1)
    scaled = {"backward": count if inverse else 1, "forward": 1 if inverse else count, "ortho": math.sqrt(count)}
    kept = (np.arange(size) < count)[:, None] / scaled[norm]
    return (np.cos(angle) * kept).astype(np.float32), (np.sin(angle) * kept).astype(np.float32)
