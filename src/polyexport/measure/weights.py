"""Remarks on weights and operators that stay in float in a low precision: one rule for all formats.

A runtime has float operators besides those in low precision, so staying in float is not an error: it is a remark if the
share is above `_WORTH_A_WORD`. It is a shortfall if most of the weights stay in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_WORTH_A_WORD = 0.1
_MOST = 0.5


@dataclass(frozen=True, slots=True)
class InFloat:
    """What stays in float, in words: as a `remark` of an artifact, or as its `shortfall` (see `Loaded`)."""

    remark: str = ""
    shortfall: str = ""


def in_float(weights: int, total: int, why: str = "", *also: str) -> InFloat:
    """The remark and shortfall of `weights` in float out of `total`, both numbers of elements.

    Args:
        weights: Elements of weights in float.
        total: Elements of all weights.
        why: The reason to give with a share above `_WORTH_A_WORD`.
        also: Further remarks, such as operators that compute in float.
    """
    share = weights / max(1, total)
    told = f"{share:.0%} of its weights in float{why and f', {why}'}" if share > _WORTH_A_WORD else ""
    is_most = share > _MOST
    remarks = (*also, "" if is_most else told)
    return InFloat("; ".join(filter(None, remarks)), told if is_most else "")


def in_four_bits(four: int, eight: int, in_floats: int, why: str = "", *also: str) -> InFloat:
    """The remark and shortfall of an artifact with weights in 4 bits: it is a shortfall if most are not.

    Args:
        four: Elements of weights in 4 bits.
        eight: Elements of weights in 8 bits.
        in_floats: Elements of weights in float.
        why: The reason to give with those in float.
        also: Further remarks.
    """
    total = max(1, four + eight + in_floats)
    shares = f"{four / total:.0%} of its weights in 4 bits, {eight / total:.0%} in 8 bits"
    is_most = four >= _MOST * total
    left = in_float(in_floats, total, why, shares if is_most else "", *also)
    return InFloat(left.remark, "; ".join(filter(None, ("" if is_most else shares, left.shortfall))))


def is_weight(shape: Iterable[int]) -> bool:
    """Whether a constant is a weight: it has more than one axis of size above 1, unlike a bias or a scale."""
    return sum(size > 1 for size in shape) > 1


def counted(operators: Mapping[str, int]) -> str:
    """The count of each operator, in words: `2 × Conv, 1 × Gemm`."""
    return ", ".join(f"{count} × {name}" for name, count in sorted(operators.items()))
