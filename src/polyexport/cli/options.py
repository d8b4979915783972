"""Arguments and options that several commands have, and what they stand for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polyexport.cli.output import one_line_errors
from polyexport.errors import BadRequest
from polyexport.format import Format
from polyexport.formats import known, resolve
from polyexport.report.folders import BEST, EXPORTS, followed
from polyexport.report.report import Report
from polyexport.workers import toolchain


def formats_starting(incomplete: str) -> list[str]:
    """The names of formats that a shell completes an argument to."""
    return [name for name in known() if name.startswith(incomplete)]


def toolchains_starting(incomplete: str) -> list[str]:
    """The names of toolchains that a shell completes an argument to."""
    return [name for name in toolchain.names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
FOLDER = "An export; or a folder of exports, or of a run with them: the best of them."
Folder = Annotated[Path, typer.Argument(metavar="DIR", help=FOLDER)]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Unpickle files of the export, which may run any code. Only if you trust its author."),
]
FormatNames = Annotated[
    list[str] | None, typer.Argument(metavar="FORMAT…", help="By default all.", autocompletion=formats_starting)
]
ToolchainNames = Annotated[list[str], typer.Argument(metavar="NAME…", autocompletion=toolchains_starting)]


def resolved(names: Sequence[str] | None) -> tuple[Format, ...]:
    """The formats of these names, or all; an unknown name ends the command."""
    with one_line_errors():
        return resolve(names) if names else tuple(known().values())


def import_from_here() -> None:
    """Let an export's module be imported from the working folder, as for `python -m`; what is installed comes first."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def report_in(folder: Path) -> Report:
    """The report in a folder, or in the best export of it or of the run in it.

    Raises:
        BadRequest: there is none.
    """
    for candidate in (folder, folder / BEST, folder / EXPORTS / BEST):
        if (followed(candidate) / "report.json").is_file():
            return Report.load(candidate)
    raise BadRequest(f"{folder} is neither an export nor a folder with a best one: there is no report.json")
