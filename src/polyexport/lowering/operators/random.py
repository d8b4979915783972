"""Random operators. ONNX defines only the distribution of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Size, Tensor
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value


def _asked(
    ops: Backend, x: Value | None, shape: Sequence[int] | None, dtype: int | None
) -> tuple[Sequence[Size], np.dtype[Any]]:
    """Sizes and type: as the attributes say, else those of a tensor, else float32."""
    sizes = ops.sizes(x) if x is not None else shape or []
    return sizes, x.dtype if x is not None and dtype is None else ops.type_of(dtype or 1)


@SHARED.op("RandomNormal", "RandomNormalLike")
def random_normal(
    ops: Backend,
    x: Value | None = None,
    *,
    shape: list[int] | None = None,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    """Of a shape, or of a tensor's."""
    sizes, kind = _asked(ops, x, shape, dtype)
    return ops.normal(sizes, mean, scale, seed, kind)


@SHARED.op("RandomUniform", "RandomUniformLike")
def random_uniform(
    ops: Backend,
    x: Value | None = None,
    *,
    shape: list[int] | None = None,
    dtype: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    """Of a shape, or of a tensor's."""
    sizes, kind = _asked(ops, x, shape, dtype)
    return ops.uniform(sizes, low, high, seed, kind)


@SHARED.op("Bernoulli")
def bernoulli(ops: Backend, x: Value, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """One with the probability given, else zero."""
    single = np.dtype(np.float32)
    drawn = ops.uniform(ops.sizes(x), 0.0, 1.0, seed, single)
    return ops.cast(drawn < ops.cast(x.tensor, single), _asked(ops, x, None, dtype)[1])
