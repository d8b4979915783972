"""Operators that handle sizes unknown before the run in TensorFlow's own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.backend import OPS
from polyexport.lowering.tensorflow.weights import set_shape
from polyexport.lowering.value import Value, static


@OPS.op("Transpose")
def transpose(x: Value, *, perm: list[int] | None = None) -> Value:
    """Nothing is transposed yet; see `Value.permuted`."""
    return x.permuted(perm if perm is not None else list(range(x.rank or 0))[::-1])


@OPS.op("Shape")
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Any:
    """Known if the sizes are static; then no tensor is read."""
    if x.shape is None:
        return tf.shape(x.tensor, out_type=tf.int64)[start:end]
    wanted = x.shape[start:end]
    if None not in wanted:
        return np.array(wanted, np.int64)
    sizes = tf.shape(x.stored, out_type=tf.int64)
    return tf.stack([sizes[x.placed(axis)] for axis in range(len(x.shape))[start:end]])


@OPS.op("Slice")
def slice_(
    x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None, *, node: Node
) -> Value:
    """Bounds are clamped to the tensor, negative ones count from its end."""
    rank = x.rank or 0
    chosen = list(range(rank)) if axes is None else static(axes)
    stride = [1] * rank if steps is None else static(steps)
    if chosen is None or stride is None:
        return _slice_unknown(x, starts, ends, axes, steps, node)
    chosen = [axis % rank for axis in chosen]
    begin, end = static(starts), static(ends)
    if begin is None or end is None:
        return _slice_dynamic(x, starts, ends, chosen, stride, node)
    cuts: list[Any] = [slice(None)] * rank
    for axis, first, last, step in zip(chosen, begin, end, stride, strict=False):
        cuts[x.placed(axis)] = _cut(first, last, step, (x.shape or ())[axis])
    return node.value(_sliced(x.stored, cuts), x.order)


def _sliced(tensor: Tensor, cuts: list[slice]) -> Tensor:
    """By one slice, or where there are more axes than LiteRT slices, axis by axis by a gather."""
    changed = {axis: cut for axis, cut in enumerate(cuts) if cut != slice(None)}
    if len(cuts) <= _MOST_AXES or any(tensor.shape[axis] is None for axis in changed):
        return tensor[tuple(cuts)]
    for axis, cut in changed.items():
        tensor = tf.gather(tensor, np.arange(tensor.shape[axis], dtype=np.int32)[cut], axis=axis)
    return tensor


_MOST_AXES = 5
"""Of a tensor that LiteRT's own StridedSlice takes."""


def _cut(first: int, last: int, step: int, size: int | None) -> slice:
    if size is not None:
        return _within(*slice(first, last, step).indices(size))
    bound = 2**31 - 1
    start = None if step < 0 and first >= bound else max(min(first, bound), -bound)
    # with a negative step, an end far below zero means: the first entry included
    return slice(start, None if abs(last) >= bound else last, step)


def _within(start: int, stop: int, step: int) -> slice:
    return slice(start, None if stop < 0 else stop, step)


def _slice_dynamic(x: Value, starts: Value, ends: Value, axes: list[int], steps: list[int], node: Node) -> Value:
    rank = x.rank or 0
    begin, end, stride = [tf.constant(0, tf.int64)] * rank, [tf.constant(0, tf.int64)] * rank, [1] * rank
    from_, to = tf.cast(starts.tensor, tf.int64), tf.cast(ends.tensor, tf.int64)
    masked = set(range(rank))
    for i, (axis, step) in enumerate(zip(axes, steps, strict=False)):
        position = x.placed(axis)
        total = tf.shape(x.stored, out_type=tf.int64)[position]
        begin[position], end[position] = _bounds(from_[i], to[i], step, total)
        stride[position] = step
        masked.discard(position)
    mask = sum(1 << position for position in masked)
    strides = tf.constant(stride, tf.int64)
    cut = tf.strided_slice(x.stored, tf.stack(begin), tf.stack(end), strides, begin_mask=mask, end_mask=mask)
    return node.value(cut, x.order)


def _bounds(first: Tensor, last: Tensor, step: Any, total: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that `strided_slice` understands as ONNX does."""
    zero = tf.zeros_like(total)
    first = tf.where(first < 0, first + total, first)
    last = tf.where(last < 0, last + total, last)
    down = tf.convert_to_tensor(step) < 0
    first = tf.where(down, tf.clip_by_value(first, zero, total - 1), tf.clip_by_value(first, zero, total))
    last = tf.where(down, tf.clip_by_value(last, zero - 1, total), tf.clip_by_value(last, zero, total))
    # -1 would count from the end: one before the first entry is written as -(total + 1)
    return first, tf.where(last < 0, -total - 1, last)


def _slice_unknown(x: Value, starts: Value, ends: Value, axes: Value | None, steps: Value | None, node: Node) -> Value:
    """Axes or steps that only the run knows."""
    rank = x.rank or 0
    total = tf.shape(x.tensor, out_type=tf.int64)
    count = tf.shape(starts.tensor)[0]
    where = tf.range(rank, dtype=tf.int64) if axes is None else tf.cast(axes.tensor, tf.int64) % rank
    stride = tf.ones([count], tf.int64) if steps is None else tf.cast(steps.tensor, tf.int64)
    own = tf.gather(total, where)
    first, last = _bounds(tf.cast(starts.tensor, tf.int64), tf.cast(ends.tensor, tf.int64), stride, own)
    at = where[:, None]
    begin = tf.tensor_scatter_nd_update(tf.zeros([rank], tf.int64), at, first)
    end = tf.tensor_scatter_nd_update(total, at, last)
    strides = tf.tensor_scatter_nd_update(tf.ones([rank], tf.int64), at, stride)
    return node.value(set_shape(tf.strided_slice(x.tensor, begin, end, strides), [None] * rank))


@OPS.op("Expand")
def expand(x: Value, shape: Value, *, node: Node) -> Tensor:
    """Broadcast in both directions: a size of 1 in `shape` keeps the tensor's own."""
    target = None if shape.sizes is None else list(shape.sizes)
    if target is None:
        return tf.broadcast_to(
            x.tensor, tf.broadcast_dynamic_shape(tf.shape(x.tensor), tf.cast(shape.tensor, tf.int32))
        )
    if all(each == 1 for each in target) and len(target) <= (x.rank or 0):
        return x
    rank = max(len(target), x.rank or 0)
    wide, own = [1] * (rank - len(target)) + target, x.widened(rank)
    have = own.shape or ()
    if None not in wide and None not in have:
        return tf.broadcast_to(x.tensor, np.broadcast_shapes(tuple(wide), have))  # type: ignore[arg-type]  # no None
    joined = tf.broadcast_dynamic_shape(tf.shape(x.tensor), tf.cast(shape.tensor, tf.int32))
    made = tf.broadcast_to(x.tensor, joined)
    made.set_shape([_joint(a, b) for a, b in zip(wide, have, strict=True)])
    return made


def _joint(a: int | None, b: int | None) -> int | None:
    if a == 1:
        return b
    if b == 1:
        return a
    return b if a is None else a


@OPS.op("ConstantOfShape", since=9)
def constant_of_shape(shape: Value, *, value: np.ndarray | None = None) -> Tensor:
    """One value, everywhere."""
    content = np.zeros(1, np.float32) if value is None else value
    made = tf.fill(tf.cast(shape.tensor, tf.int32), tf.constant(content.ravel()[0]))
    if shape.sizes is not None:
        made.set_shape(list(shape.sizes))
    return made


@OPS.op("Range", since=11)
def range_(start: Value, limit: Value, delta: Value) -> Tensor:
    """As Python's, for floats too."""
    return tf.range(*(tf.reshape(each.tensor, []) for each in (start, limit, delta)))
