"""Functions of single elements: angles, signs, steps, booleans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions.names import by_name, named

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    import torch

    return {
        **by_name(heaviside, copysign),
        **dict.fromkeys(named("atan2", "arctan2"), atan2),
        **dict.fromkeys(named("fmax"), lambda x, other: _without_nan(torch.maximum, x, other)),
        **dict.fromkeys(named("fmin"), lambda x, other: _without_nan(torch.minimum, x, other)),
        torch.hypot: lambda x, other: (x * x + other * other).sqrt(),
        **{function: _of_booleans(function) for function in named(*_LOGICAL)},
        torch.Tensor.bool: lambda x: as_type(x, torch.bool),
        torch.Tensor.to: as_type,
        torch.Tensor.data.__get__: lambda x: x.detach(),  # type: ignore[attr-defined]  # of a property; no trace follows it
    }


_LOGICAL = ("logical_and", "logical_or", "logical_xor", "logical_not")


def atan2(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.atan2` by `atan`; exporters to ONNX, which lacks it, turn by -π where `x` is 0 and `other` negative."""
    import torch

    upright = torch.where(x > 0, math.pi / 2, torch.where(x < 0, -math.pi / 2, 0.0))
    angle = torch.atan(x / torch.where(other == 0, 1.0, other))
    turned = angle + torch.where(x < 0, -math.pi, math.pi)
    return torch.where(other == 0, upright, torch.where(other < 0, turned, angle))


def heaviside(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`torch.heaviside`, which converters lack."""
    import torch

    return torch.where(x == 0, values, (x > 0).to(values.dtype))


def copysign(x: torch.Tensor, other: Any) -> torch.Tensor:
    """`torch.copysign` of a tensor without negative zeros, of which most runtimes cannot see the sign."""
    import torch

    if not isinstance(other, torch.Tensor) or not x.is_floating_point():
        return torch.copysign(x, other)
    return torch.where(other < 0, -x.abs(), x.abs())


def _without_nan(greater: Callable[..., torch.Tensor], x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.fmax` or `torch.fmin`: of a number and NaN the number."""
    import torch

    return torch.where(torch.isnan(x), other, torch.where(torch.isnan(other), x, greater(x, other)))


def as_type(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Tensor.to` a dtype; numbers become booleans by a comparison, since some runtimes take NaN for 0."""
    import torch

    return x != 0 if dtype is torch.bool and not _is_whole(x) else x.to(dtype)


def _is_whole(x: torch.Tensor) -> bool:
    """Whether it can have neither fractions nor NaN."""
    return not (x.is_floating_point() or x.is_complex())


def _of_booleans(function: Callable[..., Any]) -> Callable[..., Any]:
    """A logical function, of booleans only."""

    def apply(x: torch.Tensor, *rest: Any) -> Any:
        return function(*(operand if _is_whole(operand) else operand != 0 for operand in (x, *rest)))

    return apply
