"""Random operators. ONNX defines only the distribution of their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value


def _type(ops: Backend, number: int | None, x: Value) -> np.dtype[Any]:
    return x.dtype if number is None else ops.type_of(number)


@SHARED.op("RandomNormal")
def random_normal(
    ops: Backend, *, shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a shape."""
    return ops.normal(shape, mean, scale, seed, ops.type_of(dtype))


@SHARED.op("RandomNormalLike")
def random_normal_like(
    ops: Backend,
    x: Value,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    """Of a tensor's shape."""
    return ops.normal(ops.sizes(x), mean, scale, seed, _type(ops, dtype, x))


@SHARED.op("RandomUniform")
def random_uniform(
    ops: Backend, *, shape: list[int], dtype: int = 1, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a shape."""
    return ops.uniform(shape, low, high, seed, ops.type_of(dtype))


@SHARED.op("RandomUniformLike")
def random_uniform_like(
    ops: Backend, x: Value, *, dtype: int | None = None, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a tensor's shape."""
    return ops.uniform(ops.sizes(x), low, high, seed, _type(ops, dtype, x))


@SHARED.op("Bernoulli")
def bernoulli(ops: Backend, x: Value, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """One with the probability given, else zero."""
    single = np.dtype(np.float32)
    drawn = ops.uniform(ops.sizes(x), 0.0, 1.0, seed, single)
    return ops.cast(drawn < ops.cast(x.tensor, single), _type(ops, dtype, x))
