"""Two exports side by side: what got worse from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from polyexport.report.outcome import STATES, Outcome
from polyexport.report.report import Report
from polyexport.report.tables import error, milliseconds, size


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest allowed ratios of later to earlier values; None for no limit.

    Attributes:
        slower: Of median latencies; checked only if both were measured on idle machines.
        larger: Of sizes.
        off: Of largest absolute errors; those below the noise floor count as that.
    """

    slower: float | None = None
    larger: float | None = None
    off: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """One format in both reports; None if one lacks it.

    `worse` says what is beyond the limits; empty if nothing is.
    """

    format: str
    before: Outcome | None
    now: Outcome | None
    worse: tuple[str, ...]


def compare(before: Report, now: Report, bounds: Bounds) -> list[Difference]:
    """Every format of either, in the order of the later one. A worse state is beyond any limits."""
    names = dict.fromkeys([*(each.format for each in now.outcomes), *(each.format for each in before.outcomes)])
    timed = before.is_quiet and now.is_quiet
    return [_difference(name, _of(before, name), _of(now, name), bounds, timed=timed) for name in names]


def _of(report: Report, name: str) -> Outcome | None:
    return next((each for each in report.outcomes if each.format == name), None)


def _difference(name: str, before: Outcome | None, now: Outcome | None, bounds: Bounds, *, timed: bool) -> Difference:
    worse = tuple(_worse(before, now, bounds, timed=timed)) if before else ()
    return Difference(name, before, now, worse)


def _worse(before: Outcome, now: Outcome | None, bounds: Bounds, *, timed: bool) -> Iterator[str]:
    if now is None:
        yield f"it is missing, and was {before.shown_state}"
        return
    if STATES.index(now.state) > STATES.index(before.state):
        yield f"{before.shown_state} became {now.shown_state}" + (f": {now.reason}" if now.reason else "")
    for what, limit, then, least, after, written in (
        ("slower", bounds.slower if timed else None, _p50(before), 0.0, _p50(now), milliseconds),
        ("larger", bounds.larger, _bytes(before), 0.0, _bytes(now), lambda value: size(int(value))),
        ("less exact", bounds.off, _error(before), _noise_floor(before), _error(now), error),
    ):
        if limit is not None and then is not None and after is not None and after > limit * max(then, least):
            yield f"{what}: {written(then)} became {written(after)}, more than {limit:g} times"


def _p50(outcome: Outcome) -> float | None:
    return outcome.latency.p50_ms if outcome.latency else None


def _bytes(outcome: Outcome) -> int | None:
    return outcome.artifact.bytes if outcome.artifact else None


def _error(outcome: Outcome) -> float | None:
    return outcome.parity.max_abs_error if outcome.parity else None


def _noise_floor(outcome: Outcome) -> float:
    """The effect of rounding alone, below which errors differ from machine to machine; 0 if it is unknown."""
    return (outcome.parity.noise_floor if outcome.parity else None) or 0.0


def untimed(before: Report, now: Report) -> str:
    """Why latencies are not compared; empty if they are."""
    if not (before.is_quiet and now.is_quiet):
        return "it was measured on a busy machine"
    timed = [{outcome.format for outcome in each.outcomes if outcome.latency} for each in (before, now)]
    return "" if timed[0] & timed[1] else "no format was timed in both exports"


def rows(differences: list[Difference]) -> list[dict[str, str]]:
    """A table with both values of each measure."""
    return [
        {
            "format": each.format,
            "state": _both(each, lambda outcome: outcome.shown_state),
            "p50 ms": _both(each, lambda outcome: milliseconds(_p50(outcome))),
            "size": _both(each, lambda outcome: size(_bytes(outcome))),
            "max error": _both(each, lambda outcome: error(_error(outcome))),
            "worse": "; ".join(each.worse),
        }
        for each in differences
    ]


def _both(each: Difference, write: Callable[[Outcome], str]) -> str:
    before, now = ("" if outcome is None else write(outcome) for outcome in (each.before, each.now))
    return before if before == now else f"{before or '–'} → {now or '–'}"
