"""Operators that scatter, sort and compare entries, by kernels that only Paddle has."""

from __future__ import annotations

from typing import Any

import paddle

from polyexport.lowering.backend import Tensor, product
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.index import depth_of
from polyexport.lowering.operators.shape import entry
from polyexport.lowering.paddle.backend import OPS
from polyexport.lowering.paddle.primitives import from_end, reshape, sizes_of, vector
from polyexport.lowering.paddle.weights import set_shape
from polyexport.lowering.value import Value

_REDUCTIONS = {"none": "assign", "add": "add", "mul": "mul", "max": "amax", "min": "amin"}


def _scattered(tensor: Tensor, positions: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    if tensor.dtype == paddle.bool:
        whole = _scattered(paddle.cast(tensor, "int32"), positions, paddle.cast(updates, "int32"), axis, reduction)
        return paddle.cast(whole, "bool")
    positions = set_shape(
        paddle.assign(positions), [None] * len(positions.shape)
    )  # Paddle takes a known size for more than a dynamic one
    return paddle.put_along_axis(tensor, positions, updates, axis, _REDUCTIONS[reduction], True, False)


@OPS.op("ScatterElements", "Scatter", since=9)
def scatter_elements(x: Value, indices: Value, updates: Value, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """One index for each update."""
    axis = axis % (x.rank or 1)
    return _scattered(x.tensor, from_end(indices, sizes_of(x)[axis]), updates.tensor, axis, reduction)


@OPS.op("ScatterND", since=11)
def scatter_nd(x: Value, indices: Value, updates: Value, *, reduction: str = "none", node: Node) -> Tensor:
    """Entries or slices written, or combined with what is there, by their number in the flat tensor."""
    depth, sizes = depth_of(indices, node), sizes_of(x)
    positions = from_end(indices, sizes[:depth])
    steps = [product(sizes[i + 1 : depth]) for i in range(depth)]
    number = paddle.reshape(paddle.sum(positions * vector(steps), -1), [-1, 1])
    slices = product(sizes[depth:])
    rows = reshape(x.tensor, [-1, slices])
    new = reshape(updates.tensor, [-1, slices])
    made = _scattered(rows, number + paddle.zeros_like(new, "int64"), new, 0, reduction)
    return reshape(made, sizes)


@OPS.op("TopK", since=10)
def top_k(x: Value, k: Value, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Values and indices; equal values keep their order, which Paddle's own does not guarantee."""
    axis = axis % (x.rank or 1)
    ranked = paddle.argsort(x.tensor, axis, bool(largest), True)
    positions = paddle.slice(ranked, [axis], [0], [entry(x.backend, k)])
    return paddle.take_along_axis(x.tensor, positions, axis, broadcast=False), positions


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
