"""States of many models in many formats: kept as JSON lines, so that a run can be stopped, and written as a page.

The lines are in `outcomes/` beside this file and committed with the page, so that another machine goes on with them.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from polyexport.report.escape import markdown

OUTCOMES = Path(__file__).parent / "outcomes"

Cell = dict[str, str]
"""`state`, `reason` and `route` of one format of one model."""
Cells = dict[str, dict[str, Cell]]
"""Model to format to cell."""


def cell(state: str, reason: str, route: str | None) -> Cell:
    return {"state": state, "reason": reason, "route": route or ""}


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
    return _page(title, f"{about} {legend}.", cells, models, formats, ["format", *models, "verified"], rows)


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
