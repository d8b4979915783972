"""Operators that make axes smaller, or run along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.shape import remaining
from polyexport.lowering.tensorflow.target import OPS, static, told
from polyexport.lowering.value import Tensor, Value

Reduction = Callable[..., Tensor]


def _wide(reduce: Reduction) -> Reduction:
    """In at least 32 bits: TensorFlow has no kernel for shorter integers, and ONNX's max of bools is an or."""

    def apply(x: Tensor, axes: Any, keepdims: bool) -> Tensor:
        if x.dtype in (tf.bool, tf.int8, tf.uint8, tf.int16, tf.uint16):
            return tf.cast(reduce(tf.cast(x, tf.int32), axes, keepdims), x.dtype)
        return reduce(x, axes, keepdims)

    return apply


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": tf.reduce_sum,
    "ReduceMean": tf.reduce_mean,
    "ReduceProd": tf.reduce_prod,
    "ReduceMax": _wide(tf.reduce_max),
    "ReduceMin": _wide(tf.reduce_min),
    "ReduceL1": lambda x, axes, keepdims: tf.reduce_sum(tf.abs(x), axes, keepdims),
    "ReduceL2": lambda x, axes, keepdims: _root(tf.reduce_sum(x * x, axes, keepdims)),
    "ReduceSumSquare": lambda x, axes, keepdims: tf.reduce_sum(x * x, axes, keepdims),
    "ReduceLogSum": lambda x, axes, keepdims: tf.math.log(tf.reduce_sum(x, axes, keepdims)),
    "ReduceLogSumExp": lambda x, axes, keepdims: tf.reduce_logsumexp(x, axes, keepdims),
}


def _root(x: Tensor) -> Tensor:
    return tf.sqrt(x) if x.dtype.is_floating else tf.cast(tf.sqrt(tf.cast(x, tf.float64)), x.dtype)


def _declare(name: str, reduce: Reduction) -> None:
    axes_since = 13 if name == "ReduceSum" else 18

    def by_input(
        x: Value, axes: Value | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0, node: Node
    ) -> Any:
        chosen = static(axes)
        if axes is not None and chosen is None:
            if (axes.shape or ())[:1] == (0,):
                chosen = []
            else:
                return _dynamic(x, axes, reduce, bool(keepdims), bool(noop_with_empty_axes))
        if not chosen and noop_with_empty_axes:
            return node.value(reduce(x.tensor[None], [0], False))
        return reduced(x, chosen, bool(keepdims), reduce, node)

    def by_attribute(x: Value, *, axes: list[int] | None = None, keepdims: int = 1, node: Node) -> Value:
        return reduced(x, axes, bool(keepdims), reduce, node)

    OPS.op(name, since=axes_since)(by_input)
    OPS.op(name)(by_attribute)


def reduced(x: Value, axes: list[int] | None, keepdims: bool, reduce: Reduction, node: Node) -> Value:
    """Over some axes, all if none is named, wherever they lie."""
    rank = x.rank
    if rank is None:
        return node.value(reduce(x.tensor, axes or None, keepdims))
    gone = sorted(axis % rank for axis in axes) if axes else list(range(rank))
    result = reduce(x.stored, [x.placed(axis) for axis in gone], keepdims)
    return node.value(result, x.order if keepdims else remaining(x, gone))


def _dynamic(x: Value, axes: Value, reduce: Reduction, keepdims: bool, nothing_if_empty: bool) -> Tensor:
    """Axes that only the run knows: none means all."""
    chosen = tf.cast(axes.tensor, tf.int32)
    if not nothing_if_empty:
        chosen = tf.cond(tf.size(chosen) > 0, lambda: chosen, lambda: tf.range(tf.rank(x.tensor)))
    made = reduce(x.tensor, chosen, keepdims)
    if keepdims:
        made.set_shape([None] * (x.rank or 0))
    return made


for _name, _reduce in _REDUCTIONS.items():
    _declare(_name, _reduce)


@OPS.op("ArgMax", "ArgMin")
def arg_extreme(x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0, node: Node) -> Tensor:
    """The index of the first, or the last, of the extreme entries."""
    find = tf.argmax if node.proto.op_type == "ArgMax" else tf.argmin
    axis = axis % (x.rank or 1)
    tensor = tf.reverse(x.tensor, [axis]) if select_last_index else x.tensor
    found = find(tensor, axis, tf.int64)
    if select_last_index:
        found = tf.shape(tensor, out_type=tf.int64)[axis] - 1 - found
    return tf.expand_dims(found, axis) if keepdims else found


@OPS.op("CumSum", since=11)
def cumulative_sum(x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Along one axis, from either end."""
    return tf.cumsum(x.tensor, _from_start(x, axis), bool(exclusive), bool(reverse))


@OPS.op("CumProd", since=26)
def cumulative_product(x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Along one axis, from either end."""
    return tf.math.cumprod(x.tensor, _from_start(x, axis), bool(exclusive), bool(reverse))


def _from_start(x: Value, axis: Value) -> Any:
    """A known axis is counted from the first: TensorFlow.js takes a negative one for another."""
    return tf.cast(tf.reshape(axis.tensor, []), tf.int32) if axis.known is None else axis.known.item() % (x.rank or 1)


def _along(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Value]:
    def apply(x: Value, *, axis: int = -1, node: Node) -> Value:
        return node.value(function(x.stored, x.placed(axis)), x.order)

    return apply


def _flattened(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """Before opset 13 the axes from `axis` on count as one."""

    def apply(x: Value, *, axis: int = 1) -> Tensor:
        tensor, rank = x.tensor, x.rank or 1
        axis = axis % rank
        if axis == rank - 1:
            return function(tensor, axis)
        sizes = tf.shape(tensor)
        rows = tf.reshape(tensor, tf.stack([tf.reduce_prod(sizes[:axis]), -1]))
        return told(tf.reshape(function(rows, 1), sizes), x.shape)

    return apply


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return tf.one_hot(tf.argmax(x, axis), tf.shape(x)[axis], dtype=x.dtype, axis=axis)


for _name, _function in {"Softmax": tf.nn.softmax, "LogSoftmax": tf.nn.log_softmax, "Hardmax": _hardmax}.items():
    OPS.op(_name, since=13)(_along(_function))
    OPS.op(_name)(_flattened(_function))


@OPS.op("LpNormalization")
def norm(x: Value, *, axis: int = -1, p: int = 2) -> Tensor:
    """Along one axis, to length 1; what has no length stays zero."""
    length = tf.norm(x.tensor, ord=p, axis=axis, keepdims=True)
    return tf.math.divide_no_nan(x.tensor, length)


@OPS.op("Det", since=11)
def determinant(x: Value) -> Tensor:
    """Of the last two axes."""
    return tf.linalg.det(x.tensor)
