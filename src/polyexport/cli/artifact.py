"""Commands for one artifact of an export: run it here, or prove it on another machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from polyexport.cli.options import Json, Trust, report_in
from polyexport.cli.output import conclude, one_line_errors, print_json, show
from polyexport.engine import checkpoint
from polyexport.engine.engine import Engine
from polyexport.errors import BadRequest
from polyexport.load import described
from polyexport.report.folders import DESCRIPTION, followed
from polyexport.spec import Runner, write_arrays


def run(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A format's folder in an export, or the artifact in it.")
    ],
    inputs: Annotated[Path, typer.Option(help="An .npz with the inputs by name.")],
    output: Annotated[Path | None, typer.Option(help="An .npz for the outputs.")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an artifact in its own toolchain, and print its outputs; with --json all values."""
    with one_line_errors(), Engine() as engine:
        with _opened(engine, artifact.absolute(), trust=trust) as runner:
            found = runner(checkpoint.inputs(inputs))
        if output is not None:
            write_arrays(output, found)
    if as_json:
        print_json({name: array.tolist() for name, array in found.items()})
        return
    show([{"output": name, "dtype": str(a.dtype), "shape": str(list(a.shape))} for name, a in found.items()], False)


def kit(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A format's folder in an export, or the artifact in it.")
    ],
    into: Annotated[
        Path | None,
        typer.Option(help="The folder or archive to make; by default EXPORT-FORMAT-kit in the working folder."),
    ] = None,
    archive: Annotated[bool, typer.Option("--zip", help="Make a .zip archive.")] = False,
    as_json: Json = False,
) -> None:
    """Make a kit: a folder that verifies and times an artifact on a machine that has only its runtime, such as a Mac.

    The kit writes a `proof.json` there, for `accept`.
    """
    from polyexport.kit.make import make

    with one_line_errors():
        made = make(artifact, into, archive=archive)
    if as_json:
        print_json({"kit": str(made)})
    else:
        typer.echo(str(made))


def accept(
    proof: Annotated[Path, typer.Argument(metavar="PROOF", help="The proof.json that a kit wrote.")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The export, or a folder that contains it; by default this one.")
    ] = Path(),
    run: Annotated[
        str | None,
        typer.Option("--wandb", metavar="PROJECT/RUN", help="Publish the report to this W&B run again."),
    ] = None,
    registry: Annotated[str | None, typer.Option(help="Link verified artifacts to this W&B registry.")] = None,
    as_json: Json = False,
) -> None:
    """Add the proof of a kit from another machine to the report; exit code 1 if the artifact does not agree there."""
    from polyexport.kit.accept import accept
    from polyexport.publish.wandb import publish_into

    with one_line_errors():
        if registry is not None and run is None:
            raise BadRequest("--registry needs a run to publish to; give --wandb PROJECT/RUN too")
        report, name = accept(proof, folder)
        if run is not None:
            publish_into(report, run, registry)
    conclude(report, [report[name]], as_json)


def _opened(engine: Engine, artifact: Path, *, trust: bool) -> contextlib.AbstractContextManager[Runner]:
    """A runner of an artifact in its export, or of one whose folder was copied elsewhere."""
    folder = artifact.parent if (artifact.parent / DESCRIPTION).is_file() else artifact
    if (folder / DESCRIPTION).is_file() and not (followed(folder.parent) / "report.json").is_file():
        return engine.opened(artifact, trust=trust)
    try:
        report = report_in(folder.parent)
    except BadRequest:
        described(artifact)  # says what is wrong with the given path
        raise
    return engine.runner(report, folder.name, trust=trust)
