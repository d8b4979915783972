"""Operators that make axes smaller, or run along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.target import OPS, is_float, numpy_dtype, shaped, sizes_of, static
from polyexport.lowering.value import Tensor, Value

Reduction = Callable[[Tensor, list[int], bool, Node], Tensor]


def _plain(reduce: Callable[..., Tensor]) -> Reduction:
    def apply(x: Tensor, axes: list[int], keepdims: bool, node: Node) -> Tensor:
        return paddle.cast(reduce(x, axes, keepdim=keepdims), x.dtype)

    return apply


def _extreme(reduce: Callable[..., Tensor], sign: int) -> Reduction:
    """ONNX's max of bools is an or; of nothing it is the least number, and Paddle has no answer."""

    def apply(x: Tensor, axes: list[int], keepdims: bool, node: Node) -> Tensor:
        if x.dtype == paddle.bool:
            return paddle.cast(apply(paddle.cast(x, "int32"), axes, keepdims, node), "bool")
        for axis in axes:
            if x.shape[axis] <= 0:  # none, or nobody knows
                x = paddle.concat([x, _limits(x, axis, sign, node)], axis)
        return reduce(x, axes, keepdim=keepdims)

    return apply


def _limits(x: Tensor, axis: int, sign: int, node: Node) -> Tensor:
    """One slice more, of what changes no extreme."""
    dtype = numpy_dtype(x.dtype)
    limit = np.inf if dtype.kind == "f" else np.iinfo(dtype).max
    fill = node.value(np.array(sign * limit, dtype)).tensor
    sizes = sizes_of(node.value(x))
    return paddle.expand(fill, [*sizes[:axis], 1, *sizes[axis + 1 :]])


_sum = _plain(paddle.sum)


def _root(x: Tensor) -> Tensor:
    return paddle.sqrt(x) if is_float(x) else paddle.cast(paddle.sqrt(paddle.cast(x, "float64")), x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keepdims: bool, node: Node) -> Tensor:
    """Where the greatest is infinite, that is it; Paddle's own says NaN, and its exponential of -inf is not zero."""
    greatest = _extreme(paddle.max, -1)(x, axes, True, node)
    endless = paddle.isinf(greatest)
    shift = paddle.where(endless, paddle.zeros_like(greatest), greatest)
    whole = paddle.log(_sum(paddle.exp(x - shift), axes, True, node)) + shift
    whole = paddle.where(endless, greatest, whole)
    return whole if keepdims else paddle.squeeze(whole, axes)


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": _sum,
    "ReduceMean": _plain(paddle.mean),
    "ReduceProd": _plain(paddle.prod),
    "ReduceMax": _extreme(paddle.max, -1),
    "ReduceMin": _extreme(paddle.min, 1),
    "ReduceL1": lambda x, *how: _sum(paddle.abs(x), *how),
    "ReduceL2": lambda x, *how: _root(_sum(x * x, *how)),
    "ReduceSumSquare": lambda x, *how: _sum(x * x, *how),
    "ReduceLogSum": lambda x, *how: paddle.log(_sum(x, *how)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _declare(name: str, reduce: Reduction) -> None:
    axes_since = 13 if name == "ReduceSum" else 18

    def by_input(
        x: Value, axes: Value | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0, node: Node
    ) -> Any:
        chosen = [] if axes is None or axes.shape == (0,) else static(axes)
        if chosen is None:
            raise node.unsupported("its axes are not known before the run")
        if not chosen and noop_with_empty_axes:
            return reduce(paddle.unsqueeze(x.tensor, 0), [0], False, node)
        return by_attribute(x, axes=chosen, keepdims=keepdims, node=node)

    def by_attribute(x: Value, *, axes: list[int] | None = None, keepdims: int = 1, node: Node) -> Tensor:
        rank = x.rank or 0
        return reduce(x.tensor, [axis % rank for axis in axes or range(rank)], bool(keepdims), node)

    OPS.op(name, since=axes_since)(by_input)
    OPS.op(name)(by_attribute)


for _name, _reduce in _REDUCTIONS.items():
    _declare(_name, _reduce)


@OPS.op("ArgMax", "ArgMin")
def arg_extreme(x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0, node: Node) -> Tensor:
    """The index of the first, or the last, of the extreme entries."""
    find = paddle.argmax if node.proto.op_type == "ArgMax" else paddle.argmin
    axis = axis % (x.rank or 1)
    if not select_last_index:
        return find(x.tensor, axis, bool(keepdims))
    return sizes_of(x)[axis] - 1 - find(paddle.flip(x.tensor, [axis]), axis, bool(keepdims))


@OPS.op("CumSum", since=11)
def cumulative_sum(x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0, node: Node) -> Tensor:
    """Along one axis, from either end."""
    chosen = static(axis)
    if chosen is None:
        raise node.unsupported("its axis is not known before the run")
    tensor = paddle.flip(x.tensor, chosen) if reverse else x.tensor
    total = paddle.cast(paddle.cumsum(tensor, chosen[0]), tensor.dtype)
    total = total - tensor if exclusive else total
    return paddle.flip(total, chosen) if reverse else total


def _along(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def apply(x: Value, *, axis: int = -1) -> Tensor:
        return function(x.tensor, axis)

    return apply


def _flattened(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """Before opset 13 the axes from `axis` on count as one."""

    def apply(x: Value, *, axis: int = 1) -> Tensor:
        axis = axis % (x.rank or 1)
        if axis == (x.rank or 1) - 1:
            return function(x.tensor, axis)
        return shaped(function(paddle.flatten(x.tensor, axis), axis), sizes_of(x))

    return apply


def _hardmax(x: Tensor, axis: int) -> Tensor:
    axis = axis % len(x.shape)
    first = paddle.argmax(x, axis, True)
    places = paddle.arange(paddle.shape(x)[axis], dtype="int64")
    return paddle.cast(paddle.reshape(places, [-1] + [1] * (len(x.shape) - axis - 1)) == first, x.dtype)


for _name, _function in {"Softmax": F.softmax, "LogSoftmax": F.log_softmax, "Hardmax": _hardmax}.items():
    OPS.op(_name, since=13)(_along(_function))
    OPS.op(_name)(_flattened(_function))


@OPS.op("LpNormalization")
def norm(x: Value, *, axis: int = -1, p: int = 2) -> Tensor:
    """Along one axis, to length 1; what has no length stays zero."""
    entries = x.tensor
    if p == 1:
        length = paddle.sum(paddle.abs(entries), axis, keepdim=True)
    else:
        length = paddle.sqrt(paddle.sum(entries * entries, axis, keepdim=True))
    return entries / paddle.where(length == 0, paddle.ones_like(length), length)


@OPS.op("Det", since=11)
def determinant(x: Value) -> Tensor:
    """Of the last two axes."""
    return paddle.linalg.det(x.tensor)
