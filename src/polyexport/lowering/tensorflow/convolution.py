"""Convolutions and pools. They run with the channels last, where CPUs, TensorFlow.js and TFLite want them.

A convolution of one axis runs as one of two, the first of size 1: TensorFlow and its relatives are quickest there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.shape import padded
from polyexport.lowering.tensorflow.target import OPS, sizes_of
from polyexport.lowering.value import Tensor, Value
from polyexport.lowering.windows import Sides, are_known, cuts, spans, windows


def last(rank: int) -> tuple[int, ...]:
    """The order that has the channels last: `(0, 2, 3, 1)`."""
    return (0, *range(2, rank), 1)


# --- padding ----------------------------------------------------------------------------------------------------------


def not_negative(amount: Tensor) -> Tensor:
    """A scalar's maximum with zero."""
    return tf.maximum(amount, 0)


def _pad(x: Tensor, sides: Sides, fill: float = 0.0) -> Tensor:
    """Pad the spatial axes of a tensor that has its channels last."""
    amounts = [(0, 0), *sides, (0, 0)]
    if are_known(sides):
        return padded(x, amounts, tf.constant(fill, x.dtype))
    return tf.pad(x, tf.convert_to_tensor(amounts), constant_values=tf.constant(fill, x.dtype))


# --- convolution ------------------------------------------------------------------------------------------------------


@OPS.op("Conv")
def convolve(
    x: Value, weight: Value, bias: Value | None = None,
    *, auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Value:  # fmt: skip  # the inputs on one line, the attributes on the next two
    """Kernels are `(out, in / group, *spatial)`."""
    rank = x.rank or 0
    kernel = kernel_shape or [int(each) for each in (weight.shape or ())[2:]]  # type: ignore[arg-type]  # static
    if not 3 <= rank <= 5:
        raise node.unsupported(f"a convolution over {rank - 2} axes")
    where = windows(
        sizes_of(x)[2:], kernel, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        not_negative=not_negative,
    )  # fmt: skip  # the attributes on one line
    data, strides, dilations = x.in_order(last(rank)), list(where.strides), list(where.dilations)
    reach = spans(kernel, dilations)
    same = all(
        s == 1 and side == ((n - 1) // 2, n // 2) for s, side, n in zip(strides, where.sides, reach, strict=True)
    )
    data = data if same else _pad(data, where.sides)
    kernels = weight.permuted((*range(2, rank), 1, 0))
    made = _grouped(data, kernels, group, strides, dilations, "SAME" if same else "VALID")
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
    """With zeros between its entries, for kernels of TensorFlow that know no dilation on a CPU."""
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
    x: Value, weight: Value, bias: Value | None = None,
    *, auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, output_padding: list[int] | None = None,
    output_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Value:  # fmt: skip  # the inputs on one line, the attributes on the next three
    """Kernels are `(in, out / group, *spatial)`; the whole result is made, and its sides are cut by the pads."""
    rank = x.rank or 0
    count = rank - 2
    if not 1 <= count <= 3:
        raise node.unsupported(f"a transposed convolution over {count} axes")
    kernel = kernel_shape or [int(each) for each in (weight.shape or ())[2:]]  # type: ignore[arg-type]  # static
    dilations, strides = dilations or [1] * count, strides or [1] * count
    extra = output_padding or [0] * count
    sizes = sizes_of(x)[2:]
    whole = [(n - 1) * stride + span for n, stride, span in zip(sizes, strides, spans(kernel, dilations), strict=True)]
    sides = cuts(sizes, whole, strides, extra, pads, output_shape, auto_pad)
    kernels = weight.permuted((*range(2, rank), 1, 0))
    data = x.in_order(last(rank))
    made = _transposed(data, kernels.tensor, group, strides, dilations, [sizes_of(x)[0], *whole])
    made = (
        _pad(made, [(-before, more - after) for (before, after), more in zip(sides, extra, strict=True)])
        if are_known(sides)
        else _cut(made, sides, extra)
    )
    if bias is not None:
        made = tf.nn.bias_add(made, bias.tensor)
    return node.value(made, last(rank))


def _cut(made: Tensor, sides: Sides, extra: list[int]) -> Tensor:
    """By amounts that only the run knows."""
    made = _pad(made, [(0, more) for more in extra])
    for axis, (before, after) in enumerate(sides, 1):
        size = tf.shape(made)[axis]
        place = tf.range(before, size - after)
        inside = tf.reshape(tf.logical_and(place >= 0, place < size), [-1] + [1] * (made.shape.rank - axis - 1))
        kept = tf.gather(made, tf.clip_by_value(place, 0, size - 1), axis=axis)
        made = tf.where(inside, kept, tf.zeros([], made.dtype))
    return made


def _transposed(
    data: Tensor, kernel: Tensor, group: int, strides: list[int], dilations: list[int], sizes: list[Any]
) -> Tensor:
    """The whole result; TensorFlow's kernel is `(*spatial, out, in)`."""
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


@OPS.op("ConvInteger", since=10)
def convolve_integer(
    x: Value, weight: Value, x_zero: Value | None = None, w_zero: Value | None = None, *, node: Node, **attributes: Any
) -> Any:
    """Each side less its zero point; in float64, which holds every sum exactly, since no CPU kernel takes integers."""

    def less(value: Value, zero: Value | None) -> Tensor:
        tensor = tf.cast(value.tensor, tf.float64)
        if zero is None:
            return tensor
        point = tf.cast(zero.tensor, tf.float64)
        return tensor - (tf.reshape(point, [-1] + [1] * ((value.rank or 1) - 1)) if zero.rank else point)

    made = convolve(node.value(less(x, x_zero)), node.value(less(weight, w_zero)), None, node=node, **attributes)
    return tf.cast(made.tensor, tf.int32)


# --- pools ------------------------------------------------------------------------------------------------------------


def _taken(data: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    """For every place of the kernel what lies there in all windows; for what TensorFlow's own pools do not take."""
    reach = spans(kernel, dilations)
    counts = [(size - n) // stride for size, n, stride in zip(_sizes(data)[1:-1], reach, strides, strict=True)]
    found = []
    for place in itertools.product(*map(range, kernel)):
        starts = [i * d for i, d in zip(place, dilations, strict=True)]
        cuts = [slice(at, at + n * s + 1, s) for at, n, s in zip(starts, counts, strides, strict=True)]
        found.append(data[(slice(None), *cuts, slice(None))])
    return found


def _pool(
    data: Tensor, kernel: list[int], strides: list[int], dilations: list[int], native: Callable[..., Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip  # the window on one line, the functions on the next
    """By TensorFlow's own pool, else window place by window place."""
    if set(dilations) == {1} and len(kernel) <= 3 and data.dtype in (tf.float32, tf.float64, tf.float16):
        if len(kernel) == 1:
            return tf.squeeze(native(data[:, None], [1, *kernel], [1, *strides], "VALID"), 1)
        return native(data, kernel, strides, "VALID") if len(kernel) == 2 else _in_turn(data, kernel, strides, native)
    return functools.reduce(combine, _taken(data, kernel, strides, dilations))


def _in_turn(data: Tensor, kernel: list[int], strides: list[int], native: Callable[..., Tensor]) -> Tensor:
    """Over the last two of three axes, then over the first: LiteRT has no pool over three."""
    _, depth, height, width, channels = _sizes(data)
    planes = native(tf.reshape(data, [-1, height, width, channels]), kernel[1:], strides[1:], "VALID")
    _, height, width, _ = _sizes(planes)
    rows = tf.reshape(planes, [-1, depth, height * width, channels])
    made = native(rows, [kernel[0], 1], [strides[0], 1], "VALID")
    return tf.reshape(made, [-1, _sizes(made)[1], height, width, channels])


def _sizes(data: Tensor) -> list[Any]:
    """Of each axis: static where that is known."""
    dynamic = tf.unstack(tf.shape(data))
    return [known if known is not None else size for known, size in zip(data.shape, dynamic, strict=True)]


def _max_native(data: Tensor, kernel: list[int], strides: list[int], padding: str) -> Tensor:
    return tf.nn.max_pool2d(data, kernel, strides, padding)


def _average_native(data: Tensor, kernel: list[int], strides: list[int], padding: str) -> Tensor:
    return tf.nn.avg_pool2d(data, kernel, strides, padding) * float(np.prod(kernel))


@OPS.op("MaxPool")
def max_pool(
    x: Value,
    *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    pads: list[int] | None = None, storage_order: int = 0, strides: list[int] | None = None, node: Node,
) -> Any:  # fmt: skip  # the attributes on two lines
    """And, if asked for, where in the flat tensor each maximum was."""
    rank = x.rank or 0
    where = windows(
        sizes_of(x)[2:], kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=ceil_mode, not_negative=not_negative,
    )  # fmt: skip  # the attributes on two lines
    strides, dilations = list(where.strides), list(where.dilations)
    data = x.in_order(last(rank))
    lowest = data.dtype.min if data.dtype.is_integer else -np.inf
    wide = _pad(data, where.whole, lowest)
    made = node.value(_pool(wide, kernel_shape, strides, dilations, _max_native, tf.maximum), last(rank))
    if not node.wants(1):
        return made
    places = _pad(_places(x, storage_order), where.whole, -1)
    best = tf.argmax(tf.stack(_taken(wide, kernel_shape, strides, dilations)), 0)
    found = tf.stack(_taken(places, kernel_shape, strides, dilations), -1)
    found = tf.broadcast_to(found, tf.concat([tf.shape(best), [found.shape[-1]]], 0))
    return made, node.value(tf.gather(found, best, batch_dims=rank), last(rank))


def _places(x: Value, storage_order: int) -> Tensor:
    """The flat index of every entry, channels last; with `storage_order` 1 the last two axes count the other way."""
    sizes = tf.shape(x.tensor, out_type=tf.int64)
    total = tf.reduce_prod(sizes)
    if not storage_order:
        return tf.transpose(tf.reshape(tf.range(total), sizes), last(x.rank or 0))
    rank = x.rank or 0
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    flat = tf.transpose(tf.reshape(tf.range(total), tf.gather(sizes, swapped)), swapped)
    return tf.transpose(flat, last(rank))


@OPS.op("AveragePool")
def average_pool(
    x: Value,
    *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Value:  # fmt: skip  # the attributes on two lines
    """The sum of each window, by the number of its entries that count."""
    rank = x.rank or 0
    where = windows(
        sizes_of(x)[2:], kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=ceil_mode, not_negative=not_negative,
    )  # fmt: skip  # the attributes on two lines
    strides, dilations = list(where.strides), list(where.dilations)
    data = x.in_order(last(rank))
    sides, sizes = where.sides, sizes_of(x)[2:]
    beyond: Sides = [(0, tail) for tail in where.tails]

    def total(tensor: Tensor) -> Tensor:
        return _pool(tensor, kernel_shape, strides, dilations, _average_native, tf.add)

    made = total(_pad(_pad(data, sides), beyond))
    plain = all(isinstance(each, int) and each == 0 for side in (*sides, *beyond) for each in side)
    if plain or (count_include_pad and all(isinstance(tail, int) and tail == 0 for tail in where.tails)):
        return node.value(made / tf.cast(int(np.prod(kernel_shape)), made.dtype), last(rank))
    ones = tf.ones(tf.stack([1, *sizes, 1]), data.dtype)
    ones.set_shape([1, *(size if isinstance(size, int) else None for size in sizes), 1])
    counted = _pad(_pad(ones, sides, float(bool(count_include_pad))), beyond)
    return node.value(made / total(counted), last(rank))


@OPS.op("LpPool", since=2)
def norm_pool(
    x: Value,
    *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    p: int = 2, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Value:  # fmt: skip  # the attributes on two lines
    """The p-norm of each window."""
    rank = x.rank or 0
    where = windows(
        sizes_of(x)[2:], kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=ceil_mode, not_negative=not_negative,
    )  # fmt: skip  # the attributes on two lines
    strides, dilations = list(where.strides), list(where.dilations)
    powers = tf.abs(_pad(x.in_order(last(rank)), where.whole)) ** p
    total = _pool(powers, kernel_shape, strides, dilations, _average_native, tf.add)
    return node.value(total ** (1 / p), last(rank))


def _global(reduce: Callable[[Tensor, list[int]], Tensor]) -> Callable[..., Value]:
    def apply(x: Value, *, node: Node) -> Value:
        axes = [x.placed(axis) for axis in range(2, x.rank or 0)]
        return node.value(reduce(x.stored, axes), x.order)

    return apply


OPS.op("GlobalAveragePool")(_global(lambda x, axes: tf.reduce_mean(x, axes, keepdims=True)))
OPS.op("GlobalMaxPool")(_global(lambda x, axes: tf.reduce_max(x, axes, keepdims=True)))


@OPS.op("GlobalLpPool", since=2)
def global_norm_pool(x: Value, *, p: int = 2) -> Tensor:
    """The p-norm of each channel."""
    axes = list(range(2, x.rank or 0))
    return tf.reduce_sum(tf.abs(x.tensor) ** p, axes, keepdims=True) ** (1 / p)


@OPS.op("MaxUnpool", since=9)
def max_unpool(
    x: Value, places: Value, output_shape: Value | None = None,
    *, kernel_shape: list[int], pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Each entry back to the flat place that MaxPool gave; the places are those of the unpadded result."""
    count = len(kernel_shape)
    strides, pads = strides or [1] * count, pads or [0] * (2 * count)
    batch, channels, *sizes = sizes_of(x)
    own = [
        (size - 1) * stride + k - pads[i] - pads[i + count]
        for i, (size, stride, k) in enumerate(zip(sizes, strides, kernel_shape, strict=True))
    ]
    shape = tf.stack([batch, channels, *own])
    total = tf.reduce_prod(tf.cast(shape, tf.int64))
    flat = tf.scatter_nd(tf.reshape(places.tensor, [-1, 1]), tf.reshape(x.tensor, [-1]), total[None])
    made = tf.reshape(flat, shape)
    if output_shape is None:
        return made
    wanted = tf.cast(output_shape.tensor, tf.int32)
    return tf.pad(made, tf.stack([tf.zeros_like(wanted), wanted - shape], 1))
