"""Commands that make an export without a trainer, or finish one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polyexport.capture.selection import selected
from polyexport.cli.options import Json, Trust, formats_starting
from polyexport.cli.output import conclude, one_line_errors, say
from polyexport.engine import checkpoint
from polyexport.engine.engine import Engine
from polyexport.engine.export import export
from polyexport.engine.request import interrupted
from polyexport.errors import BadRequest
from polyexport.formats import resolve
from polyexport.report.folders import EXPORTS


def export_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Lightning checkpoint, or a state dict.")],
    model: Annotated[
        str, typer.Option(help="The model's class, or a function that makes it: package.module:Name, or file.py:Name.")
    ],
    inputs: Annotated[Path, typer.Option(help="An .npz with forward's arguments by name: real data.")],
    formats: Annotated[str, typer.Option("--formats", "-f", help="Comma-separated.", autocompletion=formats_starting)],
    into: Annotated[Path, typer.Option(help="Folder that becomes the export.")] = Path("export"),
    arguments: Annotated[str, typer.Option(help="Keyword arguments of the class, as JSON.")] = "{}",
    module: Annotated[str | None, typer.Option(help="The part of the model to export, such as model.backbone.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Another .npz to calibrate int8 with; may be repeated.")
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT:AXIS=NAME", help="A dynamic axis; may be repeated. By default the batch axis."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix the batch size.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Unpickle what the checkpoint has besides tensors.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one conversion or verification may take.")] = 600.0,
    labels: Annotated[Path | None, typer.Option(help="A file of class names to embed, one per line.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="Metadata to embed; may be repeated.")
    ] = None,
    preprocess: Annotated[
        str | None, typer.Option(help="Turns raw inputs into forward's: package.module:Name or file.py:Name.")
    ] = None,
    postprocess: Annotated[
        str | None, typer.Option(help="Turns forward's outputs into the artifact's. Both become part of each artifact.")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Time each artifact beside PyTorch.")] = True,
    as_json: Json = False,
) -> None:
    """Export a checkpoint without a trainer, verify each artifact and time it; exit code 1 if one does not agree."""
    with one_line_errors():
        if static and dynamic:
            raise BadRequest("--static and --dynamic are mutually exclusive")
        names = [name.strip() for name in formats.split(",")]
        resolve(names)  # unknown names are refused before anything is loaded
        blob = checkpoint.read(path, trust=trust)
        made = selected(checkpoint.model(path, blob, model, checkpoint.arguments(arguments)), module)
        given, *further = [_tensors(file) for file in (inputs, *(calibration or ()))]
        report = export(
            made,
            given,
            names,
            into,
            dynamic=checkpoint.dynamic(dynamic) if dynamic else not static,
            calibration=further,
            timeout=timeout,
            progress=say,
            checkpoint=checkpoint.record(path, blob),
            labels=checkpoint.lines(labels) if labels else (),
            metadata=checkpoint.metadata(metadata or ()),
            preprocess=checkpoint.step(preprocess),
            postprocess=checkpoint.step(postprocess),
            bench=bench,
        )
    conclude(report, report.outcomes, as_json)


def _tensors(file: Path) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in checkpoint.inputs(file).items()}


def resume(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run's exports, or the folder of the run.")
    ],
    timeout: Annotated[float, typer.Option(help="Seconds that one conversion or verification may take.")] = 600.0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Finish the export that an interrupted or killed training run left; exit code 1 if a format does not agree.

    It runs code that was pickled when the export began: one begun by somebody else or in another folder needs --trust.
    """
    with one_line_errors(), Engine(timeout=timeout, tell=say) as engine:
        exports = run if run.name.startswith(EXPORTS) or not (run / EXPORTS).is_dir() else run / EXPORTS
        request = interrupted(exports, trust=trust)
        report = engine.submit(request).result()
        report = engine.bench(report, request.formats)
    conclude(report, report.outcomes, as_json)
