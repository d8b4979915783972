"""Arguments as Python values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ints(value: Tensor | Sequence[Tensor]) -> list[int]:
    """A vector of integers, however the program writes it."""
    if isinstance(value, Tensor):
        return [int(each) for each in value.reshape(-1).tolist()]
    return [int(each) for each in value]


def bools(value: Tensor | None, count: int) -> list[bool]:
    """A mask over `count` axes, by default not set."""
    return [False] * count if value is None else [bool(each) for each in value.reshape(-1).tolist()]


def listed(values: Tensor | list[Tensor]) -> list[Tensor]:
    """The arguments of an op that takes a list, which a list of one does not show."""
    return values if isinstance(values, list) else [values]


def wrapped(indices: Tensor, size: int, validate_indices: Tensor | bool | None) -> Tensor:
    """Indices from the start, where negative ones count from the end: up to iOS 16, whose ops do not validate.

    https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html (iOS 17, scatter_gather)

    Raises:
        ValueError: a negative index for an op of iOS 17 or later, which does not define what it reads or writes.
    """
    indices = indices.long()
    if validate_indices is not None and bool((indices < 0).any()):
        raise ValueError("an index is negative, which Core ML does not define since iOS 17")
    return torch.where(indices < 0, indices + size, indices)


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector shaped to broadcast along `axis` of a tensor of `rank` axes; a scalar stays one."""
    return vector if vector.ndim != 1 else vector.reshape([-1 if each == axis % rank else 1 for each in range(rank)])
