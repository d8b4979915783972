"""Activation functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyexport.coreml.ops.arguments import along


def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


def elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor | float = 0.0) -> Tensor:
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, along(alpha, 1, x.ndim) * x)


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def scaled_tanh(x: Tensor, alpha: Tensor | float = 1.0, beta: Tensor | float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: Tensor | float = 0.2, beta: Tensor | float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def softplus(x: Tensor) -> Tensor:
    return functional.softplus(x, threshold=80)


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return along(alpha, 1, x.ndim) * softplus(along(beta, 1, x.ndim) * x)


def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return torch.softmax(x, int(axis))


def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def thresholded_relu(x: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
    return torch.where(x >= alpha, x, 0)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


OPS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    **{
        each.__name__: each
        for each in (
            clamped_relu,
            elu,
            gelu,
            leaky_relu,
            linear_activation,
            prelu,
            relu6,
            scaled_tanh,
            sigmoid_hard,
            silu,
            softmax,
            softplus,
            softplus_parametric,
            softsign,
            thresholded_relu,
        )
    },
}
