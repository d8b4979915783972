"""Normalizations; the channels are axis 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyexport.coreml.ops.arguments import along, ints


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * along(gamma, 1, x.ndim)
    return x if beta is None else x + along(beta, 1, x.ndim)


def _standardised(x: Tensor, axes: list[int], epsilon: Tensor | float) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + epsilon)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    centred = x - along(mean, 1, x.ndim)
    return _scaled(centred / torch.sqrt(along(variance, 1, x.ndim) + epsilon), gamma, beta)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    return _scaled(_standardised(x, list(range(2, x.ndim)), epsilon), gamma, beta)


def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """`gamma` and `beta` have the shape of the normalized axes."""
    chosen = [axis % x.ndim for axis in ints(axes)] if axes is not None else list(range(x.ndim))
    shape = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    result = _standardised(x, chosen, epsilon)
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def local_response_norm(
    x: Tensor, size: Tensor, alpha: Tensor | float = 1e-4, beta: Tensor | float = 0.75, k: Tensor | float = 1.0
) -> Tensor:
    return functional.local_response_norm(x, int(size), float(alpha), float(beta), float(k))


OPS = {each.__name__: each for each in (batch_norm, instance_norm, l2_norm, layer_norm, local_response_norm)}
