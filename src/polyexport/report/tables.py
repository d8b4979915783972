"""Formatting of values: the columns of every table, numbers in their units, the line about one format."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from polyexport.measure.layers import Layer, first, worst
from polyexport.report import escape
from polyexport.report.outcome import Model, Outcome

Figure = str | int | float | None


def milliseconds(value: float | None) -> str:
    """Three digits, without the unit."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def error(value: float | None) -> str:
    """Two digits and the power of ten; `0` for bit-equal."""
    return "" if value is None else f"{value:.1e}" if value else "0"


def size(count: int | None) -> str:
    """Bytes in a suitable unit: `1.6 MB` (powers of 1000)."""
    if count is None:
        return ""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} B"


def sentence(outcome: Outcome) -> str:
    """One line about a finished format: `onnx (dynamo): verified in 4.1 s, 93.2 kB`."""
    route = f" ({outcome.route})" if outcome.route else ""
    spent = f" in {sum(outcome.seconds.values()):.1f} s" if outcome.seconds else ""
    made = f", {size(outcome.artifact.bytes)}" if outcome.artifact and outcome.artifact.bytes else ""
    because = f": {outcome.reason.splitlines()[0]}" if outcome.reason else ""
    return escape.printable(f"{outcome.format}{route}: {outcome.shown_state}{spent}{made}{because}")


def figures(outcome: Outcome) -> dict[str, Figure]:
    """The values of one format by name; None if not measured."""
    artifact, parity, latency = outcome.artifact, outcome.parity, outcome.latency
    return {
        "format": outcome.format,
        "precision": outcome.precision,
        "state": outcome.shown_state,
        "route": outcome.route,
        "bytes": artifact.bytes if artifact else None,
        "max_abs_error": parity.max_abs_error if parity else None,
        "noise_floor": parity.noise_floor if parity else None,
        "batch": latency.batch if latency else None,
        "p50_ms": latency.p50_ms if latency else None,
        "p90_ms": latency.p90_ms if latency else None,
        "p95_ms": latency.p95_ms if latency else None,
        "p99_ms": latency.p99_ms if latency else None,
        "batch_1_p50_ms": latency.batch_1_p50_ms if latency else None,
        "throughput_per_second": latency.throughput_per_second if latency else None,
        "speedup": latency.speedup if latency else None,
        "reason": outcome.reason,
    }


Column = tuple[str, Callable[[Any], str]]
"""The name of a value, and how it is formatted."""

CHANGE = "metric change"
"""The column that is in the table only if there is a budget."""

COLUMNS: Mapping[str, Column] = {
    "format": ("format", str),
    "state": ("state", str),
    "route": ("route", lambda route: route or ""),
    "size": ("bytes", size),
    "max error": ("max_abs_error", error),
    "noise floor": ("noise_floor", error),
    CHANGE: ("metric_change", lambda change: change or ""),
    "p50 ms": ("p50_ms", milliseconds),
    "p95 ms": ("p95_ms", milliseconds),
    "batch-1 ms": ("batch_1_p50_ms", milliseconds),
    "speed-up": ("speedup", lambda factor: f"{factor:.2f}×" if factor else ""),
    "reason": ("reason", str),
}
"""The columns of the terminal's table, `report.md`'s and the page's: the name of a value, and how it is formatted."""


def _number(figure: str) -> Callable[[Outcome], Any]:
    return lambda outcome: figures(outcome)[figure]


NUMBERS: Mapping[str, Callable[[Outcome], float | None]] = {
    column: _number(figure)
    for column, (figure, _) in COLUMNS.items()
    if column not in ("format", "state", "route", CHANGE, "reason")
}
"""The values of the columns with numbers."""


def written(row: Mapping[str, Figure], columns: Mapping[str, Column] = COLUMNS) -> dict[str, str]:
    """A row of values, formatted for a table."""
    return {name: escape.printable(write(row[figure])) for name, (figure, write) in columns.items()}


def change(value: float | None, beside: float | None) -> str:
    """A metric's difference from PyTorch's, with its sign; a question mark if either is not a finite number."""
    if value is None or beside is None or not math.isfinite(value - beside):
        return "?"
    return f"{value - beside:+.2g}" if value != beside else "0"


def metric(value: float | None, beside: float | None = None) -> str:
    """A value of the user's own metric, and its difference from `beside`; empty if it is not a finite number."""
    if value is None or not math.isfinite(value):
        return ""
    if beside is None or not math.isfinite(beside):
        return f"{value:.6g}"
    return f"{value:.6g} ({value - beside:+.1e})"


def layers(found: Sequence[Layer]) -> list[dict[str, str]]:
    """A table of a module's layers: the artifact's tensor, the error, and which are the first and the worst."""
    marks = {id(worst(found)): "worst", id(first(found)): "first beyond tolerance"}
    return [
        {
            "layer": escape.printable(each.shown_name),
            "shape": "×".join(map(str, each.shape)),
            "error": error(each.error),
            "is": marks.get(id(each), "beyond tolerance") if each.reason else "",
            "in the artifact": escape.printable(each.tensor),
            "why": escape.printable(each.reason),
        }
        for each in found
    ]


def embedded(model: Model, outcomes: Sequence[Outcome]) -> str:
    """What is embedded in each artifact: `labels: cat, dog; license: MIT`; empty if nothing."""
    shown = ", ".join(model.labels[:_LABELS]) + (f" … ({len(model.labels)})" if len(model.labels) > _LABELS else "")
    steps = {name: _step(name, text, outcomes) for name, text in model.processing.items()}
    own = {"labels": shown} if model.labels else {}
    texts = {name: text if len(text) <= _STEP else f"{text[:_STEP]} …" for name, text in model.metadata.items()}
    parts = {**own, **texts, **own, **steps}  # an entry of the user's that is called labels is not embedded then
    return escape.printable("; ".join(f"{name}: {text}" for name, text in parts.items()))


def _step(name: str, text: str, outcomes: Sequence[Outcome]) -> str:
    """A processing step in words, with the formats whose artifacts lack it."""
    lacking = ", ".join(outcome.format for outcome in outcomes if name in outcome.outside)
    return textwrap.shorten(text, _STEP, placeholder=" …") + (f" (not in {lacking})" if lacking else "")


_LABELS = 10
"""How many labels are shown."""
_STEP = 160
"""How many characters of an entry, or of a step before or after forward, are shown."""


def markdown(table: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The lines of a Markdown table; the keys of the first row are its header."""
    yield "| " + " | ".join(map(escape.markdown, table[0])) + " |"
    yield "|" + "---|" * len(table[0])
    for row in table:
        yield "| " + " | ".join(map(escape.markdown, row.values())) + " |"
