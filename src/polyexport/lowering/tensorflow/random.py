"""Operators that draw at random. ONNX does not say which numbers they draw, only how they are spread."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from polyexport.lowering.tensorflow.target import OPS, dtype_of
from polyexport.lowering.value import Tensor, Value


def _normal(shape: Any, dtype: Any, mean: float, scale: float, seed: float | None) -> Tensor:
    return tf.random.normal(shape, mean, scale, dtype, None if seed is None else int(seed))


def _uniform(shape: Any, dtype: Any, low: float, high: float, seed: float | None) -> Tensor:
    return tf.random.uniform(shape, low, high, dtype, None if seed is None else int(seed))


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
    return _normal(tf.shape(x.tensor), tf.as_dtype(x.dtype) if dtype is None else dtype_of(dtype), mean, scale, seed)


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
    return _uniform(tf.shape(x.tensor), tf.as_dtype(x.dtype) if dtype is None else dtype_of(dtype), low, high, seed)


@OPS.op("Bernoulli", since=15)
def bernoulli(x: Value, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """One with the probability given, else zero."""
    drawn = tf.random.uniform(tf.shape(x.tensor), seed=None if seed is None else int(seed))
    lit = drawn < tf.cast(x.tensor, tf.float32)
    return tf.cast(lit, tf.as_dtype(x.dtype) if dtype is None else dtype_of(dtype))


@OPS.op("Multinomial", since=7)
def multinomial(x: Value, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes by their log probabilities."""
    drawn = tf.random.categorical(x.tensor, sample_size, seed=None if seed is None else int(seed))
    return tf.cast(drawn, dtype_of(dtype))
