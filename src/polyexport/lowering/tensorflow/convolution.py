"""Convolutions and pools. They run with channels last, as CPUs, TensorFlow.js and TFLite need it.

A 1D convolution runs as a 2D one with a first axis of size 1, which is fastest in TensorFlow and TFLite. Paddle has the
same operators in its own folder: its kernels want channels second and pad by themselves, so that little would be shared
but what is in `polyexport.lowering.windows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.shape import padded_axis
from polyexport.lowering.tensorflow.backend import OPS
from polyexport.lowering.tensorflow.primitives import last, pad, sizes_of, tensor_sizes
from polyexport.lowering.value import Value
from polyexport.lowering.windows import (
    Sides,
    Windows,
    are_known,
    flat_indices,
    kernel_of,
    reduce_windows,
    spans,
    transposed_windows,
    window_entries,
    windows,
)

# --- padding ----------------------------------------------------------------------------------------------------------


def _pad(x: Tensor, sides: Sides, fill: float = 0.0) -> Tensor:
    """Pad the spatial axes of a tensor that has its channels last."""
    amounts = [(0, 0), *sides, (0, 0)]
    if are_known(sides):
        return pad(x, amounts, fill)
    return tf.pad(x, tf.convert_to_tensor(amounts), constant_values=tf.constant(fill, x.dtype))


# --- convolution ------------------------------------------------------------------------------------------------------


@OPS.op("Conv")
def convolve(
    x: Value, weight: Value, bias: Value | None = None, *, group: int = 1, node: Node, **attributes: Any
) -> Value:
    """Kernels are `(out, in / group, *spatial)`."""
    rank = x.rank or 0
    if not 3 <= rank <= 5:
        raise node.unsupported(f"a convolution over {rank - 2} axes")
    where = windows(node.ops, sizes_of(x)[2:], **kernel_of(weight, attributes))
    reach = spans(where.kernel, where.dilations)
    same = all(
        stride == 1 and side == ((span - 1) // 2, span // 2)
        for stride, side, span in zip(where.strides, where.sides, reach, strict=True)
    )
    data = x.in_order(last(rank))
    data = data if same else _pad(data, where.sides)
    kernels = weight.permuted((*range(2, rank), 1, 0))
    made = _grouped(data, kernels, group, where.strides, where.dilations, "SAME" if same else "VALID")
    if bias is not None:
        made = tf.nn.bias_add(made, bias.tensor)
    return node.value(made, last(rank))


def _grouped(
    data: Tensor, kernels: Value, group: int, strides: list[int], dilations: list[int], padding: str
) -> Tensor:
    *spatial, inputs, outputs = (int(each) for each in kernels.shape or ())  # type: ignore[arg-type]  # static
    if group == 1:
        return _convolved(data, kernels.tensor, strides, dilations, padding)
    even = strides[0] == strides[-1] and (strides[0] == 1 or set(dilations) == {1})
    if inputs == 1 and len(spatial) <= 2 and even and data.shape[-1] == group:
        # the kernels' outputs lie group by group, as a depthwise kernel's multiplier does
        kernel = tf.reshape(kernels.tensor, [*spatial, group, outputs // group])
        return _depthwise(data, kernel, strides, dilations, padding)
    parts = zip(tf.split(data, group, -1), tf.split(kernels.tensor, group, -1), strict=True)
    return tf.concat([_convolved(part, kernel, strides, dilations, padding) for part, kernel in parts], -1)


def _depthwise(data: Tensor, kernel: Tensor, strides: list[int], dilations: list[int], padding: str) -> Tensor:
    if len(strides) == 1:
        wide = _depthwise(data[:, None], kernel[None], strides * 2, [1, *dilations], padding)
        return tf.squeeze(wide, 1)
    return tf.nn.depthwise_conv2d(data, kernel, [1, *strides, 1], padding, dilations=dilations)


def _convolved(data: Tensor, kernel: Tensor, strides: list[int], dilations: list[int], padding: str) -> Tensor:
    if len(strides) == 1:
        wide = _convolved(data[:, None], kernel[None], [1, *strides], [1, *dilations], padding)
        return tf.squeeze(wide, 1)
    if len(strides) == 2:
        return tf.nn.conv2d(data, kernel, strides, padding, dilations=dilations)
    return tf.nn.conv3d(data, _dilated(kernel, dilations), [1, *strides, 1], padding)


def _dilated(kernel: Tensor, dilations: list[int]) -> Tensor:
    """A kernel with zeros between its elements, since TensorFlow's CPU kernels have no dilation here."""
    for axis, dilation in enumerate(dilations):
        if dilation > 1:
            sizes = kernel.shape.as_list()
            spread = tf.pad(
                tf.expand_dims(kernel, axis + 1),
                [(0, dilation - 1) if i == axis + 1 else (0, 0) for i in range(len(sizes) + 1)],
            )
            sizes[axis] *= dilation
            cut = [slice(None)] * len(sizes)
            cut[axis] = slice(0, sizes[axis] - dilation + 1)
            kernel = tf.reshape(spread, sizes)[tuple(cut)]
    return kernel


@OPS.op("ConvTranspose")
def convolve_transposed(
    x: Value, weight: Value, bias: Value | None = None, *, group: int = 1, node: Node, **attributes: Any
) -> Value:
    """Kernels are `(in, out / group, *spatial)`; the full result is computed, and cropped by the pads."""
    rank = x.rank or 0
    if not 3 <= rank <= 5:
        raise node.unsupported(f"a transposed convolution over {rank - 2} axes")
    batch, _, *sizes = sizes_of(x)
    where, whole = transposed_windows(sizes, **kernel_of(weight, attributes))
    kernels = weight.permuted((*range(2, rank), 1, 0))
    made = _transposed(x.in_order(last(rank)), kernels.tensor, group, where.strides, where.dilations, [batch, *whole])
    made = _cut(node.ops, made, where.crop)
    if bias is not None:
        made = tf.nn.bias_add(made, bias.tensor)
    return node.value(made, last(rank))


def _cut(ops: Backend, made: Tensor, sides: Sides) -> Tensor:
    """Crop the spatial axes, or pad them where an amount is positive."""
    if are_known(sides):
        return _pad(made, sides)
    for axis, (before, after) in enumerate(sides, 1):
        made = padded_axis(ops, made, axis, before, after, tf.zeros([], made.dtype))
    return made


def _transposed(
    data: Tensor, kernel: Tensor, group: int, strides: list[int], dilations: list[int], sizes: list[Any]
) -> Tensor:
    """The full result; TensorFlow's kernel is `(*spatial, out, in)`."""
    if len(strides) == 1:
        wide = [sizes[0], 1, *sizes[1:]]
        return tf.squeeze(_transposed(data[:, None], kernel[None], group, [1, *strides], [1, *dilations], wide), 1)
    run = tf.nn.conv2d_transpose if len(strides) == 2 else tf.nn.conv3d_transpose
    kernel = _dilated(kernel, dilations)
    parts = zip(tf.split(data, group, -1), tf.split(kernel, group, -1), strict=True) if group > 1 else [(data, kernel)]
    shape = tf.stack([*sizes, kernel.shape[-2]])
    made = [run(part, each, shape, strides, "VALID") for part, each in parts]
    whole = tf.concat(made, -1) if group > 1 else made[0]
    whole.set_shape([None, *(size if isinstance(size, int) else None for size in sizes[1:]), None])
    return whole


# --- pools ------------------------------------------------------------------------------------------------------------


def _pool(
    ops: Backend,
    data: Tensor,
    where: Windows,
    native: Callable[..., Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """By TensorFlow's own pool if possible, else one axis after the other."""
    kernel, strides = where.kernel, where.strides
    if set(where.dilations) != {1} or len(kernel) > 3 or data.dtype not in (tf.float32, tf.float64, tf.float16):
        return reduce_windows(ops, data, where, 1, combine)
    if len(kernel) == 1:
        return tf.squeeze(native(data[:, None], [1, *kernel], [1, *strides], "VALID"), 1)
    return native(data, kernel, strides, "VALID") if len(kernel) == 2 else _in_turn(data, kernel, strides, native)


def _in_turn(data: Tensor, kernel: list[int], strides: list[int], native: Callable[..., Tensor]) -> Tensor:
    """Over the last two of three axes, then over the first: LiteRT has no pool over three."""
    _, depth, height, width, channels = tensor_sizes(data)
    planes = native(tf.reshape(data, [-1, height, width, channels]), kernel[1:], strides[1:], "VALID")
    _, height, width, _ = tensor_sizes(planes)
    rows = tf.reshape(planes, [-1, depth, height * width, channels])
    made = native(rows, [kernel[0], 1], [strides[0], 1], "VALID")
    return tf.reshape(made, [-1, tensor_sizes(made)[1], height, width, channels])


def _average_native(data: Tensor, kernel: list[int], strides: list[int], padding: str) -> Tensor:
    return tf.nn.avg_pool2d(data, kernel, strides, padding) * float(np.prod(kernel))


@OPS.op("MaxPool")
def max_pool(x: Value, *, storage_order: int = 0, node: Node, **attributes: Any) -> Any:
    """And, if asked for, where in the flat tensor each maximum was."""
    rank = x.rank or 0
    where = windows(node.ops, sizes_of(x)[2:], **attributes)
    data = x.in_order(last(rank))
    wide = _pad(data, where.whole, data.dtype.min if data.dtype.is_integer else -np.inf)
    made = node.value(_pool(node.ops, wide, where, tf.nn.max_pool2d, tf.maximum), last(rank))
    if not node.wants(1):
        return made
    indices = _pad(flat_indices(node.ops, x, storage_order).in_order(last(rank)), where.whole, -1)
    best = tf.argmax(tf.stack(window_entries(node.ops, wide, where, 1)), 0)
    found = tf.stack(window_entries(node.ops, indices, where, 1), -1)
    found = tf.broadcast_to(found, tf.concat([tf.shape(best), [found.shape[-1]]], 0))
    return made, node.value(tf.gather(found, best, batch_dims=rank), last(rank))


@OPS.op("AveragePool")
def average_pool(x: Value, *, count_include_pad: int = 0, node: Node, **attributes: Any) -> Value:
    """The sum of each window, by the number of its entries that count."""
    sizes, order = sizes_of(x)[2:], last(x.rank or 0)
    where = windows(node.ops, sizes, **attributes)
    data, beyond = x.in_order(order), [(0, tail) for tail in where.tails]

    def total(tensor: Tensor) -> Tensor:
        return _pool(node.ops, tensor, where, _average_native, tf.add)

    made = total(_pad(_pad(data, where.sides), beyond))
    if _are_zero(beyond) and (count_include_pad or _are_zero(where.sides)):
        return node.value(made / tf.cast(int(np.prod(where.kernel)), made.dtype), order)
    ones = node.ops.full([1, *sizes, 1], 1, x.dtype)
    counted = _pad(_pad(ones, where.sides, float(bool(count_include_pad))), beyond)
    return node.value(made / total(counted), order)


def _are_zero(sides: Sides) -> bool:
    return are_known(sides) and not any(map(any, sides))


@OPS.op("LpPool", since=2)
def norm_pool(x: Value, *, p: int = 2, node: Node, **attributes: Any) -> Value:
    """The p-norm of each window."""
    where, order = windows(node.ops, sizes_of(x)[2:], **attributes), last(x.rank or 0)
    powers = tf.abs(_pad(x.in_order(order), where.whole)) ** p
    return node.value(_pool(node.ops, powers, where, _average_native, tf.add) ** (1 / p), order)
