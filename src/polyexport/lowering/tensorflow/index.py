"""Operators that look entries up, put them in place, sort and count them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.tensorflow.target import OPS, sizes_of, static
from polyexport.lowering.value import Tensor, Value


def _from_start(indices: Tensor, size: Any) -> Tensor:
    """Negative indices count from the end."""
    return tf.where(indices < 0, indices + tf.cast(size, indices.dtype), indices)


def _indices(value: Value, size: Any) -> Any:
    """Indices without negative ones; constants stay constants."""
    if value.known is not None and isinstance(size, int):
        return np.where(value.known < 0, value.known + size, value.known)
    if value.known is not None and (value.known >= 0).all():
        return value.known
    return _from_start(value.tensor, size)


@OPS.op("Gather")
def gather(x: Value, indices: Value, *, axis: int = 0) -> Tensor:
    """Slices of one axis, in the shape of the indices."""
    axis = axis % (x.rank or 1)
    return tf.gather(x.tensor, _indices(indices, sizes_of(x)[axis]), axis=axis)


@OPS.op("GatherND", since=11)
def gather_nd(x: Value, indices: Value, *, batch_dims: int = 0) -> Tensor:
    """The last axis of the indices is a place in the tensor."""
    places = indices.tensor
    depth = (indices.shape or ())[-1]
    if depth is not None:
        size = tf.stack(sizes_of(x)[batch_dims : batch_dims + depth])
        places = _from_start(places, size)
    return tf.gather_nd(x.tensor, places, batch_dims=batch_dims)


@OPS.op("GatherElements", since=11)
def gather_elements(x: Value, indices: Value, *, axis: int = 0) -> Tensor:
    """One index for each entry of the result."""
    axis = axis % (x.rank or 1)
    places = _from_start(indices.tensor, sizes_of(x)[axis])
    return tf.gather_nd(x.tensor, _grid(places, axis))


def _grid(places: Tensor, axis: int) -> Tensor:
    """The full place of every entry, its index along `axis` taken from `places`."""
    sizes = tf.shape(places, out_type=places.dtype)
    rank = places.shape.rank
    axes = [places if i == axis else tf.broadcast_to(_along(tf.range(sizes[i]), i, rank), sizes) for i in range(rank)]
    return tf.stack(axes, -1)


def reversed_within(x: Tensor, lengths: Tensor, time_axis: int, batch_axis: int) -> Tensor:
    """The first entries of each sequence turned round, the rest as it is; time and batch are the first two axes.

    By a gather: TensorFlow.js has no ReverseSequence.
    """
    times = tf.range(tf.shape(x, out_type=lengths.dtype)[time_axis])
    place, length = _along(times, time_axis, 2), _along(lengths, batch_axis, 2)
    return tf.gather_nd(x, _grid(tf.where(place < length, length - 1 - place, place), time_axis))


@OPS.op("ReverseSequence", since=10)
def reverse_sequence(x: Value, lengths: Value, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first entries of each sequence, the rest stays."""
    return reversed_within(x.tensor, lengths.tensor, time_axis, batch_axis)


def _along(line: Tensor, axis: int, rank: int) -> Tensor:
    return tf.reshape(line, [1] * axis + [-1] + [1] * (rank - axis - 1))


# a scatter into zeros adds up what meets, and TensorFlow.js and TFLite have it where they lack the one into a tensor
_SCATTER = {
    "none": tf.tensor_scatter_nd_update,
    "add": lambda tensor, places, updates: tensor + tf.scatter_nd(places, updates, tf.shape(tensor, places.dtype)),
    "max": tf.tensor_scatter_nd_max,
    "min": tf.tensor_scatter_nd_min,
}


def _scattered(tensor: Tensor, places: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction != "mul":
        if tensor.dtype == tf.bool:
            whole = _SCATTER[reduction](tf.cast(tensor, tf.int32), places, tf.cast(updates, tf.int32))
            return tf.cast(whole, tf.bool)
        return _SCATTER[reduction](tensor, places, updates)
    # TensorFlow multiplies nowhere in place: one factor after another
    depth = places.shape[-1]
    flat, factors = tf.reshape(places, [-1, depth]), updates
    tail = tf.shape(tensor)[depth:]
    factors = tf.reshape(updates, tf.concat([[-1], tail], 0))

    def step(i: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        place = flat[i : i + 1]
        return i + 1, tf.tensor_scatter_nd_update(made, place, tf.gather_nd(made, place) * factors[i : i + 1])

    return tf.while_loop(lambda i, _: i < tf.shape(flat)[0], step, [tf.constant(0), tensor])[1]


@OPS.op("ScatterND", since=11)
def scatter_nd(x: Value, indices: Value, updates: Value, *, reduction: str = "none") -> Tensor:
    """Entries or slices put in place, or combined with what is there."""
    places = indices.tensor
    depth = (indices.shape or ())[-1]
    places = _from_start(
        places, tf.shape(x.tensor)[: tf.shape(places)[-1]] if depth is None else tf.stack(sizes_of(x)[:depth])
    )
    made = _scattered(x.tensor, places, updates.tensor, reduction)
    made.set_shape(x.shape)
    return made


@OPS.op("ScatterElements", "Scatter", since=9)
def scatter_elements(x: Value, indices: Value, updates: Value, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """One index for each update."""
    axis = axis % (x.rank or 1)
    places = _grid(_from_start(indices.tensor, sizes_of(x)[axis]), axis)
    made = _scattered(x.tensor, places, updates.tensor, reduction)
    made.set_shape(x.shape)
    return made


@OPS.op("TensorScatter", since=24)
def tensor_scatter(
    past: Value, update: Value, write: Value | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Each sequence of a batch, its update written from an index on."""
    axis = axis % (past.rank or 1)
    total, count, batch = sizes_of(past)[axis], sizes_of(update)[axis], sizes_of(past)[0]
    first = tf.zeros([batch], tf.int32) if write is None else tf.cast(write.tensor, tf.int32)
    rank = past.rank or 1
    places = _along(first, 0, rank) + _along(tf.range(count), axis, rank)
    places = tf.math.floormod(places, total) if mode == "circular" else places
    places = tf.broadcast_to(places, tf.shape(update.tensor))
    return tf.tensor_scatter_nd_update(past.tensor, _grid(places, axis), update.tensor)


@OPS.op("OneHot", since=9)
def one_hot(indices: Value, depth: Value, values: Value, *, axis: int = -1) -> Tensor:
    """Indices from -depth to depth - 1 are lit, others are not."""
    axis = axis if axis == -1 else axis % ((indices.rank or 0) + 1)
    count = tf.cast(tf.reshape(depth.tensor, []), tf.int64)
    places = tf.cast(indices.tensor, tf.int64)
    off, on = values.tensor[0], values.tensor[1]
    known = static(depth)
    made = tf.one_hot(_from_start(places, count), known[0] if known else tf.cast(count, tf.int32), True, False, axis)
    return tf.where(made, on, off)


@OPS.op("TopK", since=10)
def top_k(x: Value, k: Value, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Values and indices; among equals the first comes first."""
    rank = x.rank or 1
    axis = axis % rank
    last = [i for i in range(rank) if i != axis] + [axis]
    tensor = tf.transpose(x.tensor, last)
    known = static(k)
    count = known[0] if known else tf.cast(tf.reshape(k.tensor, []), tf.int32)
    if tensor.dtype in (tf.uint64, tf.uint32):
        tensor = tf.cast(tensor, tf.int64)
    values, places = tf.math.top_k(tensor if largest else _reversed(tensor), count)
    values = values if largest else _reversed(values)
    back = np.argsort(last)
    return tf.cast(tf.transpose(values, back), tf.as_dtype(x.dtype)), tf.cast(tf.transpose(places, back), tf.int64)


def _reversed(tensor: Tensor) -> Tensor:
    """The same entries in the other order; integers without overflow, by what LiteRT and TensorFlow.js have too."""
    if not tensor.dtype.is_integer:
        return -tensor
    return (tensor.dtype.max if tensor.dtype.is_unsigned else -1) - tensor


@OPS.op("NonZero", since=9)
def non_zero(x: Value) -> Tensor:
    """The places of what is not zero, one row per axis."""
    tensor = tf.reshape(x.tensor, [1]) if x.rank == 0 else x.tensor
    return tf.transpose(
        tf.where(tensor if tensor.dtype == tf.bool else tf.not_equal(tensor, tf.zeros([], tensor.dtype)))
    )


@OPS.op("Compress", since=9)
def compress(x: Value, condition: Value, *, axis: int | None = None) -> Tensor:
    """The slices whose condition holds; a short condition is false beyond its end."""
    tensor = tf.reshape(x.tensor, [-1]) if axis is None else x.tensor
    kept = tf.where(condition.tensor)[:, 0]
    return tf.gather(tensor, kept, axis=0 if axis is None else axis)


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
