"""Sorting, order statistics, and the search in sorted sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions.names import by_name
from polyexport.tracing.decompositions.reduction import LONGEST
from polyexport.tracing.decompositions.shape import movedim

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    import torch

    return {
        **by_name(argsort, topk, kthvalue, median, quantile, mode),
        torch.bucketize: bucketize,
        torch.searchsorted: searchsorted,
    }


def bucketize(
    input: torch.Tensor, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False
) -> torch.Tensor:
    """`torch.bucketize` by counting the smaller boundaries."""
    return searchsorted(boundaries, input, out_int32=out_int32, right=right)


def searchsorted(
    sorted_sequence: torch.Tensor,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.searchsorted` by counting the smaller elements, or for `right` those not greater; NaN is last."""
    import torch

    if sorter is not None or not isinstance(input, torch.Tensor):
        return torch.searchsorted(sorted_sequence, input, out_int32=out_int32, right=right, side=side, sorter=sorter)
    entries = sorted_sequence if sorted_sequence.dim() == 1 else sorted_sequence.unsqueeze(-2)
    value = input.unsqueeze(-1)
    above = entries > value if right or side == "right" else entries >= value
    count = above.logical_not().to(torch.int64).sum(-1)  # NaN comes last
    return count.to(torch.int32) if out_int32 else count


def quantile(
    x: torch.Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> torch.Tensor:
    """`torch.quantile` by interpolation between two sorted elements, without NaN."""
    import torch

    if isinstance(q, torch.Tensor) or interpolation != "linear":
        return torch.quantile(x, q, dim, keepdim, interpolation=interpolation)
    moved = x.flatten() if dim is None else movedim(x, dim, -1)
    position = q * (int(moved.shape[-1]) - 1)
    ordered, low = moved.sort(-1).values, int(position)
    high = min(low + 1, int(moved.shape[-1]) - 1)
    found = torch.lerp(ordered[..., low], ordered[..., high], position - low)
    if not keepdim:
        return found
    return found.unsqueeze(dim) if dim is not None else found.reshape([1] * x.dim())


def median(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """`torch.median`: the lower middle of the sorted elements, and along an axis its index."""
    import torch

    if dim is None:
        return kthvalue(x.flatten(), (x.numel() + 1) // 2).values
    return torch.return_types.median(tuple(kthvalue(x, (int(x.shape[dim]) + 1) // 2, dim, keepdim)))


def kthvalue(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """`torch.kthvalue`: the `k`th of the sorted elements, and its index."""
    import torch

    values, indices = (movedim(ordered, dim, -1)[..., k - 1] for ordered in x.sort(dim))
    if keepdim:
        values, indices = values.unsqueeze(dim), indices.unsqueeze(dim)
    return torch.return_types.kthvalue((values, indices))


def argsort(x: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> torch.Tensor:
    """`torch.argsort` by `torch.sort`, whose stable form exporters are told about."""
    import torch

    return torch.sort(x, stable=stable, dim=dim, descending=descending)[1] if stable else x.argsort(dim, descending)


def mode(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """`torch.mode` by comparing all pairs: the least of the most frequent elements, and the index of its last one."""
    import torch

    size = x.shape[dim]
    if type(size) is int and size > LONGEST:
        return torch.mode(x, dim, keepdim)
    moved = movedim(x, dim, -1)
    count = (moved.unsqueeze(-1) == moved.unsqueeze(-2)).to(torch.int64).sum(-1)
    most = count == count.amax(-1, keepdim=True)
    values = torch.where(most, moved, moved.amax(-1, keepdim=True)).amin(-1, keepdim=True)
    positions = torch.arange(moved.shape[-1])
    indices = torch.where(moved == values, positions, torch.zeros_like(positions)).amax(-1, keepdim=True)
    values, indices = movedim(values, -1, dim), movedim(indices, -1, dim)
    return torch.return_types.mode((values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim)))


def topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """`torch.topk`, always sorted, since Core ML before iOS 16 has nothing else."""
    import torch

    return torch.topk(x, k, dim, largest, sorted=True)
