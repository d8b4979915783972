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

# a scatter into zeros adds duplicates; TensorFlow.js and TFLite have it, but not a scatter into a tensor
_SCATTER = {
    "none": tf.tensor_scatter_nd_update,
    "add": lambda tensor, positions, updates: (
        tensor + tf.scatter_nd(positions, updates, tf.shape(tensor, positions.dtype))
    ),
    "max": tf.tensor_scatter_nd_max,
    "min": tf.tensor_scatter_nd_min,
}


def _scattered(tensor: Tensor, positions: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction != "mul":
        if tensor.dtype == tf.bool:
            whole = _SCATTER[reduction](tf.cast(tensor, tf.int32), positions, tf.cast(updates, tf.int32))
            return tf.cast(whole, tf.bool)
        return _SCATTER[reduction](tensor, positions, updates)
    # TensorFlow multiplies nowhere in-place: one factor after another
    depth = positions.shape[-1]
    flat, factors = tf.reshape(positions, [-1, depth]), updates
    tail = tf.shape(tensor)[depth:]
    factors = tf.reshape(updates, tf.concat([[-1], tail], 0))

    def step(i: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        index = flat[i : i + 1]
        return i + 1, tf.tensor_scatter_nd_update(made, index, tf.gather_nd(made, index) * factors[i : i + 1])

    return tf.while_loop(lambda i, _: i < tf.shape(flat)[0], step, [tf.constant(0), tensor])[1]


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
    """Entries or slices, where each came first, which one each was, how many there were."""
    tensor = tf.reshape(x.tensor, [-1]) if axis is None else x.tensor
    axis = 0 if axis is None else axis % (x.rank or 1)
    found, inverse, counts = tf.raw_ops.UniqueWithCountsV2(x=tensor, axis=[axis], out_idx=tf.int64)
    number = tf.shape(found)[axis]
    total = tf.shape(inverse, out_type=tf.int64)[0]
    first = tf.math.unsorted_segment_min(tf.range(total), inverse, number)
    if sorted:
        ranked = _lexical(found, axis)
        found, first, counts = (
            tf.gather(found, ranked, axis=axis),
            tf.gather(first, ranked),
            tf.gather(counts, ranked),
        )
        inverse = tf.gather(tf.cast(tf.argsort(ranked), tf.int64), inverse)
    return found, first, inverse, counts


def _lexical(found: Tensor, axis: int) -> Tensor:
    """The order of slices, compared entry by entry."""
    rows = tf.reshape(tf.experimental.numpy.moveaxis(found, axis, 0), tf.stack([tf.shape(found)[axis], -1]))
    columns = tf.shape(rows)[1]

    def step(i: Tensor, ranked: Tensor) -> tuple[Tensor, Tensor]:
        column = tf.gather(rows[:, columns - 1 - i], ranked)
        return i + 1, tf.gather(ranked, tf.argsort(column, stable=True))

    start = [tf.constant(0), tf.range(tf.shape(rows)[0])]
    return tf.while_loop(lambda i, _: i < columns, step, start)[1]
