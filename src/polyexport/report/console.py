"""Output on a terminal: the table, and progress while waiting."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.errors import LiveError
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from polyexport import errors
from polyexport.report import escape
from polyexport.report.report import Report, columns, metrics, proofs, rows
from polyexport.report.tables import NUMBERS

T = TypeVar("T")

_STYLES = {
    "verified": "green",
    "degraded": "yellow",
    "unverified": "yellow",
    "mismatch": "red",
    "failed": "red",
    "skipped": "dim",
    "baseline": "dim",
}


_UNBOUND = 10_000


def standard() -> Console:
    """Standard output; if it is not a terminal, a table has each row in one line, with nothing cut off."""
    console = Console()
    is_shown = console.is_terminal or console.is_jupyter or os.environ.get("COLUMNS")
    return console if is_shown else Console(width=_UNBOUND)


_DROPPED = ("route", "noise floor", "p95 ms", "batch-1 ms")
"""The columns that a narrow terminal has no room for, in the order in which they go; the report's page has them."""


def table(report: Report, width: int) -> Table:
    """The report as a table; empty columns are left out, and reasons are printed below it (see `show`).

    Columns are dropped while it is wider than `width`, in characters: a number that is cut off says nothing.
    """
    wide = Console(width=_UNBOUND)
    for dropped in range(len(_DROPPED) + 1):
        drawn = _table(report, {"reason", *_DROPPED[:dropped]})
        if wide.measure(drawn).maximum <= width:
            break
    return drawn


def _table(report: Report, left_out: set[str]) -> Table:
    found = rows(report)
    shown = [column for column in columns(report) if column not in left_out and any(row[column] for row in found)]
    at = f", latency at batch {report.baseline.batch}" if report.baseline else ""
    title = Text(escape.printable(report.folder.name) + at)
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        justify: Literal["left", "right"] = "right" if column in NUMBERS else "left"
        header = column.replace(" ", "\n").replace("-up", "-\nup")
        drawn.add_column(header, justify=justify, no_wrap=True)
    for row in found:
        # as Text, since a table reads strings as markup
        drawn.add_row(*(Text(row[column]) for column in shown), style=_STYLES[row["state"].split()[0]])
    return drawn


def _plain(title: str, found: Sequence[Mapping[str, str]]) -> Table:
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in found[0]:
        header = Text(escape.printable(column))
        drawn.add_column(header, justify="left" if column == "format" else "right", overflow="fold")
    for row in found:
        drawn.add_row(*map(Text, map(escape.printable, row.values())))
    return drawn


def show(report: Report, console: Console | None = None) -> None:
    """Print the table, the reasons, the notes and the folder."""
    console = console or standard()
    _print(console, table(report, console.width))
    if report.metrics:
        _print(console, _plain("validation metrics", metrics(report)))
    if elsewhere := proofs(report):
        _print(console, _plain("on other machines", elsewhere))
    lines = [f"{outcome.format}: {outcome.reason}" for outcome in report.outcomes if outcome.reason]
    lines += [f"note: {note}" for note in report.notes]
    for line in (*lines, f"export: {report.folder}", f"report: {report.folder / 'report.html'}"):
        say(console, line)


def wait(
    work: Future[T],
    doing: Callable[[], Mapping[str, str]],
    told: deque[str] | None = None,
    console: Console | None = None,
) -> T:
    """Wait for `work`, with a progress line for each thing being done, and print the lines that arrive in `told`.

    If the display fails, as on a closed terminal, waiting goes on.
    """
    try:
        _follow(work, doing, deque() if told is None else told, console)
    except (Exception, SystemExit) as error:  # rich exits the program if its pipe is closed
        if errors.is_of_a_signal(error):
            raise
        errors.warn(f"the progress cannot be shown: {errors.line(error)}")
    return work.result()


def _follow(work: Future[T], doing: Callable[[], Mapping[str, str]], told: deque[str], console: Console | None) -> None:
    what = TextColumn("{task.fields[name]:<14} {task.description}", markup=False)
    columns = (SpinnerColumn(), what, TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    with contextlib.ExitStack() as shown:
        with contextlib.suppress(LiveError):  # rich < 14.1 allows one display at a time, and the trainer's still exists
            shown.enter_context(progress)
        lines: dict[str, TaskID] = {}
        while not work.done() or told:
            while told:
                say(progress.console, told.popleft())
            now = doing()
            for name in set(lines) - set(now):
                progress.remove_task(lines.pop(name))
            for name, doing_now in now.items():
                if name not in lines:
                    lines[name] = progress.add_task(doing_now, total=None, name=name)
                progress.update(lines[name], description=doing_now)
            time.sleep(0.1)


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line unchanged: long paths are not wrapped, brackets are not markup, escape sequences have no effect."""
    _print(console, escape.printable(line), style=style, highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, shown: Any, **how: Any) -> None:
    """Print; what the terminal's encoding lacks is shown as `?`."""
    if console.encoding.startswith("utf"):
        console.print(shown, **how)
        return
    with console.capture() as captured:
        console.print(shown, **how)
    console.file.write(captured.get().encode(console.encoding, "replace").decode(console.encoding))
