"""Fourier transforms, windows, and Col2Im."""

from __future__ import annotations

import numpy as np

from polyexport.lowering.backend import Backend, Size, Tensor, is_known
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.shape import entry
from polyexport.lowering.spectra import block_positions
from polyexport.lowering.table import SHARED, Int, Ints
from polyexport.lowering.value import Value


@SHARED.op("DFT")
def transform(
    ops: Backend, x: Value, length: Value | None = None, axis: Int | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """Along one axis, padded with zeros or cut to `length`."""
    axis = (-2 if axis is None else axis) % (x.rank or 1)
    have = ops.sizes(x)[axis]
    count = entry(ops, length) if length is not None else 2 * (have - 1) if inverse and onesided else have
    if inverse and onesided:
        made = ops.fourier(_mirrored(ops, x.tensor, axis, have, count), axis, True, count)
        return made[..., :1]
    return ops.fourier(_fitted(ops, x, axis, have, count), axis, bool(inverse), count // 2 + 1 if onesided else count)


def _fitted(ops: Backend, x: Value, axis: int, have: Size, count: Size) -> Tensor:
    """Cut, or filled with zeros, to a length."""
    if is_known(have) and is_known(count):
        sides = [(0, 0)] * (x.rank or 0)
        sides[axis] = (0, count - have)
        return ops.pad(x.tensor, sides, 0)
    if count is have:
        return x.tensor
    position = ops.range(0, count)
    found = ops.gather(x.tensor, ops.minimum(position, have - 1), axis)
    return ops.where(ops.column(position < have, axis, x.rank or 1), found, 0)


def _mirrored(ops: Backend, data: Tensor, axis: int, half: Size, count: Size) -> Tensor:
    """The whole spectrum of a real signal from its first half."""
    position = ops.range(0, count)
    mirrored = position >= half
    found = ops.gather(data, ops.where(mirrored, count - position, position), axis)
    rank = len(ops.shape(data) or ())
    sign = ops.column(1 - 2 * ops.cast(mirrored, ops.dtype(data)), axis, rank - 1)
    return ops.stack([found[..., 0], found[..., 1] * sign], rank - 1)


@SHARED.op("STFT")
def short_transform(
    ops: Backend,
    signal: Value,
    step: Int,
    window: Value | None = None,
    length: Int | None = None,
    *,
    onesided: int = 1,
    node: Node,
) -> Tensor:
    """Frames of a signal `(batch, time[, 1 or 2])`, each weighed by the window and transformed."""
    data = signal.tensor if signal.rank == 3 else ops.unsqueeze(signal.tensor, [2])
    span = length if length is not None or window is None else (window.shape or (None,))[0]
    if span is None:
        raise node.unsupported("the length of its frames is not known before the run")
    batch, time = ops.sizes(signal)[:2]
    count = (time - span) // step + 1
    positions = ops.unsqueeze(ops.range(0, count) * step, [1]) + ops.unsqueeze(ops.range(0, span), [0])
    frames = ops.gather(data, ops.reshape(positions, [-1]), 1)
    frames = ops.reshape(frames, [batch, count, span, (ops.shape(data) or ())[-1]])
    if window is not None:
        missing = span - ops.sizes(window)[0]
        wide = ops.pad(window.tensor, [(missing // 2, missing - missing // 2)], 0)
        frames = frames * ops.unsqueeze(wide, [1])
    return ops.fourier(frames, 2, False, span // 2 + 1 if onesided else span)


@SHARED.op("Col2Im")
def columns_to_image(
    ops: Backend,
    x: Value,
    image: Ints,
    block: Ints,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """An image from its blocks, which are added where they overlap."""
    pads = pads or [0] * 2 * len(block)
    positions, wide = block_positions(image, block, dilations, pads, strides)
    batch, depth = ops.sizes(x)[:2]
    channels = depth // int(np.prod(block))
    rows = ops.transpose(ops.reshape(x.tensor, [batch, channels, positions.size]), (2, 0, 1))
    flat = ops.scatter_add(int(np.prod(wide)), ops.constant(positions.reshape(-1).astype(ops.index)), rows)
    whole = ops.reshape(ops.transpose(flat, (1, 2, 0)), [batch, channels, *wide])
    return whole[(slice(None), slice(None), *(slice(pads[i], pads[i] + size) for i, size in enumerate(image)))]
