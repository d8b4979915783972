"""Operators that gather and count elements.

Scatters, sorts and Unique differ too much between frameworks: each folder has its own.
"""

from __future__ import annotations

import numpy as np

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.shape import entry
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value


@SHARED.op("Gather")
def gather(ops: Backend, x: Value, indices: Value, *, axis: int = 0) -> Tensor:
    """Slices of one axis, in the shape of the indices."""
    axis = axis % (x.rank or 1)
    return ops.gather(x.tensor, ops.from_end(indices, ops.sizes(x)[axis]), axis)


@SHARED.op("GatherElements")
def gather_elements(ops: Backend, x: Value, indices: Value, *, axis: int = 0) -> Tensor:
    """One index for each entry of the result."""
    axis = axis % (x.rank or 1)
    return ops.take_along(x.tensor, ops.from_end(indices, ops.sizes(x)[axis]), axis)


@SHARED.op("GatherND", since=11)
def gather_nd(ops: Backend, x: Value, indices: Value, *, batch_dims: int = 0, node: Node) -> Tensor:
    """The last axis of the indices is an index into the tensor, after `batch_dims` axes that both have."""
    depth, sizes = depth_of(indices, node), ops.sizes(x)
    positions = ops.from_end(indices, sizes[batch_dims : batch_dims + depth])
    if not batch_dims:
        return ops.gather_nd(x.tensor, positions)
    positions = ops.constant(positions) if isinstance(positions, np.ndarray) else positions
    dtype, rank, single = ops.dtype(positions), indices.rank or 1, positions[..., :1]
    batch = [ops.column(ops.cast(ops.range(0, sizes[i]), dtype), i, rank) for i in range(batch_dims)]
    whole = [*(each + ops.zeros_like(single, dtype) for each in batch), positions]
    return ops.gather_nd(x.tensor, ops.concat(whole, rank - 1))


def depth_of(indices: Value, node: Node) -> int:
    """How many axes each index of GatherND or ScatterND counts.

    Raises:
        UnsupportedOp: it is not known before the run.
    """
    depth = (indices.shape or (None,))[-1]
    if depth is None:
        raise node.unsupported("the last size of its indices is not known before the run")
    return depth


@SHARED.op("ReverseSequence")
def reverse_sequence(ops: Backend, x: Value, lengths: Value, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first entries of each sequence turned round, the rest as it is."""
    return reverse_within(ops, x.tensor, lengths.tensor, time_axis, batch_axis)


def reverse_within(ops: Backend, x: Tensor, lengths: Tensor, time_axis: int, batch_axis: int) -> Tensor:
    """By a gather, since TensorFlow.js has no ReverseSequence; time and batch are the first two axes."""
    sizes = ops.sizes(Value(ops, x))
    time, batch = (ops.column(ops.range(0, sizes[axis]), axis, 2) for axis in (time_axis, batch_axis))
    length = ops.column(ops.cast(lengths, ops.index), batch_axis, 2)
    source = ops.where(time < length, length - 1 - time, time)
    batch = batch + ops.zeros_like(source, ops.index)
    return ops.gather_nd(x, ops.stack([source, batch] if time_axis == 0 else [batch, source], 2))


@SHARED.op("OneHot")
def one_hot(ops: Backend, indices: Value, depth: Value, values: Value, *, axis: int = -1) -> Tensor:
    """Indices from -depth to depth - 1 give a one, others do not."""
    count = entry(ops, depth)
    positions = ops.cast(indices.tensor, np.dtype(np.int64))
    positions = ops.where(positions < 0, positions + ops.scalar(count, np.int64), positions)
    lit = ops.one_hot(positions, count, axis % ((indices.rank or 0) + 1))
    return ops.where(lit, values.tensor[1], values.tensor[0])


@SHARED.op("NonZero")
def non_zero(ops: Backend, x: Value) -> Tensor:
    """The indices of what is not zero, one row per axis."""
    return ops.transpose(ops.nonzero(ops.reshape(x.tensor, [1]) if x.rank == 0 else x.tensor), (1, 0))


@SHARED.op("Compress")
def compress(ops: Backend, x: Value, condition: Value, *, axis: int | None = None) -> Tensor:
    """The slices whose condition holds; a short condition is false beyond its end."""
    kept = ops.reshape(ops.nonzero(condition.tensor), [-1])
    if axis is None:
        return ops.gather(ops.reshape(x.tensor, [-1]), kept, 0)
    return ops.gather(x.tensor, kept, axis % (x.rank or 1))
