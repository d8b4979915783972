"""Operators that go to integers and back."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.convolution import convolve
from polyexport.lowering.tensorflow.linear import multiplied
from polyexport.lowering.tensorflow.target import OPS, dtype_of, told
from polyexport.lowering.value import Tensor, Value


def _spread(scale: Tensor, x: Value, axis: int, block: int) -> Tensor:
    """A scale or zero point, so that it combines with the tensor: one for all, per axis, or per block of an axis."""
    rank = x.rank or 0
    if scale.shape.rank == 0:
        return scale
    axis = axis % rank
    if block:
        return tf.repeat(scale, block, axis)
    if scale.shape.rank == 1 and scale.shape[0] == 1 and rank:
        return tf.reshape(scale, [])
    return tf.reshape(scale, [1] * axis + [-1] + [1] * (rank - axis - 1))


@OPS.op("QuantizeLinear", since=10)
def quantize(
    x: Value, scale: Value, zero: Value | None = None,
    *, axis: int = 1, saturate: int = 1, block_size: int = 0, output_dtype: int = 0, precision: int = 0,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Rounded half to even, and kept within the type."""
    dtype = tf.as_dtype(zero.dtype) if zero is not None else dtype_of(output_dtype or 2)
    point = 0 if zero is None else tf.cast(_spread(zero.tensor, x, axis, block_size), tf.float32)
    data = tf.cast(x.tensor, tf.float32)
    levels = tf.round(data / tf.cast(_spread(scale.tensor, x, axis, block_size), tf.float32)) + point
    return tf.cast(tf.clip_by_value(levels, dtype.min, dtype.max), dtype)


@OPS.op("DequantizeLinear", since=10)
def dequantize(
    x: Value, scale: Value, zero: Value | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """Of the scale's type."""
    data = tf.cast(x.tensor, tf.float32)
    if zero is not None:
        data -= tf.cast(_spread(zero.tensor, x, axis, block_size), tf.float32)
    made = data * tf.cast(_spread(scale.tensor, x, axis, block_size), tf.float32)
    return tf.cast(made, dtype_of(output_dtype) if output_dtype else tf.as_dtype(scale.dtype))


@OPS.op("QLinearMatMul", since=10)
def quantized_matmul(
    a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value, b_zero: Value, y_scale: Value, y_zero: Value
) -> Tensor:
    """Back to floats, multiplied, and to integers again."""

    def columns(value: Value) -> Tensor:
        return value.tensor if value.rank != 1 or value.shape == (1,) else value.tensor[:, None]

    left = tf.cast(a.tensor, tf.int32) - tf.cast(columns(a_zero), tf.int32)
    right = tf.cast(b.tensor, tf.int32) - tf.cast(b_zero.tensor, tf.int32)
    product = tf.cast(multiplied(left, right), tf.float32)
    factor = [tf.cast(each, tf.float32) for each in (columns(a_scale), b_scale.tensor, y_scale.tensor)]
    return _levels(product * (factor[0] * factor[1] / factor[2]), y_zero.tensor)


def _levels(data: Tensor, zero: Tensor) -> Tensor:
    moved = tf.round(data) + tf.cast(zero, tf.float32)
    return tf.cast(tf.clip_by_value(moved, zero.dtype.min, zero.dtype.max), zero.dtype)


@OPS.op("QLinearConv", since=10)
def quantized_convolution(
    x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value, w_zero: Value, y_scale: Value, y_zero: Value,
    bias: Value | None = None, *, node: Node, **attributes: Any,
) -> Tensor:  # fmt: skip  # the inputs on two lines
    """Sums of integers, held exactly by float64."""
    data = tf.cast(x.tensor, tf.float64) - tf.cast(x_zero.tensor, tf.float64)
    kernel = tf.cast(w.tensor, tf.float64) - tf.cast(_spread(w_zero.tensor, w, 0, 0), tf.float64)
    kernel = told(kernel, w.shape)
    made = convolve(node.value(data), node.value(kernel), None, node=node, **attributes).tensor
    if bias is not None:
        made += tf.cast(tf.reshape(bias.tensor, [1, -1] + [1] * ((x.rank or 2) - 2)), tf.float64)
    factor = tf.cast(x_scale.tensor, tf.float64) * tf.cast(_spread(w_scale.tensor, x, 1, 0), tf.float64)
    return _levels(tf.cast(made * factor / tf.cast(y_scale.tensor, tf.float64), tf.float32), y_zero.tensor)


@OPS.op("DynamicQuantizeLinear", since=11)
def dynamic_quantize(x: Value) -> Any:
    """To bytes, by the tensor's own range, zero included."""
    low, high = (tf.minimum(tf.reduce_min(x.tensor), 0), tf.maximum(tf.reduce_max(x.tensor), 0))
    scale = (high - low) / 255
    zero = tf.clip_by_value(tf.round(-low / scale), 0, 255)
    levels = tf.clip_by_value(tf.round(x.tensor / scale) + zero, 0, 255)
    return tf.cast(levels, tf.uint8), scale, tf.cast(zero, tf.uint8)
