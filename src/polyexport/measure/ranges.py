"""Ranges of tensors that are wide enough for integers: of one that is 0 in all batches, any scale is right but 0.

XNNPACK and LiteRT refuse a layer whose output has a scale far below those of its input and weights, and a sum of which
an operand has a scale below 1/1024 of the sum's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Range = tuple[float, float]
"""The least and the greatest element."""


class Step(NamedTuple):
    """An operator: the tensors that it reads, the one that it makes, and whether it adds or subtracts them."""

    inputs: Sequence[str]
    output: str
    is_sum: bool


LEAST = float(np.finfo(np.float32).eps)
"""A tensor is taken for 0 if no element of it is larger."""

_SHARE = 1 / 512
"""The least width of an operand's range, as a share of the sum's."""


def too_narrow(ranges: Mapping[str, Range], steps: Iterable[Step]) -> dict[str, float]:
    """The tensors whose ranges have to reach further, and the greatest element that they have to include.

    Args:
        ranges: The range of each tensor, by name.
        steps: The operators in the order of computation; tensors without a range are skipped.
    """
    steps = list(steps)
    wide = {name: max(most, 0.0) - min(least, 0.0) for name, (least, most) in ranges.items()}
    found: dict[str, float] = {}

    def widen(name: str, width: float) -> None:
        if wide[name] < width:
            found[name] = wide[name] = width

    for step in steps:
        if wide.get(step.output, 1.0) <= LEAST:
            widen(step.output, max([wide[name] for name in step.inputs if name in wide], default=0.0) or 1.0)
    for name in (name for name in wide if wide[name] <= LEAST):
        widen(name, 1.0)
    for step in (step for step in steps if step.is_sum and step.output in wide):
        width = wide[step.output]
        for name in (name for name in step.inputs if name in wide):
            widen(name, width * _SHARE)
            if name in found:  # which may be any width up to the sum's
                found[name] = wide[name] = min(wide[name], width)
    return found
