"""PyTorch's functions and tensor methods by name: the keys of the tables of decompositions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def named(*names: str) -> Iterator[Any]:
    """The functions of `torch` and the methods of `torch.Tensor` that have these names."""
    import torch

    return (getattr(owner, name) for name in names for owner in (torch, torch.Tensor) if hasattr(owner, name))


def by_name(*decompositions: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    """Decompositions by the functions and methods whose names they have."""
    return {function: written for written in decompositions for function in named(written.__name__)}
