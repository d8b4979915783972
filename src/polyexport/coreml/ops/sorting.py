"""Sorting, top-k, and indices of elements."""

from __future__ import annotations

import torch
from torch import Tensor


def argsort(x: Tensor, axis: Tensor | int = -1, ascending: Tensor | bool = False) -> Tensor:
    return torch.argsort(x, dim=int(axis), descending=not ascending, stable=True)


def topk(
    x: Tensor,
    k: Tensor | int = 1,
    axis: Tensor | int = -1,
    ascending: Tensor | bool = False,
    sort: Tensor | bool = True,
    return_indices: Tensor | bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """Equal values keep their order."""
    values, indices = torch.sort(x, dim=int(axis), descending=not ascending, stable=True)
    values, indices = (each.narrow(int(axis), 0, int(k)) for each in (values, indices))
    return (values, indices) if return_indices else (values,)


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor | int = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    positions = torch.arange(int(one_hot_vector_size))
    hot = torch.where(indices.unsqueeze(-1) == positions, torch.as_tensor(on_value), torch.as_tensor(off_value))
    return hot.movedim(-1, int(axis))


OPS = {each.__name__: each for each in (argsort, non_zero, one_hot, topk)}
