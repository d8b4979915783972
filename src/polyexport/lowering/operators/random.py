"""Random operators. ONNX defines only the distribution of their numbers.

Multinomial is in each framework's folder. Bernoulli is not lowered by its definition in the standard, which compares
the wrong way round: that is one with the probability that it should be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value


@SHARED.op("RandomNormal", "RandomNormalLike")
def random_normal(
    ops: Backend, x: Value | None = None, *, mean: float = 0.0, scale: float = 1.0, **options: Any
) -> Tensor:
    """Of a mean and a standard deviation."""
    return _drawn(ops, ops.normal, x, mean, scale, **options)


@SHARED.op("RandomUniform", "RandomUniformLike")
def random_uniform(
    ops: Backend, x: Value | None = None, *, low: float = 0.0, high: float = 1.0, **options: Any
) -> Tensor:
    """Between two bounds."""
    return _drawn(ops, ops.uniform, x, low, high, **options)


def _drawn(
    ops: Backend,
    draw: Callable[..., Tensor],
    x: Value | None,
    first: float,
    second: float,
    *,
    shape: list[int] | None = None,
    dtype: int | None = None,
    seed: float | None = None,
) -> Tensor:
    """Sizes and type are as the attributes say, else those of a tensor; else the type is float32."""
    sizes = ops.sizes(x) if x is not None else shape or []
    kind = x.dtype if x is not None and dtype is None else ops.type_of(dtype or 1)
    return draw(sizes, first, second, seed, kind)


@SHARED.op("Bernoulli")
def bernoulli(ops: Backend, x: Value, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """One with the probability given, else zero."""
    single = np.dtype(np.float32)
    drawn = ops.uniform(ops.sizes(x), 0.0, 1.0, seed, single)
    return ops.cast(drawn < ops.cast(x.tensor, single), x.dtype if dtype is None else ops.type_of(dtype))
