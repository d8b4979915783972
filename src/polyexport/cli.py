"""The command `polyexport`: what can be done with exports after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyexport.errors import PolyexportError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def main() -> None:
    """PyTorch models in deployment formats, proven against PyTorch."""


@app.command("wandb-link")
def wandb_link(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export, or a folder with exports in it.")],
) -> None:
    """Link the artifacts of offline runs to the W&B registry; run `wandb sync` first."""
    from polyexport.sinks.wandb import link

    try:
        linked = link(folder)
    except PolyexportError as error:
        typer.echo(f"polyexport: {error}", err=True)
        raise typer.Exit(1) from error
    for line in linked:
        typer.echo(line)


if __name__ == "__main__":
    app()
