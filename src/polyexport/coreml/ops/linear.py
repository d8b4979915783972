"""Products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyexport.coreml.ops.arguments import listed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of integers it does not run on a device: https://github.com/apple/coremltools/pull/2673."""
    if not x.is_floating_point():
        raise ValueError("Core ML cannot run a linear layer of integers")
    product = x @ weight.transpose(-1, -2)
    return product if bias is None else product + bias


def matmul(x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False) -> Tensor:
    left = x.transpose(-1, -2) if transpose_x and x.ndim > 1 else x
    right = y.transpose(-1, -2) if transpose_y and y.ndim > 1 else y
    return left @ right


def einsum(values: Tensor | list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *listed(values))


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask)


OPS = {each.__name__: each for each in (einsum, linear, matmul, scaled_dot_product_attention)}
