"""Convolutions and pools, with the channels where ONNX has them: Paddle's kernels want them there too.

A convolution of one axis runs as one of two, the first of size 1: Paddle has no kernel of its own for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.shape import padded
from polyexport.lowering.paddle.target import OPS, is_float, sizes_of, told, vector
from polyexport.lowering.value import Tensor, Value
from polyexport.lowering.windows import Sides, Windows, are_known, cuts, spans, windows

_CONVOLVE = {2: F.conv2d, 3: F.conv3d}
_TRANSPOSE = {2: F.conv2d_transpose, 3: F.conv3d_transpose}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def not_negative(amount: Tensor) -> Tensor:
    """A scalar's maximum with zero."""
    return paddle.clip(amount, min=0)


def pad(x: Tensor, sides: Sides, fill: float = 0.0) -> Tensor:
    """Pad the spatial axes, or cut them where an amount is negative."""
    if are_known(sides):  # Paddle's own cuts too, but oneDNN's, in the inference runtime, raises an exception
        return padded(x, [(0, 0), (0, 0), *sides], fill)
    flat = [each for side in reversed(sides) for each in side]
    return F.pad(x, paddle.cast(vector(flat), "int32"), value=fill)


def _flat(sides: Sides) -> list[int]:
    return [each for side in sides for each in side]


# --- convolution ------------------------------------------------------------------------------------------------------


@OPS.op("Conv")
def convolve(
    x: Value, weight: Value, bias: Value | None = None,
    *, auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next two
    """Kernels are `(out, in / group, *spatial)`."""
    count = (x.rank or 0) - 2
    if not 1 <= count <= 3:
        raise node.unsupported(f"a convolution over {count} axes")
    kernel = kernel_shape or [int(each) for each in (weight.shape or ())[2:]]  # type: ignore[arg-type]  # static
    where = windows(
        sizes_of(x)[2:], kernel, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        not_negative=not_negative,
    )  # fmt: skip  # the attributes on one line
    data, sides = x.tensor, where.sides
    if not are_known(sides) or min(_flat(sides)) < 0:
        data, sides = pad(data, sides), [(0, 0)] * count
    given = None if bias is None else bias.tensor
    if count == 1:
        return paddle.squeeze(
            F.conv2d(
                paddle.unsqueeze(data, 2), paddle.unsqueeze(weight.tensor, 2), given, [1, *where.strides],
                _flat([(0, 0), *sides]), [1, *where.dilations], group,
            ),
            2,
        )  # fmt: skip  # one call on two lines
    return _CONVOLVE[count](
        data, weight.tensor, given, list(where.strides), _flat(sides), list(where.dilations), group
    )  # fmt: skip  # one call


@OPS.op("ConvTranspose")
def convolve_transposed(
    x: Value, weight: Value, bias: Value | None = None,
    *, auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, output_padding: list[int] | None = None,
    output_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next three
    """Kernels are `(in, out / group, *spatial)`; the whole result is made, and its sides are cut by the pads."""
    count = (x.rank or 0) - 2
    if not 1 <= count <= 3:
        raise node.unsupported(f"a transposed convolution over {count} axes")
    kernel = kernel_shape or [int(each) for each in (weight.shape or ())[2:]]  # type: ignore[arg-type]  # static
    dilations, strides = dilations or [1] * count, strides or [1] * count
    extra = output_padding or [0] * count
    sizes = sizes_of(x)[2:]
    whole = [(n - 1) * stride + span for n, stride, span in zip(sizes, strides, spans(kernel, dilations), strict=True)]
    sides = cuts(sizes, whole, strides, extra, pads, output_shape, auto_pad)
    data, given = x.tensor, None if bias is None else bias.tensor
    if (x.shape or ())[1] is None:  # which Paddle wants to know
        data = told(paddle.assign(data), [None, (weight.shape or ())[0], *[None] * count])
    even = are_known(sides) and all(before == after >= 0 for before, after in sides)
    if even and not any(extra):  # as most decoders have it: Paddle's kernel cuts itself
        return _transposed(data, weight.tensor, given, [side[0] for side in sides], strides, dilations, group)
    made = _transposed(data, weight.tensor, None, [0] * count, strides, dilations, group)
    made = pad(made, [(-before, more - after) for (before, after), more in zip(sides, extra, strict=True)])
    return made if given is None else made + paddle.reshape(given, [-1] + [1] * count)


def _transposed(
    data: Tensor, kernel: Tensor, bias: Tensor | None, sides: list[int], strides: list[int], dilations: list[int],
    group: int,
) -> Tensor:  # fmt: skip  # the data on one line
    if len(strides) == 1:
        wide = paddle.unsqueeze(data, 2), paddle.unsqueeze(kernel, 2)
        return paddle.squeeze(_transposed(*wide, bias, [0, *sides], [1, *strides], [1, *dilations], group), 2)
    return _TRANSPOSE[len(strides)](data, kernel, bias, strides, sides, 0, dilation=dilations, groups=group)


@OPS.op("ConvInteger", since=10)
def convolve_integer(
    x: Value, weight: Value, x_zero: Value | None = None, w_zero: Value | None = None, *, node: Node, **attributes: Any
) -> Tensor:
    """Each side less its zero point; in float64, which holds every sum exactly, since no CPU kernel takes integers."""

    def less(value: Value, zero: Value | None) -> Value:
        tensor = paddle.cast(value.tensor, "float64")
        if zero is None:
            return node.value(tensor)
        point = paddle.cast(zero.tensor, "float64")
        per = [-1] + [1] * ((value.rank or 1) - 1)
        return node.value(tensor - (paddle.reshape(point, per) if zero.rank else point))

    made = convolve(less(x, x_zero), less(weight, w_zero), None, node=node, **attributes)
    return paddle.cast(made, "int32")


# --- pools ------------------------------------------------------------------------------------------------------------


def _along(data: Tensor, axis: int, where: Windows) -> list[Tensor]:
    """For every place of the kernel along one spatial axis what lies there in all windows."""
    (span,) = spans(where.kernel[axis : axis + 1], where.dilations[axis : axis + 1])
    stride, place = where.strides[axis], axis + 2
    size = data.shape[place] if data.shape[place] >= 0 else paddle.cast(paddle.shape(data)[place], "int64")
    end = (size - span) // stride * stride + 1
    starts = [i * where.dilations[axis] for i in range(where.kernel[axis])]
    return [data[(slice(None),) * place + (slice(at, at + end, stride),)] for at in starts]


def _taken(data: Tensor, where: Windows) -> list[Tensor]:
    """For every place of the kernel what lies there in all windows."""
    found = [data]
    for axis in range(len(where.kernel)):
        found = [each for part in found for each in _along(part, axis, where)]
    return found


def _greatest(data: Tensor, where: Windows) -> Tensor:
    """Each window's maximum, one axis after the other, with gaps and of integers, which Paddle's pools do not take."""
    for axis in range(len(where.kernel)):
        data = functools.reduce(paddle.maximum, _along(data, axis, where))
    return data


def _summed(data: Tensor, where: Windows) -> Tensor:
    """Each window's sum, as a convolution by ones of every channel by itself."""
    sizes, kernel, count = paddle.shape(data), list(where.kernel), len(where.kernel)
    alone = paddle.reshape(data, vector([-1, 1, *(sizes[axis + 2] for axis in range(count))]))
    ones, stride, gaps = paddle.ones([1, 1, *kernel], data.dtype), list(where.strides), list(where.dilations)
    if count == 1:
        wide = paddle.unsqueeze(alone, 2), paddle.unsqueeze(ones, 2)
        made = paddle.squeeze(F.conv2d(*wide, stride=[1, *stride], dilation=[1, *gaps]), 2)
    else:
        made = _CONVOLVE[count](alone, ones, stride=stride, dilation=gaps)
    after = paddle.shape(made)
    return paddle.reshape(made, vector([sizes[0], sizes[1], *(after[axis + 2] for axis in range(count))]))


def _is_native(x: Value, where: Windows) -> bool:
    """Whether Paddle's own pools take it: windows without gaps, padding that is known."""
    return is_float(x.tensor) and set(where.dilations) == {1} and len(where.kernel) <= 3 and are_known(where.whole)


def _pool(pools: Any, data: Tensor, where: Windows, **options: Any) -> Tensor:
    """By Paddle's own pool, which pads as the windows say."""
    kernel, strides, sides = list(where.kernel), list(where.strides), where.whole
    if len(kernel) == 1:
        wide = Windows([1, *kernel], [1, *strides], [1, 1], [(0, 0), *sides], [0, 0])
        return paddle.squeeze(_pool(pools, paddle.unsqueeze(data, 2), wide, **options), 2)
    return pools[len(kernel)](data, kernel, strides, _flat(sides), **options)


@OPS.op("MaxPool")
def max_pool(
    x: Value,
    *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    pads: list[int] | None = None, storage_order: int = 0, strides: list[int] | None = None, node: Node,
) -> Any:  # fmt: skip  # the attributes on two lines
    """And, if asked for, where in the flat tensor each maximum was."""
    where = windows(
        sizes_of(x)[2:], kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=ceil_mode, not_negative=not_negative,
    )  # fmt: skip  # the attributes on two lines
    if not node.wants(1) and _is_native(x, where):
        return _pool(_MAX_POOL, x.tensor, where)
    data = _lowest_around(x, where.whole, node)
    greatest = _greatest(data, where)
    if not node.wants(1):
        return greatest
    places = paddle.stack(_taken(pad(_places(x, storage_order), where.whole, -1), where))
    best = paddle.unsqueeze(paddle.argmax(paddle.stack(_taken(data, where)), 0), 0)
    found = paddle.squeeze(paddle.take_along_axis(places, best, 0, broadcast=False), 0)
    return greatest, found


def _lowest_around(x: Value, sides: Sides, node: Node) -> Tensor:
    """Padded by what is less than every entry: minus infinity, which no attribute of a saved program can hold."""
    if not is_float(x.tensor):
        return pad(x.tensor, sides, float(np.iinfo(x.dtype).min))
    inside = pad(paddle.ones([1, 1, *sizes_of(x)[2:]]), sides)
    return paddle.where(inside > 0, pad(x.tensor, sides), node.value(np.array(-np.inf, x.dtype)).tensor)


def _places(x: Value, storage_order: int) -> Tensor:
    """The flat index of every entry; with `storage_order` 1 the last two axes count the other way."""
    sizes = sizes_of(x)
    total = paddle.prod(vector(sizes))
    line = paddle.arange(0, total, 1, dtype="int64")
    if not storage_order:
        return told(paddle.reshape(line, vector(sizes)), x.shape)
    rank = x.rank or 0
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    return told(paddle.transpose(paddle.reshape(line, vector([sizes[i] for i in swapped])), swapped), x.shape)


@OPS.op("AveragePool")
def average_pool(
    x: Value,
    *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip  # the attributes on two lines
    """The sum of each window, by the number of its entries that count: never those that only `ceil_mode` adds."""
    sizes = sizes_of(x)[2:]
    where = windows(
        sizes, kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad, ceil_mode=ceil_mode,
        not_negative=not_negative,
    )  # fmt: skip  # the attributes on two lines
    beyond: Sides = [(0, tail) for tail in where.tails]
    if _is_native(x, where) and not (count_include_pad and any(where.tails)):
        return _pool(_AVERAGE_POOL, x.tensor, where, exclusive=not count_include_pad)
    ones = paddle.ones([1, 1, *sizes], x.tensor.dtype)
    counted = pad(pad(ones, where.sides, float(bool(count_include_pad))), beyond)
    return _summed(pad(x.tensor, where.whole), where) / _summed(counted, where)


@OPS.op("LpPool", since=2)
def norm_pool(
    x: Value,
    *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    p: int = 2, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip  # the attributes on two lines
    """The p-norm of each window."""
    where = windows(
        sizes_of(x)[2:], kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=ceil_mode, not_negative=not_negative,
    )  # fmt: skip  # the attributes on two lines
    powers = paddle.abs(x.tensor) ** p
    return _summed(pad(powers, where.whole), where) ** (1 / p)


def _global(reduce: Callable[[Tensor, Sequence[int]], Tensor]) -> Callable[[Value], Tensor]:
    def apply(x: Value) -> Tensor:
        return reduce(x.tensor, list(range(2, x.rank or 0)))

    return apply


OPS.op("GlobalAveragePool")(_global(lambda x, axes: paddle.mean(x, axes, keepdim=True)))
OPS.op("GlobalMaxPool")(_global(lambda x, axes: paddle.amax(x, axes, keepdim=True)))


@OPS.op("GlobalLpPool", since=2)
def global_norm_pool(x: Value, *, p: int = 2) -> Tensor:
    """The p-norm of each channel."""
    return paddle.sum(paddle.abs(x.tensor) ** p, list(range(2, x.rank or 0)), keepdim=True) ** (1 / p)


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
    shape = vector([batch, channels, *own])
    empty = paddle.zeros([paddle.prod(shape)], x.tensor.dtype)
    flat = paddle.scatter(empty, paddle.reshape(places.tensor, [-1]), paddle.reshape(x.tensor, [-1]))
    made = paddle.reshape(flat, shape)
    if output_shape is None:
        return made
    missing = paddle.cast(output_shape.tensor, "int64")[2:] - shape[2:]
    return pad(made, [(0, missing[i]) for i in range(count)])
