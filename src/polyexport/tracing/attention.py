"""Attention of `torch.nn`'s transformers, as operators that other frameworks have too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


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
