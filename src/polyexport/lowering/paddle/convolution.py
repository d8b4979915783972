"""Convolutions and pools, with channels second as in ONNX, which Paddle's kernels need too.

A 1D convolution runs as a 2D one with a first axis of size 1: Paddle has no 1D kernel. Its kernels pad by themselves,
so that little is shared with TensorFlow's operators but what is in `polyexport.lowering.windows`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.backend import Backend, Tensor, is_float
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.shape import padded_axis
from polyexport.lowering.paddle.backend import OPS
from polyexport.lowering.paddle.primitives import pad as pad_known, sizes_of, vector
from polyexport.lowering.paddle.weights import set_shape
from polyexport.lowering.value import Value
from polyexport.lowering.windows import (
    Sides,
    Windows,
    are_known,
    flat_indices,
    kernel_of,
    reduce_windows,
    transposed_windows,
    window_entries,
    windows,
)

_CONVOLVE = {2: F.conv2d, 3: F.conv3d}
_TRANSPOSE = {2: F.conv2d_transpose, 3: F.conv3d_transpose}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def pad(ops: Backend, x: Tensor, sides: Sides, fill: float = 0.0) -> Tensor:
    """Pad the spatial axes, or cut them where an amount is negative."""
    if are_known(sides):
        return pad_known(x, [(0, 0), (0, 0), *sides], fill)
    for axis, (before, after) in enumerate(sides, 2):
        x = padded_axis(ops, x, axis, before, after, paddle.full([], fill, x.dtype))
    return x


def _flat(sides: Sides) -> list[int]:
    return [each for side in sides for each in side]


# --- convolution ------------------------------------------------------------------------------------------------------


@OPS.op("Conv")
def convolve(
    x: Value, weight: Value, bias: Value | None = None, *, group: int = 1, node: Node, **attributes: Any
) -> Tensor:
    """Kernels are `(out, in / group, *spatial)`."""
    count = (x.rank or 0) - 2
    if not 1 <= count <= 3:
        raise node.unsupported(f"a convolution over {count} axes")
    where = windows(node.ops, sizes_of(x)[2:], **kernel_of(weight, attributes))
    data, sides = x.tensor, where.sides
    if not are_known(sides) or min(_flat(sides)) < 0:
        data, sides = pad(node.ops, data, sides), [(0, 0)] * count
    given = None if bias is None else bias.tensor
    if count == 1:
        wide = paddle.unsqueeze(data, 2), paddle.unsqueeze(weight.tensor, 2)
        sides, strides, dilations = [(0, 0), *sides], [1, *where.strides], [1, *where.dilations]
        return paddle.squeeze(F.conv2d(*wide, given, strides, _flat(sides), dilations, group), 2)
    return _CONVOLVE[count](data, weight.tensor, given, where.strides, _flat(sides), where.dilations, group)


@OPS.op("ConvTranspose")
def convolve_transposed(
    x: Value, weight: Value, bias: Value | None = None, *, group: int = 1, node: Node, **attributes: Any
) -> Tensor:
    """Kernels are `(in, out / group, *spatial)`; the full result is computed, and cropped by the pads."""
    count = (x.rank or 0) - 2
    if not 1 <= count <= 3:
        raise node.unsupported(f"a transposed convolution over {count} axes")
    where, _ = transposed_windows(sizes_of(x)[2:], **kernel_of(weight, attributes))
    data, sides, extra = x.tensor, where.sides, where.tails
    if (x.shape or ())[1] is None:  # which Paddle needs to know
        data = set_shape(paddle.assign(data), [None, (weight.shape or ())[0], *[None] * count])
    even = are_known(sides) and all(before == after >= 0 for before, after in sides)
    if even and not any(extra):  # as most decoders have it: Paddle's kernel cuts itself
        cut = [before for before, _ in sides]
        return _transposed(data, weight.tensor, None if bias is None else bias.tensor, group, where, cut)
    made = _transposed(data, weight.tensor, None, group, where, [0] * count)
    made = pad(node.ops, made, where.crop)
    return made if bias is None else made + paddle.reshape(bias.tensor, [-1] + [1] * count)


def _transposed(
    data: Tensor, kernel: Tensor, bias: Tensor | None, group: int, where: Windows, cut: list[int]
) -> Tensor:
    strides, dilations = where.strides, where.dilations
    if len(strides) > 1:
        return _TRANSPOSE[len(strides)](data, kernel, bias, strides, cut, 0, dilation=dilations, groups=group)
    wide = paddle.unsqueeze(data, 2), paddle.unsqueeze(kernel, 2)
    made = F.conv2d_transpose(*wide, bias, [1, *strides], [0, *cut], 0, dilation=[1, *dilations], groups=group)
    return paddle.squeeze(made, 2)


# --- pools ------------------------------------------------------------------------------------------------------------


def _summed(data: Tensor, where: Windows) -> Tensor:
    """Each window's sum, as a convolution by ones of every channel by itself."""
    sizes, kernel, count = paddle.shape(data), where.kernel, len(where.kernel)
    alone = paddle.reshape(data, vector([-1, 1, *(sizes[axis + 2] for axis in range(count))]))
    ones, stride, gaps = paddle.ones([1, 1, *kernel], data.dtype), where.strides, where.dilations
    if count == 1:
        wide = paddle.unsqueeze(alone, 2), paddle.unsqueeze(ones, 2)
        made = paddle.squeeze(F.conv2d(*wide, stride=[1, *stride], dilation=[1, *gaps]), 2)
    else:
        made = _CONVOLVE[count](alone, ones, stride=stride, dilation=gaps)
    after = paddle.shape(made)
    return paddle.reshape(made, vector([sizes[0], sizes[1], *(after[axis + 2] for axis in range(count))]))


def _is_native(x: Value, where: Windows) -> bool:
    """Whether Paddle's own pools support it: windows without dilation, known padding."""
    return is_float(x.dtype) and set(where.dilations) == {1} and len(where.kernel) <= 3 and are_known(where.whole)


def _pool(pools: Any, data: Tensor, where: Windows, **options: Any) -> Tensor:
    """By Paddle's own pool, which pads as the windows say."""
    kernel, strides, sides = where.kernel, where.strides, where.whole
    if len(kernel) == 1:
        wide = Windows([1, *kernel], [1, *strides], [1, 1], [(0, 0), *sides], [0, 0])
        return paddle.squeeze(_pool(pools, paddle.unsqueeze(data, 2), wide, **options), 2)
    return pools[len(kernel)](data, kernel, strides, _flat(sides), **options)


@OPS.op("MaxPool")
def max_pool(x: Value, *, storage_order: int = 0, node: Node, **attributes: Any) -> Any:
    """And, if asked for, where in the flat tensor each maximum was."""
    where = windows(node.ops, sizes_of(x)[2:], **attributes)
    if not node.wants(1) and _is_native(x, where):
        return _pool(_MAX_POOL, x.tensor, where)
    data = _lowest_around(x, where.whole, node)
    # with gaps and of integers, which Paddle's pools do not take
    greatest = reduce_windows(node.ops, data, where, 2, paddle.maximum)
    if not node.wants(1):
        return greatest
    flat = pad(node.ops, flat_indices(node.ops, x, storage_order).tensor, where.whole, -1)
    indices = paddle.stack(window_entries(node.ops, flat, where, 2))
    best = paddle.unsqueeze(paddle.argmax(paddle.stack(window_entries(node.ops, data, where, 2)), 0), 0)
    found = paddle.squeeze(paddle.take_along_axis(indices, best, 0, broadcast=False), 0)
    return greatest, found


def _lowest_around(x: Value, sides: Sides, node: Node) -> Tensor:
    """Padded with minus infinity, which an attribute of a saved program cannot hold."""
    if not is_float(x.dtype):
        return pad(node.ops, x.tensor, sides, float(np.iinfo(x.dtype).min))
    inside = pad(node.ops, paddle.ones([1, 1, *sizes_of(x)[2:]]), sides)
    return paddle.where(inside > 0, pad(node.ops, x.tensor, sides), node.value(np.array(-np.inf, x.dtype)).tensor)


@OPS.op("AveragePool")
def average_pool(x: Value, *, count_include_pad: int = 0, node: Node, **attributes: Any) -> Tensor:
    """The sum of each window, by the number of its entries that count: never those that only `ceil_mode` adds."""
    sizes = sizes_of(x)[2:]
    where = windows(node.ops, sizes, **attributes)
    beyond: Sides = [(0, tail) for tail in where.tails]
    if _is_native(x, where) and not (count_include_pad and any(where.tails)):
        return _pool(_AVERAGE_POOL, x.tensor, where, exclusive=not count_include_pad)
    ones = paddle.ones([1, 1, *sizes], x.tensor.dtype)
    counted = pad(node.ops, pad(node.ops, ones, where.sides, float(bool(count_include_pad))), beyond)
    return _summed(pad(node.ops, x.tensor, where.whole), where) / _summed(counted, where)


@OPS.op("LpPool", since=2)
def norm_pool(x: Value, *, p: int = 2, node: Node, **attributes: Any) -> Tensor:
    """The p-norm of each window."""
    where = windows(node.ops, sizes_of(x)[2:], **attributes)
    powers = paddle.abs(x.tensor) ** p
    return _summed(pad(node.ops, powers, where.whole), where) ** (1 / p)
