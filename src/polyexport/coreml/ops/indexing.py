"""Reading and writing by index; a negative index counts from the end, in an op of iOS 15 or 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from polyexport.coreml.ops.arguments import bools, ints, wrapped

# --- gather -----------------------------------------------------------------------------------------------------------


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    """As numpy's `take`, for each entry of the leading `batch_dims` axes."""
    dim, batch = int(axis) % x.ndim, int(batch_dims)
    if batch:
        rows = [gather(row, index, dim - 1, batch - 1, validate_indices) for row, index in zip(x, indices, strict=True)]
        return torch.stack(rows)
    taken = x.index_select(dim, wrapped(indices, x.shape[dim], validate_indices).reshape(-1))
    return taken.reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool | None = None
) -> Tensor:
    return torch.gather(x, int(axis), wrapped(indices, x.shape[int(axis)], validate_indices))


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool | None = None
) -> Tensor:
    """The last axis of `indices` is an index into the leading axes of `x`."""
    if int(batch_dims):
        rows = [
            gather_nd(row, index, int(batch_dims) - 1, validate_indices) for row, index in zip(x, indices, strict=True)
        ]
        return torch.stack(rows)
    pairs = zip(indices.unbind(-1), x.shape, strict=False)
    return x[tuple(wrapped(index, size, validate_indices) for index, size in pairs)]


# --- scatter ----------------------------------------------------------------------------------------------------------

_MODES: Mapping[str, Callable[[Tensor, int, Tensor, Tensor], Tensor]] = {
    "update": lambda data, dim, index, updates: data.scatter(dim, index, updates),
    "add": lambda data, dim, index, updates: data.scatter_add(dim, index, updates),
    "sub": lambda data, dim, index, updates: data.scatter_add(dim, index, -updates),
    "mul": lambda data, dim, index, updates: data.scatter_reduce(dim, index, updates, "prod"),
    "div": lambda data, dim, index, updates: data.scatter_reduce(dim, index, 1 / updates, "prod"),
    "max": lambda data, dim, index, updates: data.scatter_reduce(dim, index, updates, "amax"),
    "min": lambda data, dim, index, updates: data.scatter_reduce(dim, index, updates, "amin"),
}


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    index = wrapped(indices, data.shape[int(axis)], validate_indices)
    return _MODES[mode](data, int(axis), index, updates)


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    """The vector `indices` has the index along `axis` of each slice of `updates`."""
    dim = int(axis) % data.ndim
    shape = [-1 if each == dim else 1 for each in range(data.ndim)]
    spread = [*data.shape[:dim], indices.numel(), *data.shape[dim + 1 :]]
    index = indices.reshape(shape).expand(spread)
    return scatter_along_axis(data, index, updates.reshape(spread), dim, mode, validate_indices)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Tensor | bool | None = None
) -> Tensor:
    """The last axis of `indices` is an index into the leading axes of `data`."""
    depth = indices.shape[-1]
    leading, rest = data.shape[:depth], math.prod(data.shape[depth:])
    flat = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for index, size in zip(indices.unbind(-1), leading, strict=True):
        flat = flat * size + wrapped(index, size, validate_indices)
    spread = flat.reshape(-1, 1).expand(-1, rest)
    table = data.reshape(math.prod(leading), rest)
    return _MODES[mode](table, 0, spread, updates.reshape(spread.shape)).reshape(data.shape)


# --- slices -----------------------------------------------------------------------------------------------------------


def _positions(
    shape: torch.Size,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> list[list[int]]:
    """The indices of each axis that a slice names, as Python's slices do."""
    rank = len(shape)
    steps = [1] * rank if stride is None else ints(stride)
    no_begin, no_end, single = (bools(mask, rank) for mask in (begin_mask, end_mask, squeeze_mask))
    positions = []
    for axis, (first, last, step, size) in enumerate(zip(ints(begin), ints(end), steps, shape, strict=True)):
        if single[axis]:
            positions.append([range(size)[0 if no_begin[axis] else first]])
        else:
            chosen = slice(None if no_begin[axis] else first, None if no_end[axis] else last, step)
            positions.append(list(range(size)[chosen]))
    return positions


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    result = x
    for axis, positions in enumerate(_positions(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)):
        if positions != list(range(x.shape[axis])):
            result = result.index_select(axis, torch.tensor(positions, dtype=torch.long))
    return result.squeeze(tuple(axis for axis, gone in enumerate(bools(squeeze_mask, x.ndim)) if gone))


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """A size of -1 is the rest of the axis."""
    for axis, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first = first % x.shape[axis] if first else 0
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    positions = _positions(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    grid = torch.meshgrid(*(torch.tensor(each, dtype=torch.long) for each in positions), indexing="ij")
    result = x.clone()
    result[grid] = update.reshape([len(each) for each in positions])
    return result


OPS = {
    each.__name__: each
    for each in (
        gather,
        gather_along_axis,
        gather_nd,
        scatter,
        scatter_along_axis,
        scatter_nd,
        slice_by_index,
        slice_by_size,
        slice_update,
    )
}
