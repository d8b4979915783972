"""What commands print, and the code that they exit with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyexport.engine.engine import Engine
from polyexport.errors import PolyexportError
from polyexport.report import console
from polyexport.report.escape import printable
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report
from polyexport.serialization import encode

T = TypeVar("T")


_out, _err = Console(), Console(stderr=True)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors as one line, and exit: with 2 for a bad request, 1 for what this machine cannot do."""
    try:
        yield
    except (PolyexportError, OSError) as error:
        console.say(_err, " ".join(f"polyexport: {error}".splitlines()), style="red")
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def waited(engine: Engine, work: Callable[[Report], T], report: Report) -> T:
    """The result of `work` on a report; what the engine is doing is shown until then."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return console.wait(pool.submit(work, report), lambda: engine.doing, console=_err)
        except BaseException:
            engine.close()  # ends what the pool would wait for
            raise


def heading(text: str) -> None:
    """Print the heading of a table to standard output."""
    _out.print(Text(text, style="bold underline"))


def say(line: str) -> None:
    """Print a line to standard error."""
    console.say(_err, line)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if there are artifacts and all agree, else 1."""
    return 0 if outcomes and all(outcome.publishable for outcome in outcomes) else 1


def conclude(report: Report, judged: Sequence[Outcome], as_json: bool) -> None:
    """Show the report; exit with code 0 if all of `judged` agree, else 1."""
    if as_json:
        print_json(encode(report))
    else:
        console.show(report)
    raise typer.Exit(exit_code(judged))


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    typer.echo(json.dumps(value, indent=2))


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print rows with the same keys to standard output: as JSON, or as a table with a column for each key."""
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold", style="bold" if column == next(iter(rows[0])) else None)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.standard().print(table)


def _cell(value: Any) -> Text:
    return Text("yes" if value is True else "no" if value is False else printable(str(value)))
