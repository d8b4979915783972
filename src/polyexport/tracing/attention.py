"""Attention of `torch.nn`'s transformers, as operators that other frameworks have too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Disable the fused inference path of `torch.nn`'s transformers, which only PyTorch supports.

    Results are the same except at positions that `src_key_padding_mask` masks: the fused path fills them with zeros,
    and training does not. Masks are not compared with the causal one either, which a trace cannot follow.
    """
    import torch
    from torch.nn.modules import transformer

    fused, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask

    def given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = given
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def separate_projections() -> Iterator[None]:
    """Split queries, keys and values off the last axis of their common product.

    PyTorch makes them the first axis of a tensor with one axis more, and ncnn has four axes at most.
    """
    from torch.nn import functional

    with mock.patch.object(functional, "_in_projection_packed", _projected):
        yield


def _projected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Queries, keys and values, by one product for tensors that are the same one."""
    import torch

    width = query.shape[-1]
    if query is key is value:  # the weight as it is, since quantizers do not know a part of one
        made = [torch.nn.functional.linear(query, weight, bias)]
    else:
        tensors, counts = ([query, key], [1, 2]) if key is value else ([query, key, value], [1, 1, 1])
        rows = [count * width for count in counts]
        biases = [None] * len(counts) if bias is None else bias.split(rows)
        made = [*map(torch.nn.functional.linear, tensors, weight.split(rows), biases)]
    return [part.contiguous() for each in made for part in each.split(width, -1)]
