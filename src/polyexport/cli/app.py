"""The command `polyexport`: list formats, check this machine, export, and work with finished exports.

Requirements:
* Exit code 0: success; 1: something asked for is missing, wrong or does not run; 2: the command line is wrong.
* Every command prints JSON on request, on standard output; everything else goes to standard error.
* An error is one line; a traceback is a bug.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from polyexport.cli import artifact, export, exports, machine, toolchains
from polyexport.versions import versions

_HELP = {"help_option_names": ["-h", "--help"]}


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(" ".join(*versions(("lightning-export",)).items()))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
]


def main(version: Version = False) -> None:
    """PyTorch models in deployment formats, proven against PyTorch."""


class _Anywhere(TyperGroup):
    """Commands for every terminal; the encoding of one may lack characters, of help pages too."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)


def group(commands: Mapping[str, Callable[..., None]], **settings: Any) -> typer.Typer:
    """A command of commands, in this order, by name; without one its help is shown."""
    made = typer.Typer(no_args_is_help=True, context_settings=_HELP, **settings)
    for name, command in commands.items():
        made.command(name)(command)
    return made


app = group(
    {
        "formats": machine.formats,
        "doctor": machine.doctor,
        "export": export.export_checkpoint,
        "resume": export.resume,
        "verify": exports.verify,
        "bench": exports.bench,
        "report": exports.show_report,
        "explain": exports.explain,
        "compare": exports.compare,
        "run": artifact.run,
        "kit": artifact.kit,
        "accept": artifact.accept,
        "wandb-link": exports.wandb_link,
    },
    callback=main,
    cls=_Anywhere,
    pretty_exceptions_enable=False,
)
app.add_typer(
    group({"list": toolchains.list_toolchains, "install": toolchains.install, "remove": toolchains.remove}),
    name="toolchain",
    help="Environments that converters and runtimes are installed in.",
)
