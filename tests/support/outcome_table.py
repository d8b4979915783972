"""States of many models in many formats: kept as JSON lines, so that a run can be stopped, and written as a page.

The lines are in `outcomes/` beside this file and committed with the page, so that another machine goes on with them.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack

from polyexport.report.escape import markdown
from polyexport.report.tables import milliseconds, size

OUTCOMES = Path(__file__).parent / "outcomes"


class Measured(TypedDict):
    """What was measured of an artifact; what is missing was not.

    Attributes:
        bytes: Its size.
        weights_bytes: The size of the model's weights in float32.
        p50_ms: The median of its calls with one row on one thread; None where it cannot be timed here.
        eager_ms: The same of eager PyTorch, from the same rounds.
    """

    bytes: NotRequired[int]
    weights_bytes: NotRequired[int]
    p50_ms: NotRequired[float | None]
    eager_ms: NotRequired[float]


class Cell(Measured):
    """One format of one model."""

    state: str
    reason: str
    route: str


Cells = dict[str, dict[str, Cell]]
"""Model to format to cell."""


def cell(state: str, reason: str, route: str | None, **measured: Unpack[Measured]) -> Cell:
    return {"state": state, "reason": reason, "route": route or "", **measured}


def recorded(path: Path) -> Cells:
    """The results of earlier runs; a later line overrides earlier ones."""
    cells: Cells = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        cells.setdefault(entry["model"], {}).update(entry["cells"])
    return cells


def record(path: Path, model: str, cells: dict[str, Cell]) -> None:
    """Append the results of one model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_entry(model, cells))


def write(path: Path, cells: Cells) -> None:
    """Write all results anew, a line for each model."""
    path.write_text("".join(_entry(model, found) for model, found in sorted(cells.items())), encoding="utf-8")


def _entry(model: str, cells: dict[str, Cell]) -> str:
    return json.dumps({"model": model, "cells": cells}, sort_keys=True) + "\n"


def page(title: str, about: str, cells: Cells, models: Sequence[str], formats: Sequence[str]) -> str:
    """Markdown: one row per model, one column per format, and below it what was not verified, and why."""
    rows = [[model, *(_state(cells, model, name) for name in formats)] for model in models]
    totals = ["**verified**", *(share(_cells(cells, models, [name])) for name in formats)]
    return _page(title, about, cells, models, formats, ["model", *formats], [*rows, totals])


MARKS = {"verified": "✓", "degraded": "◐", "unverified": "○", "mismatch": "≠", "failed": "✗"}
"""The marks of the states where there are many columns."""


def page_by_format(title: str, about: str, cells: Cells, models: Sequence[str], formats: Sequence[str]) -> str:
    """Markdown: one row per format, one column per model with a mark for each state; below it the same as in `page`."""
    legend = ", ".join(f"{mark} `{state}`" for state, mark in MARKS.items())
    rows = [
        [f"`{name}`", *(MARKS.get(_state(cells, model, name), "–") for model in models), _verified(cells, models, name)]
        for name in formats
    ]
    text = _page(title, f"{about} {legend}.", cells, models, formats, ["format", *models, "verified"], rows)
    return text + "".join(f"{line}\n" for line in _measurements(cells, models, formats))


ABOUT_MEASURED = """\
Size relative to the model's weights in float32 / median of a call relative to eager PyTorch's, with one row and on one
thread, where no other program had the processor. An empty place was not measured, or there is no artifact, or its
runtime is not here. These models are tiny: most of a size is the graph, and most of a call is not arithmetic; see
[Precisions](precisions.md) and [Runtimes](runtimes.md) for trained and for larger ones."""


def _measurements(cells: Cells, models: Sequence[str], formats: Sequence[str]) -> list[str]:
    """The lines on size and latency: one row per format of which anything was measured; none if nothing was."""
    rows = [[f"`{name}`", *(_measured(cells.get(model, {}).get(name)) for model in models)] for name in formats]
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return []
    whole = ["float32 weights / eager ms", *(_whole(cells.get(model, {})) for model in models)]
    header = [_row(["format", *models]), _row(["---"] * (1 + len(models)))]
    return ["", "## Size and latency", "", ABOUT_MEASURED, "", *header, *map(_row, [whole, *rows])]


def _measured(found: Cell | None) -> str:
    """Relative size and latency of an artifact that agrees, or that only its device can run; else empty."""
    if found is None or found["state"] not in ARTIFACT:
        return ""
    smaller = _ratio(found.get("bytes"), found.get("weights_bytes"))
    faster = _ratio(found.get("p50_ms"), found.get("eager_ms"))
    return f"{smaller} / {faster}" if faster else smaller


ARTIFACT = ("verified", "degraded", "unverified")
"""The states of an artifact that is worth measuring."""


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.{0 if value >= 10 * whole else 2}f}" if value and whole else ""


def _whole(cells: dict[str, Cell]) -> str:
    """The size of a model's weights, and eager PyTorch's latency: the median over all runs."""
    weights = next((each["weights_bytes"] for each in cells.values() if "weights_bytes" in each), None)
    eager = [each["eager_ms"] for each in cells.values() if "eager_ms" in each]
    return " / ".join(filter(None, (size(weights), milliseconds(statistics.median(eager)) if eager else "")))


def _page(
    title: str,
    about: str,
    cells: Cells,
    models: Sequence[str],
    formats: Sequence[str],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    found = _cells(cells, models, formats)
    lines = [
        f"# {title}",
        "",
        about,
        "",
        f"{len(found)} of {len(models) * len(formats)} cells were run; {share(found)} of them are `verified`; `–` was "
        "not run.",
        "",
        _row(header),
        _row(["---"] * len(header)),
        *map(_row, rows),
        "",
        "## What was not verified",
        "",
        *(_others(cells, models, formats) or ["Nothing of what was run."]),
    ]
    return "\n".join(lines) + "\n"


def _cells(cells: Cells, models: Sequence[str], formats: Sequence[str]) -> list[Cell]:
    """Those of these cells that were run."""
    return [cells[model][name] for model in models for name in formats if _was_run(cells, model, name)]


def _was_run(cells: Cells, model: str, name: str) -> bool:
    return _state(cells, model, name) not in ("–", "skipped")


def _others(cells: Cells, models: Sequence[str], formats: Sequence[str]) -> list[str]:
    """One line per reason, with all models that have it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for model in models:
        for name in formats:
            if (state := _state(cells, model, name)) not in ("verified", "–"):
                found.setdefault((name, state, _line(cells[model][name]["reason"])), []).append(model)
    everywhere = [*models]
    return [
        f"* {name}, {'all models' if which == everywhere else ', '.join(which)}: {state}: {reason}"
        for (name, state, reason), which in found.items()
    ]


def _verified(cells: Cells, models: Sequence[str], name: str) -> str:
    found = _cells(cells, models, [name])
    return f"{sum(each['state'] == 'verified' for each in found)}/{len(found)}" if found else "–"


def share(cells: Iterable[Cell]) -> str:
    """The number and share of verified cells among those that were run."""
    states = Counter(each["state"] for each in cells)
    return f"{states['verified']}/{states.total()} ({states['verified'] / states.total():.1%})" if states else "–"


def _state(cells: Cells, model: str, name: str) -> str:
    return cells.get(model, {}).get(name, cell("–", "", None))["state"]


def _row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _line(reason: str, longest: int = 300) -> str:
    """A reason as an item of a Markdown list: one line, in which nothing reads as a tag or a link."""
    return markdown(textwrap.shorten(reason, longest, placeholder=" …"))
