"""What an artifact of low precision says of weights and operators that stayed in float: one rule for all formats.

A runtime has float operators beside those in low precision, so what stays float is no fault: it is a remark, where it
is more than `_WORTH_A_WORD`. It is a shortfall where most of the weights stayed as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_WORTH_A_WORD = 0.1
_MOST = 0.5


@dataclass(frozen=True, slots=True)
class InFloat:
    """What stayed in float, in words: as a `remark` of an artifact, or as its `shortfall` (see `Loaded`)."""

    remark: str = ""
    shortfall: str = ""


def in_float(weights: int, total: int, why: str = "", *also: str) -> InFloat:
    """What is said of `weights` in float out of `total`, both in numbers.

    Args:
        weights: Those in float.
        total: All of them.
        why: Said of a share that is worth a word.
        also: What else is to be remarked, such as operators that compute in float.
    """
    share = weights / max(1, total)
    told = f"{share:.0%} of its weights in float{why and f', {why}'}" if share > _WORTH_A_WORD else ""
    is_most = share > _MOST
    remarks = (*also, "" if is_most else told)
    return InFloat("; ".join(filter(None, remarks)), told if is_most else "")


def is_weight(shape: Iterable[int]) -> bool:
    """Whether a constant is one: it has several numbers along more than one axis, as a bias or a scale has not."""
    return sum(size > 1 for size in shape) > 1


def counted(operators: Mapping[str, int]) -> str:
    """How many there are of each operator, in words: `2 × Conv, 1 × Gemm`."""
    return ", ".join(f"{count} × {name}" for name, count in sorted(operators.items()))
