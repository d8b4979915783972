"""What an artifact of low precision says of weights and operators that stayed in float."""

from __future__ import annotations

from collections.abc import Mapping

_FLOAT_AT_MOST = 0.1


def left_in_float(in_float: int, total: int) -> str:
    """How many of `total` weights are in float, in words; empty where that is a tenth or less."""
    share = in_float / max(1, total)
    return f"{share:.0%} of its weights in float" if share > _FLOAT_AT_MOST else ""


def counted(operators: Mapping[str, int]) -> str:
    """How many there are of each operator, in words: `2 × Conv, 1 × Gemm`."""
    return ", ".join(f"{count} × {name}" for name, count in sorted(operators.items()))
