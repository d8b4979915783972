"""Which artifact to ship to each target, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from polyexport.format import Target
from polyexport.formats import by_target, known
from polyexport.report.outcome import STATES, Outcome
from polyexport.report.report import Report
from polyexport.report.tables import error, milliseconds, size

_TIMED_HERE: tuple[Target, ...] = ("server CPU", "GPU")
"""Targets for which latency on this machine matters; for others the smallest artifact is chosen."""


_ALIKE = 1.05
"""Artifacts up to this ratio of the least size or time count as alike; the one that was asked for first is chosen."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The artifact to ship to a target.

    Attributes:
        target: What it will run on.
        outcome: The format; None if no artifact for that target agrees with PyTorch.
        why: The reason for the choice, or why there is none, in a line.
    """

    target: Target
    outcome: Outcome | None
    why: str


def choices(report: Report) -> Iterator[Choice]:
    """The artifact for each target that a format was asked for; `verified` ones are preferred.

    For servers it is the fastest, if latency was measured on an idle machine, else the smallest. Of those that are
    alike in that it is the first.
    """
    ours = (known()[each.format] for each in report.outcomes if each.format in known())
    for target, formats in by_target(ours).items():
        asked = [report[each.name] for each in formats]
        agreed = [each for each in asked if each.publishable]
        if not agreed:
            yield Choice(target, None, "; ".join(map(_state, asked)))
            continue
        best = min((each.state for each in agreed), key=STATES.index)
        fitting = [each for each in agreed if each.state == best]
        by_time = target in _TIMED_HERE and report.is_quiet and all(each.latency for each in fitting)
        cost = _time if by_time else _bytes
        least = min(map(cost, fitting))
        chosen = next(each for each in fitting if cost(each) <= _ALIKE * least)
        yield Choice(target, chosen, _why(chosen, len(fitting), by_time=by_time, is_alike=cost(chosen) > least))


def _state(outcome: Outcome) -> str:
    """The state of a format that cannot be shipped yet, with what to do if only its device is missing."""
    each = known()[outcome.format]
    kit = ": verify it there with polyexport kit" if outcome.state == "unverified" and each.on_device else ""
    return f"{outcome.format} is {outcome.shown_state}{kit}"


def _time(outcome: Outcome) -> float:
    return outcome.latency.p50_ms if outcome.latency else math.inf


def _bytes(outcome: Outcome) -> float:
    return outcome.artifact.bytes if outcome.artifact else math.inf


def _why(chosen: Outcome, among: int, *, by_time: bool, is_alike: bool) -> str:
    made = chosen.artifact.bytes if chosen.artifact else None
    most = f"{'about the ' if is_alike else ''}{'fastest' if by_time else 'smallest'}"
    parts = [f"{most} of {among} {chosen.state}" if among > 1 else f"the only one {chosen.state}"]
    if by_time and chosen.latency:
        factor = f", {chosen.latency.speedup:.2f}× PyTorch" if chosen.latency.speedup else ""
        parts.append(f"p50 {milliseconds(chosen.latency.p50_ms)} ms{factor}")
    parts.append(size(made))
    if chosen.parity and chosen.parity.max_abs_error is not None:
        parts.append(f"max error {error(chosen.parity.max_abs_error)}")
    if chosen.state != "verified":
        parts.append(chosen.reason)
    if chosen.shown_state != chosen.state:
        parts.append("not run on the device: verify it there with polyexport kit")
    return "; ".join(parts)
