"""Operators that go to integers and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.convolution import convolve
from polyexport.lowering.paddle.linear import multiplied
from polyexport.lowering.paddle.math import round_
from polyexport.lowering.paddle.target import OPS, dtype_of, paddle_dtype
from polyexport.lowering.value import Tensor, Value


def _spread(value: Value, x: Value, axis: int, block: int, dtype: str = "float32") -> Tensor:
    """A scale or zero point, so that it combines with the tensor: one for all, per axis, or per block of an axis."""
    rank = x.rank or 0
    scale = paddle.cast(value.tensor, dtype)
    if value.rank == 0:
        return scale
    axis = axis % rank
    if block:
        return paddle.repeat_interleave(scale, block, axis)
    if value.shape == (1,) and rank:
        return paddle.reshape(scale, [])
    return paddle.reshape(scale, [1] * axis + [-1] + [1] * (rank - axis - 1))


def _levels(data: Tensor, zero: Tensor | float, dtype: np.dtype[Any]) -> Tensor:
    """Rounded half to even, and kept within the type."""
    limits = np.iinfo(dtype)
    return paddle.cast(paddle.clip(round_(data) + zero, float(limits.min), float(limits.max)), paddle_dtype(dtype))


@OPS.op("QuantizeLinear", since=10, narrow=True)
def quantize(
    x: Value, scale: Value, zero: Value | None = None,
    *, axis: int = 1, saturate: int = 1, block_size: int = 0, output_dtype: int = 0, precision: int = 0,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """To the type of the zero point, or the one that is named."""
    dtype = zero.dtype if zero is not None else dtype_of(output_dtype or 2)
    point = 0.0 if zero is None else _spread(zero, x, axis, block_size)
    return _levels(paddle.cast(x.tensor, "float32") / _spread(scale, x, axis, block_size), point, dtype)


@OPS.op("DequantizeLinear", since=10, narrow=True)
def dequantize(
    x: Value, scale: Value, zero: Value | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """Of the scale's type."""
    data = paddle.cast(x.tensor, "float32")
    if zero is not None:
        data = data - _spread(zero, x, axis, block_size)
    made = data * _spread(scale, x, axis, block_size)
    return paddle.cast(made, paddle_dtype(dtype_of(output_dtype) if output_dtype else scale.dtype))


@OPS.op("QLinearMatMul", since=10, narrow=True)
def quantized_matmul(
    a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value, b_zero: Value, y_scale: Value, y_zero: Value
) -> Tensor:
    """Back to floats, multiplied, and to integers again."""

    def columns(value: Value, dtype: str) -> Tensor:
        tensor = paddle.cast(value.tensor, dtype)
        return tensor if value.rank != 1 or value.shape == (1,) else paddle.unsqueeze(tensor, 1)

    left = paddle.cast(a.tensor, "int32") - columns(a_zero, "int32")
    right = paddle.cast(b.tensor, "int32") - paddle.cast(b_zero.tensor, "int32")
    product = paddle.cast(multiplied(left, right), "float32")
    given, weight, made = (
        columns(a_scale, "float32"), paddle.cast(b_scale.tensor, "float32"), paddle.cast(y_scale.tensor, "float32")
    )  # fmt: skip  # three scales
    return _levels(product * (given * weight / made), paddle.cast(y_zero.tensor, "float32"), y_zero.dtype)


@OPS.op("QLinearConv", since=10, narrow=True)
def quantized_convolution(
    x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value, w_zero: Value, y_scale: Value, y_zero: Value,
    bias: Value | None = None, *, node: Node, **attributes: Any,
) -> Tensor:  # fmt: skip  # the inputs on two lines
    """Sums of integers, held exactly by float64."""
    data = paddle.cast(x.tensor, "float64") - paddle.cast(x_zero.tensor, "float64")
    kernel = paddle.cast(w.tensor, "float64") - _spread(w_zero, w, 0, 0, "float64")
    made = convolve(node.value(data), node.value(kernel), None, node=node, **attributes)
    if bias is not None:
        made = made + paddle.reshape(paddle.cast(bias.tensor, "float64"), [1, -1] + [1] * ((x.rank or 2) - 2))
    factor = paddle.cast(x_scale.tensor, "float64") * _spread(w_scale, x, 1, 0, "float64")
    data = paddle.cast(made * factor / paddle.cast(y_scale.tensor, "float64"), "float32")
    return _levels(data, paddle.cast(y_zero.tensor, "float32"), y_zero.dtype)


@OPS.op("DynamicQuantizeLinear", since=11)
def dynamic_quantize(x: Value) -> Any:
    """To bytes, by the tensor's own range, zero included."""
    nothing = paddle.zeros([], x.tensor.dtype)
    low, high = paddle.minimum(paddle.amin(x.tensor), nothing), paddle.maximum(paddle.amax(x.tensor), nothing)
    scale = (high - low) / 255
    zero = paddle.clip(round_(-low / scale), 0.0, 255.0)
    return _levels(x.tensor / scale, zero, np.dtype(np.uint8)), scale, paddle.cast(zero, "uint8")
