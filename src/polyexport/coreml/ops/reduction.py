"""Reductions over axes, and running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyexport.coreml.ops.arguments import ints


def _over_axes(function: Callable[[Tensor, list[int]], Tensor]) -> Callable[..., Tensor]:
    """`function` keeps the axes that it reduces, as ones."""

    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        chosen = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in ints(axes)]
        result = function(x, chosen)
        return result if keep_dims else result.squeeze(tuple(chosen))

    return reduce


def _over_axis(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The first index of equal elements; Core ML does not document which one it returns."""

    def reduce(
        x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = "int32"
    ) -> Tensor:
        return function(x, dim=int(axis), keepdim=bool(keep_dims))

    return reduce


def _prod(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int]) -> Tensor:
    return x.sum(axes, keepdim=True, dtype=x.dtype)


def cumsum(
    x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False
) -> Tensor:
    dim = int(axis)
    turned = x.flip(dim) if reverse else x
    total = turned.cumsum(dim, dtype=x.dtype)
    total = total - turned if exclusive else total
    return total.flip(dim) if reverse else total


OPS = {
    "cumsum": cumsum,
    "reduce_argmax": _over_axis(torch.argmax),
    "reduce_argmin": _over_axis(torch.argmin),
    "reduce_l1_norm": _over_axes(lambda x, axes: _sum(x.abs(), axes)),
    "reduce_l2_norm": _over_axes(lambda x, axes: _sum(x.square(), axes).sqrt()),
    "reduce_log_sum": _over_axes(lambda x, axes: _sum(x, axes).log()),
    "reduce_log_sum_exp": _over_axes(lambda x, axes: x.logsumexp(axes, keepdim=True)),
    "reduce_max": _over_axes(lambda x, axes: x.amax(axes, keepdim=True)),
    "reduce_mean": _over_axes(lambda x, axes: x.mean(axes, keepdim=True)),
    "reduce_min": _over_axes(lambda x, axes: x.amin(axes, keepdim=True)),
    "reduce_prod": _over_axes(_prod),
    "reduce_sum": _over_axes(_sum),
    "reduce_sum_square": _over_axes(lambda x, axes: _sum(x.square(), axes)),
}
