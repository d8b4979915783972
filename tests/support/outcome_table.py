"""States of many models in many formats: kept as JSON lines, so that a run can be stopped, and written as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

Cell = dict[str, str]
"""`state`, `reason` and `route` of one format of one model."""
Cells = dict[str, dict[str, Cell]]
"""Model to format to cell."""


def cell(state: str, reason: str, route: str | None) -> Cell:
    return {"state": state, "reason": reason, "route": route or ""}


def recorded(path: Path) -> Cells:
    """What earlier runs found; the newest line has the last word."""
    cells: Cells = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        cells.setdefault(entry["model"], {}).update(entry["cells"])
    return cells


def record(path: Path, model: str, cells: dict[str, Cell]) -> None:
    """Add what was found of one model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"model": model, "cells": cells}) + "\n")


def page(title: str, about: str, cells: Cells, models: Sequence[str], formats: Sequence[str]) -> str:
    """Markdown: a row a model, a column a format, and below it what was not verified, and why."""
    found = [(model, name, cells[model][name]) for model in models for name in formats if name in cells.get(model, {})]
    rows = [[model, *(_state(cells, model, name) for name in formats)] for model in models]
    totals = ["**verified**", *(share(each for _, name, each in found if name == column) for column in formats)]
    lines = [
        f"# {title}",
        "",
        about,
        "",
        f"{len(found)} of {len(models) * len(formats)} cells were run; {share(each for *_, each in found)} of them "
        "are `verified`; `–` was not run.",
        "",
        _row(["model", *formats]),
        _row(["---"] * (len(formats) + 1)),
        *map(_row, [*rows, totals]),
        "",
        "## What was not verified",
        "",
        *(_others(found) or ["Nothing of what was run."]),
    ]
    return "\n".join(lines) + "\n"


def _others(found: Iterable[tuple[str, str, Cell]]) -> list[str]:
    return [
        f"* {model}, {name}: {each['state']}: {_line(each['reason'])}"
        for model, name, each in found
        if each["state"] != "verified"
    ]


def share(cells: Iterable[Cell]) -> str:
    """How many are verified, of how many that were run."""
    states = Counter(each["state"] for each in cells)
    return f"{states['verified']}/{states.total()} ({states['verified'] / states.total():.1%})" if states else "–"


def _state(cells: Cells, model: str, name: str) -> str:
    return cells.get(model, {}).get(name, cell("–", "", None))["state"]


def _row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _line(reason: str, longest: int = 300) -> str:
    """A reason as a part of a Markdown list: one line, and nothing in it that is taken for a tag."""
    line = " ".join(reason.replace("<", "&lt;").split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
