"""What an artifact of low precision says of weights that stayed in float."""

from __future__ import annotations

_FLOAT_AT_MOST = 0.1


def left_in_float(in_float: int, total: int) -> str:
    """How many of `total` weights are in float, in words; empty where that is a tenth or less."""
    share = in_float / max(1, total)
    return f"{share:.0%} of its weights in float" if share > _FLOAT_AT_MOST else ""
