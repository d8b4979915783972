"""Reductions of axes, all at once or cumulative."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions.names import by_name, named
from polyexport.tracing.decompositions.shape import movedim

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    return {
        **by_name(nansum, nanmean, count_nonzero, cumprod, cummax, cummin),
        **dict.fromkeys(named("sum"), total),
        **{function: _of_booleans(function) for function in named("any", "all")},
    }


def nansum(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """`torch.nansum` as the sum with 0 in place of NaN."""
    import torch

    return torch.where(torch.isnan(x), torch.zeros_like(x), x).sum(*rest, **more)


def nanmean(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """`torch.nanmean` as the sum over the count of what is not NaN."""
    import torch

    counted = torch.where(torch.isnan(x), torch.zeros_like(x), torch.ones_like(x))
    return nansum(x, *rest, **more) / counted.sum(*rest, **more)


def count_nonzero(x: torch.Tensor, dim: Any = None) -> torch.Tensor:
    """`torch.count_nonzero` as a sum."""
    import torch

    other = (x != 0).to(torch.int64)
    return other.sum() if dim is None else other.sum(dim)


def _of_booleans(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.any` or `torch.all` of booleans; Core ML's converter takes other elements for them as they are."""

    def apply(x: torch.Tensor, *rest: Any, **more: Any) -> Any:
        import torch

        kept = x.dtype in (torch.bool, torch.uint8)  # of uint8 the result is not a boolean
        return function(x if kept else x != 0, *rest, **more)

    return apply


LONGEST = 512
"""Elements along an axis up to which pairs of them are compared: that needs a square matrix of this size."""


def cumprod(x: torch.Tensor, dim: int, **more: Any) -> torch.Tensor:
    """`torch.cumprod` as products of the first, the first two … elements; the TorchScript exporter lacks it."""
    import torch

    count = int(x.shape[dim]) if not isinstance(x.shape[dim], torch.SymInt) else LONGEST + 1
    if more or count > LONGEST or not x.is_floating_point():
        return torch.cumprod(x, dim, **more)
    first = torch.ones(count, count, dtype=torch.bool).tril()
    moved = movedim(x, dim, -1).unsqueeze(-2)
    return movedim(torch.where(first, moved, torch.ones_like(moved)).prod(-1), -1, dim)


def cummax(x: torch.Tensor, dim: int) -> Any:
    """`torch.cummax` as the maximum of the first, the first two … elements, and the index of its last occurrence."""
    import torch

    count = int(x.shape[dim]) if not isinstance(x.shape[dim], torch.SymInt) else LONGEST + 1
    if count > LONGEST or not x.is_floating_point():
        return torch.cummax(x, dim)
    first = torch.ones(count, count, dtype=torch.bool).tril()
    moved = movedim(x, dim, -1).unsqueeze(-2)
    values = torch.where(first, moved, torch.full_like(moved, -torch.inf)).amax(-1)
    greatest = torch.logical_and(first, moved == values.unsqueeze(-1))
    indices = torch.where(greatest, torch.arange(count), torch.zeros(count, dtype=torch.int64)).amax(-1)
    return torch.return_types.cummax((movedim(values, -1, dim), movedim(indices, -1, dim)))


def cummin(x: torch.Tensor, dim: int) -> Any:
    """`torch.cummin` as `cummax` of the negated tensor."""
    import torch

    if not x.is_floating_point():
        return torch.cummin(x, dim)
    values, indices = cummax(-x, dim)
    return torch.return_types.cummin((-values, indices))


def total(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """`torch.sum`, of booleans as integers; Core ML's converter returns floats."""
    import torch

    return torch.sum(x.to(torch.int64) if x.dtype == torch.bool else x, *rest, **more)
