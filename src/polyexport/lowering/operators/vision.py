"""Sampling operators; those of detection differ too much, and are in each framework's folder."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Size, Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.resize import cubic
from polyexport.lowering.operators.shape import entries
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value

_SINGLE = np.dtype(np.float32)


@SHARED.op("GridSample")
def grid_sample(
    ops: Backend,
    x: Value,
    grid: Value,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
    node: Node,
) -> Any:
    """The tensor at positions between -1 and 1, the last axis of the grid counting the axes from the last."""
    native = ops.grid_sample(x, grid, mode, padding_mode, bool(align_corners))
    if native is not None:
        return native
    rank = x.rank or 0
    order = (0, *range(2, rank), 1)
    images = x.in_order(order)
    sizes = [ops.scalar(size, x.dtype) for size in ops.sizes(x)[2:]]
    axes = []
    for axis, size in enumerate(sizes):
        at = ops.cast(grid.tensor[..., rank - 3 - axis], x.dtype)
        at = (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
        axes.append(at if "cubic" in mode else _moved(ops, at, size, padding_mode, bool(align_corners)))
    return node.value(sampled(ops, images, axes, sizes, mode, padding_mode, bool(align_corners)), order)


def within(ops: Backend, at: Tensor, size: Tensor) -> Tensor:
    """A position clamped to an axis."""
    return ops.minimum(ops.maximum(at, 0.0), size - 1)


def _moved(ops: Backend, at: Tensor, size: Tensor, mode: str, align_corners: bool) -> Tensor:
    """Positions outside of the tensor, moved into it as `padding_mode` says."""
    if mode == "border":
        return within(ops, at, size)
    if mode == "reflection":
        beyond = 0.0 if align_corners else 0.5
        span = size - 1 + 2 * beyond
        turn = (at + beyond) % ops.maximum(2 * span, 1e-6)
        return within(ops, ops.where(turn > span, 2 * span - turn, turn) - beyond, size)
    return at


def sampled(
    ops: Backend,
    images: Tensor,
    axes: list[Tensor],
    sizes: list[Tensor],
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    """Images with the channels last at positions along each spatial axis `(batch, ...)`, in pixels."""
    rank = len(ops.shape(axes[0]) or ())
    batch = ops.range(0, ops.sizes(Value(ops, images))[0])
    rows = ops.column(batch, 0, rank) + ops.zeros_like(axes[0], ops.index)
    total = None
    for corner in itertools.product(*(_taps(ops, at, mode) for at in axes)):
        indices, weight, valid = [rows], None, None
        for (position, share), size in zip(corner, sizes, strict=True):
            if "cubic" in mode:
                position = _moved(ops, position, size, padding_mode, align_corners)
            inside = (position >= 0) & (position <= size - 1)
            valid = inside if valid is None else valid & inside
            weight = share if weight is None else weight * share
            indices.append(ops.cast(within(ops, position, size), ops.index))
        weight = ops.unsqueeze(ops.where(valid, weight, 0.0), [rank])
        found = ops.gather_nd(images, ops.stack(indices, rank)) * weight
        total = found if total is None else total + found
    return total


def _taps(ops: Backend, at: Tensor, mode: str) -> list[tuple[Tensor, Tensor]]:
    """The elements that contribute to a position, with their weights."""
    if mode == "nearest":
        return [(ops.round(at), ops.zeros_like(at, ops.dtype(at)) + 1)]
    low = ops.floor(at)
    part = at - low
    if "cubic" not in mode:
        return [(low, 1 - part), (low + 1, part)]
    return [(low + i, cubic(ops, part - i, -0.75)) for i in (-1, 0, 1, 2)]


def corners(ops: Backend, images: Tensor, batch: Tensor, ys: Tensor, xs: Tensor) -> list[Tensor]:
    """The four neighbors of each sample, weighted; a sample further out than one pixel counts as zero.

    Args:
        ops: The framework.
        images: With the channels last.
        batch: The image of each region.
        ys: `(region, ...)` of five axes, in pixels, as are `xs`.
        xs: See `ys`.
    """
    height, width = (ops.scalar(size, ops.dtype(images)) for size in ops.sizes(Value(ops, images))[1:3])
    inside = (ys >= -1) & (ys <= height) & (xs >= -1) & (xs <= width)
    ys, xs = within(ops, ys, height), within(ops, xs, width)
    top, left = ops.floor(ys), ops.floor(xs)
    down, right = ops.minimum(top + 1, height - 1), ops.minimum(left + 1, width - 1)
    dy, dx = ys - top, xs - left
    rows = ops.column(ops.cast(batch, ops.index), 0, 5) + ops.zeros_like(top, ops.index)
    found = []
    for y, x, weight in (
        (top, left, (1 - dy) * (1 - dx)),
        (top, right, (1 - dy) * dx),
        (down, left, dy * (1 - dx)),
        (down, right, dy * dx),
    ):
        indices = ops.stack([rows, ops.cast(y, ops.index), ops.cast(x, ops.index)], 5)
        # a slice with a new axis is one of six axes, and TFLite has five
        found.append(ops.gather_nd(images, indices) * ops.unsqueeze(ops.where(inside, weight, 0.0), [5]))
    return found


@SHARED.op("AffineGrid")
def affine_grid(ops: Backend, theta: Value, size: Value, *, align_corners: int = 0, node: Node) -> Tensor:
    """Positions between -1 and 1, axes counted from the last, each moved by its sample's matrix `(n, n + 1)`."""
    sizes = entries(ops, size, node)[2:]
    count = len(sizes)
    lines = [ops.column(_even(ops, each, bool(align_corners)), axis, count) for axis, each in enumerate(sizes)]
    whole = [ops.broadcast(line, sizes) for line in reversed(lines)]
    positions = ops.stack([*whole, ops.full(sizes, 1, _SINGLE)], count)
    flat = ops.cast(ops.reshape(positions, [-1, count + 1]), theta.dtype)
    moved = ops.matmul(flat, ops.transpose(theta.tensor, (0, 2, 1)))
    return ops.reshape(moved, [ops.sizes(theta)[0], *sizes, count])


def _even(ops: Backend, size: Size, align_corners: bool) -> Tensor:
    """The positions of an axis of some size, from -1 to 1: of its entries, or the middles of its pixels."""
    position, steps = ops.cast(ops.range(0, size), _SINGLE), ops.scalar(size, _SINGLE)
    if align_corners:
        return position * 2 / ops.maximum(steps - 1, 1.0) - 1
    return (2 * position + 1) / steps - 1
