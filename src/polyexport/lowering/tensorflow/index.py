"""Operators that scatter, sort and compare entries, by kernels that only TensorFlow has."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.index import depth_of
from polyexport.lowering.operators.shape import entry
from polyexport.lowering.tensorflow.backend import OPS
from polyexport.lowering.tensorflow.primitives import column, from_end, grid, sizes_of
from polyexport.lowering.tensorflow.weights import set_shape
from polyexport.lowering.value import Value

_SEGMENTS = {
    "max": (tf.math.unsorted_segment_max, tf.maximum),
    "min": (tf.math.unsorted_segment_min, tf.minimum),
    "mul": (tf.math.unsorted_segment_prod, tf.multiply),
}
"""How the updates of one position are reduced, and the result combined with what is there."""


def _scattered(tensor: Tensor, positions: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if tensor.dtype == tf.bool:
        whole = _scattered(tf.cast(tensor, tf.int32), positions, tf.cast(updates, tf.int32), reduction)
        return tf.cast(whole, tf.bool)
    if reduction == "none":
        return tf.tensor_scatter_nd_update(tensor, positions, updates)
    if reduction == "add":  # a scatter into zeros adds duplicates, and TensorFlow.js and TFLite have it
        return tensor + tf.scatter_nd(positions, updates, tf.shape(tensor, positions.dtype))
    return _reduced(tensor, positions, updates, reduction)


def _reduced(tensor: Tensor, positions: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """By segments of flat positions, which TFLite has, but no scatter with a maximum or a product."""
    depth, shape = positions.shape[-1], tf.shape(tensor, positions.dtype)
    sizes = [shape[axis] for axis in range(depth)]
    steps = [tf.reduce_prod(sizes[axis + 1 :]) if axis + 1 < depth else 1 for axis in range(depth)]
    flat = sum(tf.cast(steps[axis], positions.dtype) * positions[..., axis] for axis in range(depth))
    rows = tf.concat([[-1], shape[depth:]], 0)
    own, new = tf.reshape(tensor, rows), tf.reshape(updates, rows)
    segment, combine = _SEGMENTS[reduction]
    made = segment(new, tf.reshape(flat, [-1]), tf.shape(own, positions.dtype)[0])
    found = combine(own, made)
    if tensor.dtype.is_floating and reduction != "mul":  # of no update at all, it is finite, which infinity is not
        found = tf.where(tf.abs(made) == tensor.dtype.max, own, found)
    return tf.reshape(found, shape)


@OPS.op("ScatterND", since=11)
def scatter_nd(x: Value, indices: Value, updates: Value, *, reduction: str = "none", node: Node) -> Tensor:
    """Entries or slices written, or combined with what is there."""
    positions = tf.convert_to_tensor(from_end(indices, sizes_of(x)[: depth_of(indices, node)]))
    return set_shape(_scattered(x.tensor, positions, updates.tensor, reduction), x.shape)


@OPS.op("ScatterElements", "Scatter", since=9)
def scatter_elements(x: Value, indices: Value, updates: Value, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """One index for each update."""
    axis = axis % (x.rank or 1)
    positions = grid(from_end(indices, sizes_of(x)[axis]), axis)
    return set_shape(_scattered(x.tensor, positions, updates.tensor, reduction), x.shape)


@OPS.op("TensorScatter", since=24)
def tensor_scatter(
    past: Value, update: Value, write: Value | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Each sequence of a batch, its update written from an index on."""
    axis = axis % (past.rank or 1)
    total, count, batch = sizes_of(past)[axis], sizes_of(update)[axis], sizes_of(past)[0]
    first = tf.zeros([batch], tf.int32) if write is None else tf.cast(write.tensor, tf.int32)
    rank = past.rank or 1
    positions = column(first, 0, rank) + column(tf.range(count), axis, rank)
    positions = tf.math.floormod(positions, total) if mode == "circular" else positions
    positions = tf.broadcast_to(positions, tf.shape(update.tensor))
    return tf.tensor_scatter_nd_update(past.tensor, grid(positions, axis), update.tensor)


@OPS.op("TopK", since=10)
def top_k(x: Value, k: Value, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Values and indices; equal values keep their order."""
    rank = x.rank or 1
    axis = axis % rank
    last = [i for i in range(rank) if i != axis] + [axis]
    tensor = tf.transpose(x.tensor, last)
    if tensor.dtype in (tf.uint64, tf.uint32):
        tensor = tf.cast(tensor, tf.int64)
    values, positions = tf.math.top_k(tensor if largest else _reversed(tensor), entry(x.backend, k))
    values = values if largest else _reversed(values)
    back = np.argsort(last)
    return tf.cast(tf.transpose(values, back), tf.as_dtype(x.dtype)), tf.cast(tf.transpose(positions, back), tf.int64)


def _reversed(tensor: Tensor) -> Tensor:
    """The same entries in the other order; integers without overflow, by what LiteRT and TensorFlow.js have too."""
    if not tensor.dtype.is_integer:
        return -tensor
    return (tensor.dtype.max if tensor.dtype.is_unsigned else -1) - tensor


@OPS.op("Unique", since=11)
def unique(x: Value, *, axis: int | None = None, sorted: int = 1) -> Any:
    """Entries or slices, where each came first, which one each was, how many there were.

    By a sort, since TFLite has no operator that counts.
    """
    tensor = tf.reshape(x.tensor, [-1]) if axis is None else x.tensor
    axis = 0 if axis is None else axis % (x.rank or 1)
    moved = tf.experimental.numpy.moveaxis(tensor, axis, 0)
    width = int(np.prod(moved.shape[1:])) if None not in moved.shape[1:] else -1
    rows = tf.reshape(moved, tf.stack([tf.shape(tensor)[axis], width]))
    ranked, count = _lexical(rows), tf.shape(rows)[0]
    ordered = tf.gather(rows, ranked)
    index = tf.range(count)  # no slice here is empty, which LiteRT's CompiledModel refuses
    before = tf.gather(ordered, tf.maximum(index - 1, 0))
    is_new = tf.logical_or(tf.reduce_any(tf.not_equal(ordered, before), 1), index < 1)
    begins = tf.cast(tf.where(is_new)[:, 0], tf.int32)
    counts = tf.concat([begins, [count]], 0)[1:] - begins
    first = tf.gather(ranked, begins)
    inverse = tf.scatter_nd(tf.expand_dims(ranked, 1), tf.cumsum(tf.cast(is_new, tf.int32)) - 1, [count])
    if not sorted:
        came = tf.argsort(first)
        first, counts = tf.gather(first, came), tf.gather(counts, came)
        inverse = tf.gather(tf.argsort(came), inverse)
    return tf.gather(tensor, first, axis=axis), *(tf.cast(each, tf.int64) for each in (first, inverse, counts))


def _lexical(rows: Tensor) -> Tensor:
    """The order of rows, compared entry by entry; equal ones keep theirs."""
    if rows.shape[1] == 1:
        return tf.argsort(rows[:, 0], stable=True)
    columns = tf.shape(rows)[1]

    def step(i: Tensor, ranked: Tensor) -> tuple[Tensor, Tensor]:
        column = tf.gather(rows[:, columns - 1 - i], ranked)
        return i + 1, tf.gather(ranked, tf.argsort(column, stable=True))

    start = [tf.constant(0), tf.range(tf.shape(rows)[0])]
    return tf.while_loop(lambda i, _: i < columns, step, start)[1]
