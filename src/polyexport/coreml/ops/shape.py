"""Creating, concatenating, splitting, repeating and rearranging tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from polyexport.coreml.ops.arguments import ints, listed

# --- made from nothing ------------------------------------------------------------------------------------------------


def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.as_tensor(value).expand(ints(shape)).clone()


def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.as_tensor(value).expand(ref_tensor.shape).clone()


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=torch.result_type(start, end))


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


# --- joined and cut ---------------------------------------------------------------------------------------------------


def concat(values: Tensor | list[Tensor], axis: Tensor | int, interleave: Tensor | bool = False) -> Tensor:
    parts = [part.reshape(1) if part.ndim == 0 else part for part in listed(values)]
    dim = int(axis) % parts[0].ndim
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1) if interleave else torch.cat(parts, dim)


def stack(values: Tensor | list[Tensor], axis: Tensor | int) -> Tensor:
    return torch.stack(listed(values), int(axis))


def split(
    x: Tensor,
    axis: Tensor | int,
    num_splits: Tensor | int | None = None,
    split_sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    size = x.shape[int(axis)]
    sizes = ints(split_sizes) if split_sizes is not None else [size // int(num_splits or 1)] * int(num_splits or 1)
    return torch.split(x, sizes, int(axis))


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """Pairs of before and after, for the last axes; any rank in every mode."""
    widths = ints(pad)
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    if mode == "constant":
        flat = [width for pair in reversed(pairs) for width in pair]
        return functional.pad(x, flat, value=float(constant_val))
    for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
        size = x.shape[axis]
        positions = torch.arange(-before, size + after)
        if mode == "reflect":
            positions = size - 1 - (size - 1 - positions.abs()).abs()
        x = x.index_select(axis, positions.clamp(0, size - 1))
    return x


def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


def sliding_windows(x: Tensor, axis: Tensor | int, size: Tensor, stride: Tensor | int = 1) -> Tensor:
    """The windows lie along `axis`, what is in each along the one behind it."""
    dim = int(axis) % x.ndim
    return x.unfold(dim, int(size), int(stride)).movedim(-1, dim + 1)


# --- rearranged -------------------------------------------------------------------------------------------------------


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    chosen = ints(axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the size of the axis at that index."""
    sizes = ints(shape)
    return x.reshape([x.shape[axis] if size == 0 and axis < x.ndim else size for axis, size in enumerate(sizes)])


def reshape_like(
    x: Tensor,
    ref_tensors: Tensor | list[Tensor],
    begins: Tensor | list[Tensor],
    ends: Tensor | list[Tensor],
    end_masks: Tensor | list[Tensor],
) -> Tensor:
    sizes: list[int] = []
    parts = (listed(each) for each in (ref_tensors, begins, ends, end_masks))
    for like, begin, end, to_the_end in zip(*parts, strict=True):
        sizes += like.shape[int(begin) : None if to_the_end else int(end)]
    return x.reshape(sizes)


def flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[: int(axis)]), -1)


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(ints(axes) if axes is not None else list(range(x.ndim)))


def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: Tensor | int = 0, batch_axis: Tensor | int = 0) -> Tensor:
    """Only the first `lengths` steps of each sequence are reversed."""
    moved = x.movedim((int(batch_axis), int(seq_axis)), (0, 1))
    rows = [torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(moved, ints(lengths), strict=True)]
    return torch.stack(rows).movedim((0, 1), (int(batch_axis), int(seq_axis)))


def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    row, column = torch.arange(x.shape[-2]).unsqueeze(1), torch.arange(x.shape[-1])
    low, high = int(lower), int(upper)
    kept = ((row - column <= low) | (low < 0)) & ((column - row <= high) | (high < 0))
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


# --- between space, depth and batch -----------------------------------------------------------------------------------


def depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """The block is the slowest-changing part of the channels, as in TensorFlow."""
    n, c, h, w = x.shape
    block = int(block_size)
    parts = x.reshape(n, block, block, c // block**2, h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


def space_to_depth(x: Tensor, block_size: Tensor) -> Tensor:
    n, c, h, w = x.shape
    block = int(block_size)
    parts = x.reshape(n, c, h // block, block, w // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)


def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return functional.pixel_shuffle(x, int(upscale_factor))


def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    return functional.pixel_unshuffle(x, int(downscale_factor))


def space_to_batch(x: Tensor, block_shape: Tensor, paddings: Tensor) -> Tensor:
    high, wide = ints(block_shape)
    x = pad(x, paddings)
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // high, high, w // wide, wide)
    return parts.permute(3, 5, 0, 1, 2, 4).reshape(high * wide * n, c, h // high, w // wide)


def batch_to_space(x: Tensor, block_shape: Tensor, crops: Tensor) -> Tensor:
    high, wide = ints(block_shape)
    n, c, h, w = x.shape
    parts = x.reshape(high, wide, n // (high * wide), c, h, w)
    whole = parts.permute(2, 3, 4, 0, 5, 1).reshape(-1, c, h * high, w * wide)
    return pad(whole, -crops)


# --- lists of tensors -------------------------------------------------------------------------------------------------


def make_list(
    init_length: Tensor | int = 1,
    dynamic_length: Tensor | bool = True,
    elem_shape: Tensor | None = None,
    dtype: str = "fp32",
) -> list[Tensor | None]:
    return [None] * int(init_length)


def list_length(ls: list[Tensor]) -> Tensor:
    return torch.tensor(len(ls))


def list_read(ls: list[Tensor], index: Tensor) -> Tensor:
    return ls[int(index)]


def list_gather(ls: list[Tensor], indices: Tensor) -> Tensor:
    return torch.stack([ls[index] for index in ints(indices)])


def list_write(ls: list[Tensor | None], index: Tensor, value: Tensor) -> list[Tensor | None]:
    longer = [*ls, *[None] * (int(index) + 1 - len(ls))]
    longer[int(index)] = value
    return longer


def list_scatter(ls: list[Tensor | None], indices: Tensor, value: Tensor) -> list[Tensor | None]:
    for index, item in zip(ints(indices), value, strict=True):
        ls = list_write(ls, torch.tensor(index), item)
    return ls


OPS = {
    each.__name__: each
    for each in (
        band_part,
        batch_to_space,
        concat,
        depth_to_space,
        expand_dims,
        fill,
        fill_like,
        flatten2d,
        list_gather,
        list_length,
        list_read,
        list_scatter,
        list_write,
        make_list,
        pad,
        pixel_shuffle,
        pixel_unshuffle,
        range_1d,
        reshape,
        reshape_like,
        reverse,
        reverse_sequence,
        shape,
        sliding_windows,
        space_to_batch,
        space_to_depth,
        split,
        squeeze,
        stack,
        tile,
        transpose,
    )
}
