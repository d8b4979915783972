"""Elements looked up or written by index: diagonals, windows, gathers and scatters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions.names import by_name
from polyexport.tracing.decompositions.shape import movedim

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    import torch

    return {
        **by_name(diagonal, diag_embed, masked_scatter, scatter_reduce, take_along_dim),
        torch.Tensor.unfold: unfold,
        torch.nn.functional.one_hot: one_hot,
        torch.Tensor.masked_scatter_: lambda x, *rest, **more: x.copy_(masked_scatter(x, *rest, **more)),
        torch.Tensor.scatter_reduce_: lambda x, *rest, **more: x.copy_(scatter_reduce(x, *rest, **more)),
    }


def diag_embed(x: torch.Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> torch.Tensor:
    """`torch.diag_embed` on the main diagonal of two last axes by `where`, which needs no shape."""
    import torch

    if offset or (dim1, dim2) != (-2, -1):
        return torch.diag_embed(x, offset, dim1, dim2)
    rows = x.unsqueeze(-1).expand(*x.shape, x.shape[-1])
    return torch.where(torch.eye(x.shape[-1], dtype=torch.bool), rows, torch.zeros_like(rows))


def scatter_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor, reduce: str, *, include_self: bool = True
) -> torch.Tensor:
    """`torch.scatter_reduce` without mean, and with each element among its own sources, as in ONNX."""
    import torch

    if reduce == "prod" or not x.is_floating_point():
        return torch.scatter_reduce(x, dim, index, src, reduce, include_self=include_self)
    count = torch.zeros_like(x).scatter_add(dim, index, torch.ones_like(src))
    least = {"amax": -torch.inf, "amin": torch.inf}.get(reduce, 0.0)
    own = x if include_self else torch.where(count > 0, torch.full_like(x, least), x)
    if reduce in ("amax", "amin"):
        return torch.scatter_reduce(own, dim, index, src, reduce)
    total = own.scatter_add(dim, index, src)
    if reduce == "sum":
        return total
    return total / (count + 1 if include_self else count.clamp(min=1))


def unfold(x: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    """`Tensor.unfold` by lookup: windows in place of an axis, their elements in a new last axis."""
    import torch

    axis = dimension % x.dim()
    starts = torch.arange(0, x.shape[axis] - size + 1, step)
    indices = starts.unsqueeze(1) + torch.arange(size)
    return movedim(movedim(x, axis, -1)[..., indices], -2, axis)


def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`torch.nn.functional.one_hot`; without a count of classes it is one more than the greatest of the data."""
    import torch

    if num_classes != -1:
        return torch.nn.functional.one_hot(tensor, num_classes)
    size: Any = tensor.max() + 1  # as a tensor, or the tracer would take it for a constant
    return (tensor.unsqueeze(-1) == torch.arange(size)).to(torch.int64)


def diagonal(x: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    """`torch.diagonal` by lookup, if the sizes are known."""
    import torch

    sizes = x.shape[dim1], x.shape[dim2]
    if not all(type(size) is int for size in sizes):  # dynamic, or a traced value
        return torch.diagonal(x, offset, dim1, dim2)
    rows = torch.arange(max(0, -offset), max(0, -offset, min(sizes[0], sizes[1] - offset)))
    return movedim(x, (dim1, dim2), (-2, -1))[..., rows, rows + offset]


def masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`torch.masked_scatter` by lookup: the nth position where the mask is set gets the nth element of `source`."""
    import torch

    x, mask = torch.broadcast_tensors(x, mask)  # type: ignore[no-untyped-call]  # untyped in torch
    index = (mask.flatten().to(torch.int64).cumsum(0) - 1).clamp(min=0)
    return torch.where(mask, source.flatten()[index].reshape(mask.shape), x)


def take_along_dim(x: torch.Tensor, indices: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """`torch.take_along_dim` as a gather, which does not broadcast; axes of size 1 are repeated."""
    import torch

    if dim is None:
        return x.flatten().gather(0, indices.flatten())
    if x.dim() != indices.dim():
        return torch.take_along_dim(x, indices, dim)
    pairs = [list(pair) for pair in zip(x.shape, indices.shape, strict=True)]
    pairs[dim] = [-1, -1]
    mine, theirs = ([b if type(a) is int and a == 1 else -1 for a, b in each] for each in (pairs, map(reversed, pairs)))
    return x.expand(mine).gather(dim, indices.expand(theirs))
