"""Operators that draw at random. ONNX does not say which numbers they draw, only how they are spread."""

from __future__ import annotations

from typing import Any

import paddle

from polyexport.lowering.paddle.target import OPS, dtype_of, paddle_dtype
from polyexport.lowering.value import Tensor, Value

_FRESH = 0
"""The seed by which Paddle takes another one at each run."""


def _seed(seed: float | None) -> int:
    return _FRESH if seed is None else int(seed)


def _type(number: int | None, x: Value) -> Any:
    return x.dtype if number is None else dtype_of(number)


def _normal(shape: Any, dtype: Any, mean: float, scale: float, seed: float | None) -> Tensor:
    drawn = paddle.tensor.random.gaussian(shape, mean, scale, _seed(seed), dtype="float32")
    return paddle.cast(drawn, paddle_dtype(dtype))


def _uniform(shape: Any, dtype: Any, low: float, high: float, seed: float | None) -> Tensor:
    drawn = paddle.uniform(shape, "float32", low, high, _seed(seed))
    return paddle.cast(drawn, paddle_dtype(dtype))


@OPS.op("RandomNormal")
def random_normal(
    *, shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a shape."""
    return _normal(shape, dtype_of(dtype), mean, scale, seed)


@OPS.op("RandomNormalLike")
def random_normal_like(
    x: Value, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a tensor's shape."""
    return _normal(paddle.shape(x.tensor), _type(dtype, x), mean, scale, seed)


@OPS.op("RandomUniform")
def random_uniform(
    *, shape: list[int], dtype: int = 1, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a shape."""
    return _uniform(shape, dtype_of(dtype), low, high, seed)


@OPS.op("RandomUniformLike")
def random_uniform_like(
    x: Value, *, dtype: int | None = None, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Of a tensor's shape."""
    return _uniform(paddle.shape(x.tensor), _type(dtype, x), low, high, seed)


@OPS.op("Bernoulli", since=15)
def bernoulli(x: Value, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """One with the probability given, else zero."""
    drawn = _uniform(paddle.shape(x.tensor), "float32", 0.0, 1.0, seed)
    return paddle.cast(drawn < paddle.cast(x.tensor, "float32"), paddle_dtype(_type(dtype, x)))


@OPS.op("Multinomial", since=7)
def multinomial(x: Value, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes by their log probabilities: where, in their sum so far, a number drawn falls."""
    chances = paddle.cumsum(paddle.nn.functional.softmax(paddle.cast(x.tensor, "float32"), -1), -1)
    rows = paddle.shape(x.tensor)[0]
    drawn = _uniform([rows, sample_size, 1], "float32", 0.0, 1.0, seed)
    below = paddle.unsqueeze(chances[:, :-1], 1) <= drawn  # the last class takes what rounding leaves
    return paddle.sum(paddle.cast(below, paddle_dtype(dtype_of(dtype))), -1)
