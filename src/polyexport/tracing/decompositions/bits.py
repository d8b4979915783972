"""Bits of integers by arithmetic, since few runtimes have shifts and bitwise operators, or for some types only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions.names import named

if TYPE_CHECKING:
    import torch

_MOST = 30
"""Bits to shift by at once: 2³¹ is no int32."""

_PIECE = 16
"""Bits of two tensors that are compared at once, along an axis of their own."""

Compute = Callable[["torch.Tensor", Any, int], "torch.Tensor"]
"""The result of an integer tensor, another one or a number, and the count of bits besides the sign."""


def functions() -> Mapping[Any, Callable[..., Any]]:
    """The functions by PyTorch's own, under each name that they have there; those of booleans are logical."""
    import torch

    computed: Mapping[str, tuple[str, Compute]] = {
        "bitwise_and": ("and", _both),
        "bitwise_or": ("or", lambda x, other, bits: x + other - _both(x, other, bits)),
        "bitwise_xor": ("xor", lambda x, other, bits: x + other - 2 * _both(x, other, bits)),
        "bitwise_left_shift": ("lshift", lambda x, other, bits: _shifted(torch.mul, x, other, bits)),
        "bitwise_right_shift": ("rshift", lambda x, other, bits: _shifted(torch.floor_divide, x, other, bits)),
    }
    found: dict[Any, Callable[..., Any]] = {}
    for name, (operator, compute) in computed.items():
        apply = _of_integers(getattr(torch, name), compute, getattr(torch, f"logical_{operator}", None))
        found |= dict.fromkeys(named(name, f"__{operator}__"), apply)
        found |= dict.fromkeys(named(f"{name}_", f"__i{operator}__"), _in_place(apply))
        found |= dict.fromkeys(named(f"__r{operator}__"), _turned(apply))
    found |= dict.fromkeys(named("bitwise_not", "__invert__"), _inverted)
    found |= dict.fromkeys(named("bitwise_not_"), lambda x: x.copy_(_inverted(x)))
    return found


def _of_integers(plain: Any, compute: Compute, logical: Any) -> Callable[[Any, Any], torch.Tensor]:
    def apply(x: Any, other: Any) -> torch.Tensor:
        import torch

        kind = torch.result_type(x, other)
        if kind is torch.bool and logical is not None and isinstance(other, torch.Tensor):
            return logical(x, other)  # type: ignore[no-any-return]  # a function of torch
        bits = _bits(kind)
        if not bits or not isinstance(x, torch.Tensor):
            return plain(x, other)  # type: ignore[no-any-return]  # as above
        wide = torch.int64 if kind is torch.int64 else torch.int32
        return _within(compute(x.to(wide), other.to(wide) if isinstance(other, torch.Tensor) else other, bits), kind)

    return apply


def _in_place(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, other: x.copy_(apply(x, other))


def _turned(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An operator whose left side is a number, which comes second."""
    return lambda x, other: apply(x.new_full(x.shape, other), x)


def _inverted(x: torch.Tensor) -> torch.Tensor:
    """`torch.bitwise_not`."""
    import torch

    if x.dtype is torch.bool:
        return x.logical_not()
    return 255 - x if x.dtype is torch.uint8 else -1 - x


def _bits(kind: torch.dtype) -> int:
    """The bits of an integer type besides that of the sign; 0 for others."""
    import torch

    short = {torch.uint8: 8, torch.int8: 7, torch.int16: 15}
    return {**short, torch.int32: 31, torch.int64: 63}.get(kind, 0)


def _within(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Integers in another type; in a shorter one without the bits that it does not have."""
    import torch

    if kind in (torch.int32, torch.int64):
        return x.to(kind)
    least, count = torch.iinfo(kind).min, 2 ** torch.iinfo(kind).bits
    return (torch.remainder(x - least, count) + least).to(kind)


def _shifted(step: Callable[..., torch.Tensor], x: torch.Tensor, by: Any, bits: int) -> torch.Tensor:
    """Multiplied by, or divided by (rounded down), a power of 2."""
    import torch

    if not isinstance(by, torch.Tensor):
        for begin in range(0, by, _MOST):
            x = step(x, 2 ** min(_MOST, by - begin))
        return x
    powers = torch.tensor([2**count for count in range(_MOST + 1)], dtype=x.dtype)
    for _ in range(0, bits, _MOST):
        now = by.clamp(max=_MOST)
        x, by = step(x, powers[now.to(torch.int64)]), by - now
    return x


def _both(x: torch.Tensor, other: Any, bits: int) -> torch.Tensor:
    """The bits that both have."""
    import torch

    if not isinstance(other, torch.Tensor):
        return _masked(x, other, bits)
    powers = torch.tensor([2**bit for bit in range(_PIECE)], dtype=x.dtype)
    shared: list[torch.Tensor] = []
    for _ in range(0, bits, _PIECE):
        each = (torch.remainder(number, 2**_PIECE).unsqueeze(-1) for number in (x, other))
        one, two = (torch.remainder(torch.floor_divide(piece, powers), 2) for piece in each)
        shared.append((one * two * powers).sum(-1, dtype=x.dtype))
        x, other = (torch.floor_divide(number, 2**_PIECE) for number in (x, other))
    total: torch.Tensor = -(x * other)  # both are 0, or -1 below zero
    for piece in reversed(shared):
        total = total * 2**_PIECE + piece
    return total


def _masked(x: torch.Tensor, mask: int, bits: int) -> torch.Tensor:
    """The bits of `x` that a number has, one run of them after another."""
    import torch

    if mask < 0:
        return x - _masked(x, ~mask, bits)
    total = torch.zeros_like(x)
    for low, count in _runs(mask):
        part = torch.remainder(_shifted(torch.floor_divide, x, low, bits), 2**count)
        total = total + _shifted(torch.mul, part, low, bits)
    return total


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """Begin and length of the runs of ones in a number, none longer than `_MOST`."""
    low = 0
    while mask >> low:
        count = 0
        while count < _MOST and mask >> (low + count) & 1:
            count += 1
        if count:
            yield low, count
        low += max(count, 1)
