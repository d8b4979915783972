"""Operators that look entries up, put them in place, sort and count them."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.target import OPS, is_tensor, shaped, sizes_of, static, told, vector
from polyexport.lowering.value import Tensor, Value


def _places(indices: Value, size: Any) -> Tensor:
    """Indices in int64, negative ones counted from the end."""
    if indices.known is not None and (not is_tensor(size) or (indices.known >= 0).all()):
        size = 0 if is_tensor(size) else size
        known = indices.known.astype(np.int64)
        return Value(indices.framework, known=np.where(known < 0, known + size, known)).tensor
    places = paddle.cast(indices.tensor, "int64")
    return paddle.where(places < 0, places + size, places)


@OPS.op("Gather")
def gather(x: Value, indices: Value, *, axis: int = 0) -> Tensor:
    """Slices of one axis, in the shape of the indices."""
    axis = axis % (x.rank or 1)
    sizes = sizes_of(x)
    places = _places(indices, sizes[axis])
    if indices.rank == 1:
        return paddle.index_select(x.tensor, places, axis)
    taken = paddle.index_select(x.tensor, paddle.reshape(places, [-1]), axis)
    return shaped(taken, [*sizes[:axis], *sizes_of(indices), *sizes[axis + 1 :]])


@OPS.op("GatherND", since=11)
def gather_nd(x: Value, indices: Value, *, batch_dims: int = 0, node: Node) -> Tensor:
    """The last axis of the indices is a place in the tensor."""
    depth, sizes = _depth(indices, node), sizes_of(x)
    places = _places(indices, vector(sizes[batch_dims : batch_dims + depth]))
    if batch_dims:
        single = paddle.zeros_like(places[..., :1])
        batch = [_along(paddle.arange(0, sizes[i], 1, "int64"), i, len(places.shape)) for i in range(batch_dims)]
        places = paddle.concat([*(each + single for each in batch), places], -1)
    return paddle.gather_nd(x.tensor, places)


def _depth(indices: Value, node: Node) -> int:
    depth = (indices.shape or (None,))[-1]
    if depth is None:
        raise node.unsupported("how many axes its indices count is not known before the run")
    return depth


def _along(line: Tensor, axis: int, rank: int) -> Tensor:
    return paddle.reshape(line, [1] * axis + [-1] + [1] * (rank - axis - 1))


@OPS.op("GatherElements", since=11)
def gather_elements(x: Value, indices: Value, *, axis: int = 0) -> Tensor:
    """One index for each entry of the result."""
    axis = axis % (x.rank or 1)
    return paddle.take_along_axis(x.tensor, _places(indices, sizes_of(x)[axis]), axis, broadcast=False)


_REDUCTIONS = {"none": "assign", "add": "add", "mul": "mul", "max": "amax", "min": "amin"}


def _scattered(tensor: Tensor, places: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    if tensor.dtype == paddle.bool:
        whole = _scattered(paddle.cast(tensor, "int32"), places, paddle.cast(updates, "int32"), axis, reduction)
        return paddle.cast(whole, "bool")
    places = told(
        paddle.assign(places), [None] * len(places.shape)
    )  # Paddle takes a known size for more than a free one
    return paddle.put_along_axis(tensor, places, updates, axis, _REDUCTIONS[reduction], True, False)


@OPS.op("ScatterElements", "Scatter", since=9)
def scatter_elements(x: Value, indices: Value, updates: Value, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """One index for each update."""
    axis = axis % (x.rank or 1)
    return _scattered(x.tensor, _places(indices, sizes_of(x)[axis]), updates.tensor, axis, reduction)


@OPS.op("ScatterND", since=11)
def scatter_nd(x: Value, indices: Value, updates: Value, *, reduction: str = "none", node: Node) -> Tensor:
    """Entries or slices put in place, or combined with what is there, by their number in the flat tensor."""
    depth, sizes = _depth(indices, node), sizes_of(x)
    places = _places(indices, vector(sizes[:depth]))
    steps = [_product(sizes[i + 1 : depth]) for i in range(depth)]
    number = paddle.reshape(paddle.sum(places * vector(steps), -1), [-1, 1])
    slices = _product(sizes[depth:])
    rows = shaped(x.tensor, [-1, slices])
    new = shaped(updates.tensor, [-1, slices])
    made = _scattered(rows, number + paddle.zeros_like(new, "int64"), new, 0, reduction)
    return shaped(made, sizes)


def _product(sizes: list[Any]) -> Any:
    product: Any = 1
    for each in sizes:
        product = product * each
    return product


@OPS.op("OneHot", since=9)
def one_hot(indices: Value, depth: Value, values: Value, *, axis: int = -1) -> Tensor:
    """Indices from -depth to depth - 1 are lit, others are not."""
    rank = (indices.rank or 0) + 1
    axis = axis % rank
    known = static(depth)
    count = known[0] if known else paddle.reshape(paddle.cast(depth.tensor, "int64"), [])
    places = paddle.cast(indices.tensor, "int64")
    places = paddle.unsqueeze(paddle.where(places < 0, places + count, places), axis)
    lit = places == _along(paddle.arange(0, count, 1, "int64"), axis, rank)
    return paddle.where(lit, values.tensor[1], values.tensor[0])


@OPS.op("TopK", since=10)
def top_k(x: Value, k: Value, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Values and indices; among equals the first comes first, which Paddle's own does not promise."""
    axis = axis % (x.rank or 1)
    known = static(k)
    count = known[0] if known else paddle.reshape(paddle.cast(k.tensor, "int64"), [])
    ranked = paddle.argsort(x.tensor, axis, bool(largest), True)
    places = paddle.slice(ranked, [axis], [0], [count])
    return paddle.take_along_axis(x.tensor, places, axis, broadcast=False), places


@OPS.op("NonZero", since=9)
def non_zero(x: Value) -> Tensor:
    """The places of what is not zero, one row per axis."""
    return paddle.transpose(paddle.nonzero(paddle.reshape(x.tensor, [1]) if x.rank == 0 else x.tensor), [1, 0])


@OPS.op("Compress", since=9)
def compress(x: Value, condition: Value, *, axis: int | None = None) -> Tensor:
    """The slices whose condition holds; a short condition is false beyond its end."""
    kept = paddle.reshape(paddle.nonzero(condition.tensor), [-1])
    if axis is None:
        return paddle.index_select(paddle.reshape(x.tensor, [-1]), kept, 0)
    return paddle.index_select(x.tensor, kept, axis % (x.rank or 1))


@OPS.op("Unique", since=11)
def unique(x: Value, *, axis: int | None = None, sorted: int = 1) -> Any:
    """Entries or slices, where each came first, which one each was, how many there were."""
    axis = None if axis is None else axis % (x.rank or 1)
    tensor = paddle.reshape(x.tensor, [-1]) if axis is None else x.tensor
    found, first, inverse, counts = paddle.unique(tensor, True, True, True, axis or 0)
    if not sorted:
        ranked = paddle.argsort(first)
        found = paddle.index_select(found, ranked, axis or 0)
        first, counts = (paddle.index_select(each, ranked) for each in (first, counts))
        inverse = paddle.index_select(paddle.argsort(ranked), inverse)
    return found, first, inverse, counts
