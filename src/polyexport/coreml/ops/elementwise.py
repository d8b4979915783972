"""Arithmetic, comparison and logic, element by element, with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(x)


def _binary(function: Any) -> Callable[..., Tensor]:
    return lambda x, y: function(x, y)


def cast(x: Tensor, dtype: str) -> Tensor:
    """To an integer it truncates, to a bool it asks for not zero."""
    return x.to(_DTYPES[dtype])


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def real_div(x: Tensor, y: Tensor) -> Tensor:
    integers = not x.is_floating_point() and not y.is_floating_point()
    return torch.div(x, y, rounding_mode="trunc" if integers else None)


def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """The quotient rounded down; PyTorch's own corrects it by the remainder, so that 1 // 0.1 is 9."""
    return torch.floor(x / y) if x.is_floating_point() else torch.floor_divide(x, y)


def pow(x: Tensor, y: Tensor) -> Tensor:  # the op is called so
    """A power, but of a single 2 the square of the other side, as Core ML has it.

    https://github.com/apple/coremltools/issues/2628
    """
    return torch.square(y) if x.numel() == 1 and bool(x == 2) else torch.pow(x, y)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha)


def identity(x: Tensor) -> Tensor:
    return x


OPS = {
    **{
        name: _unary(getattr(torch, name))
        for name in (
            "abs",
            "acos",
            "asin",
            "atan",
            "atanh",
            "ceil",
            "cos",
            "cosh",
            "erf",
            "exp",
            "exp2",
            "floor",
            "round",
            "sign",
            "sin",
            "sinh",
            "sqrt",
            "square",
            "tan",
            "logical_not",
        )
    },
    **{
        name: _binary(function)
        for name, function in {
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "mod": torch.remainder,
            "maximum": torch.maximum,
            "minimum": torch.minimum,
            "equal": torch.eq,
            "not_equal": torch.ne,
            "greater": torch.gt,
            "greater_equal": torch.ge,
            "less": torch.lt,
            "less_equal": torch.le,
            "logical_and": torch.logical_and,
            "logical_or": torch.logical_or,
            "logical_xor": torch.logical_xor,
        }.items()
    },
    **{
        each.__name__: each
        for each in (cast, clip, floor_div, identity, inverse, log, pow, real_div, rsqrt, select, threshold)
    },
}
