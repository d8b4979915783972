"""Operators that quantize and dequantize."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor, is_known
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value

_INT32, _SINGLE, _DOUBLE = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.float64)


def _spread(ops: Backend, value: Value, x: Value, axis: int, block: int, dtype: np.dtype[Any] = _SINGLE) -> Tensor:
    """A scale or zero point, reshaped to broadcast with the tensor: one for all, per axis, or per block of an axis."""
    rank = x.rank or 0
    scale = ops.cast(value.tensor, dtype)
    if value.rank == 0:
        return scale
    axis = axis % rank
    if block:
        size = ops.sizes(value)[axis] * block
        return ops.gather(scale, (np.arange(size) if is_known(size) else ops.range(0, size)) // block, axis)
    if value.shape == (1,) and rank:
        return ops.reshape(scale, [])
    return ops.column(scale, axis, rank)


def _levels(ops: Backend, data: Tensor, zero: Tensor | float, dtype: np.dtype[Any]) -> Tensor:
    """Round half to even, and clip to the type's range."""
    limits = np.iinfo(dtype)
    return ops.cast(ops.clip(ops.round(data) + zero, float(limits.min), float(limits.max)), dtype)


@SHARED.op("QuantizeLinear", narrow=True)
def quantize(
    ops: Backend,
    x: Value,
    scale: Value,
    zero: Value | None = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
) -> Tensor:
    """To the type of the zero point, or to `output_dtype`."""
    dtype = zero.dtype if zero is not None else ops.type_of(output_dtype or 2)
    point = 0.0 if zero is None else _spread(ops, zero, x, axis, block_size)
    return _levels(ops, ops.cast(x.tensor, _SINGLE) / _spread(ops, scale, x, axis, block_size), point, dtype)


@SHARED.op("DequantizeLinear", narrow=True)
def dequantize(
    ops: Backend,
    x: Value,
    scale: Value,
    zero: Value | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Of the scale's type."""
    data = ops.cast(x.tensor, _SINGLE)
    if zero is not None:
        data = data - _spread(ops, zero, x, axis, block_size)
    made = data * _spread(ops, scale, x, axis, block_size)
    return ops.cast(made, ops.type_of(output_dtype) if output_dtype else scale.dtype)


@SHARED.op("QLinearMatMul", narrow=True)
def quantized_matmul(
    ops: Backend,
    a: Value,
    a_scale: Value,
    a_zero: Value,
    b: Value,
    b_scale: Value,
    b_zero: Value,
    y_scale: Value,
    y_zero: Value,
    *,
    node: Node,
) -> Tensor:
    """Multiply as integers, scale, and quantize again."""
    product = ops.cast(node.lower("MatMulInteger", a, b, a_zero, b_zero), _SINGLE)
    given, weight, made = (ops.cast(each.tensor, _SINGLE) for each in (a_scale, b_scale, y_scale))
    if a_scale.rank == 1 and a_scale.shape != (1,):  # one for each row
        given = ops.unsqueeze(given, [1])
    return _levels(ops, product * (given * weight / made), ops.cast(y_zero.tensor, _SINGLE), y_zero.dtype)


@SHARED.op("QLinearConv", narrow=True)
def quantized_convolution(
    ops: Backend,
    x: Value,
    x_scale: Value,
    x_zero: Value,
    w: Value,
    w_scale: Value,
    w_zero: Value,
    y_scale: Value,
    y_zero: Value,
    bias: Value | None = None,
    *,
    node: Node,
    **attributes: Any,
) -> Tensor:
    """Convolve as integers, scale, and quantize again."""
    made = node.lower("ConvInteger", x, w, x_zero, w_zero, **attributes)
    if bias is not None:
        made = made + ops.column(ops.cast(bias.tensor, _INT32), 1, x.rank or 2)
    factor = ops.cast(x_scale.tensor, _DOUBLE) * _spread(ops, w_scale, x, 1, 0, _DOUBLE)
    data = ops.cast(ops.cast(made, _DOUBLE) * factor / ops.cast(y_scale.tensor, _DOUBLE), _SINGLE)
    return _levels(ops, data, ops.cast(y_zero.tensor, _SINGLE), y_zero.dtype)


@SHARED.op("ConvInteger")
def convolve_integer(
    ops: Backend,
    x: Value,
    weight: Value,
    x_zero: Value | None = None,
    w_zero: Value | None = None,
    *,
    node: Node,
    **attributes: Any,
) -> Tensor:
    """Subtract the zero points, and compute in float64, which is exact, since there are no integer CPU kernels."""

    def less(value: Value, zero: Value | None) -> Value:
        tensor = ops.cast(value.tensor, _DOUBLE)
        tensor = tensor if zero is None else tensor - _spread(ops, zero, value, 0, 0, _DOUBLE)
        return node.value(ops.set_shape(tensor, value.shape or ()))

    made = node.lower("Conv", less(x, x_zero), less(weight, w_zero), **attributes)
    return ops.cast(made.tensor if isinstance(made, Value) else made, _INT32)


@SHARED.op("DynamicQuantizeLinear")
def dynamic_quantize(ops: Backend, x: Value) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to uint8 by the tensor's own range, zero included."""
    every = list(range(x.rank or 0))
    low = -ops.maximum(ops.peak(-x.tensor, every, False), 0.0)
    high = ops.maximum(ops.peak(x.tensor, every, False), 0.0)
    scale = (high - low) / 255
    zero = ops.clip(ops.round(-low / scale), 0.0, 255.0)
    byte = np.dtype(np.uint8)
    return _levels(ops, x.tensor / scale, zero, byte), scale, ops.cast(zero, byte)
