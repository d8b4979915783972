"""The command `polyexport`: list formats, check this machine, export, and work with finished exports.

Requirements:
* Exit code 0: success; 1: something asked for is missing, wrong or does not run; 2: the command line is wrong.
* Every command prints JSON on request, on standard output; everything else goes to standard error.
* An error is one line; a traceback is a bug.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyexport.capture.selection import selected
from polyexport.engine import checkpoint, plan
from polyexport.engine.engine import Engine
from polyexport.engine.export import export
from polyexport.engine.ownership import is_ours
from polyexport.engine.request import interrupted
from polyexport.errors import BadRequest, PolyexportError
from polyexport.format import Format
from polyexport.formats import by_target, known, resolve
from polyexport.load import described
from polyexport.measure.layers import divergence
from polyexport.publish import signed
from polyexport.report import console, manifest, tables
from polyexport.report.escape import printable
from polyexport.report.folders import BEST, DESCRIPTION, EXPORTS, followed
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report, markdown
from polyexport.report.tables import size
from polyexport.serialization import encode
from polyexport.spec import Runner, write_arrays
from polyexport.versions import versions
from polyexport.workers import toolchain
from polyexport.workers.disk import UNUSED_DAYS, Environment, free_bytes, gigabytes

T = TypeVar("T")

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=_HELP)
toolchains = typer.Typer(
    no_args_is_help=True, context_settings=_HELP, help="Environments that converters and runtimes are installed in."
)
app.add_typer(toolchains, name="toolchain")

_out, _err = Console(), Console(stderr=True)


def _formats_starting(incomplete: str) -> list[str]:
    return [name for name in known() if name.startswith(incomplete)]


def _toolchains_starting(incomplete: str) -> list[str]:
    return [name for name in toolchain.names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_FOLDER = "An export; or a folder of exports, or of a run with them: the best of them."
Folder = Annotated[Path, typer.Argument(metavar="DIR", help=_FOLDER)]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Unpickle files of the export, which may run any code. Only if you trust its author."),
]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="FORMAT…", help="By default all.", autocompletion=_formats_starting)
]
Chains = Annotated[list[str], typer.Argument(metavar="NAME…", autocompletion=_toolchains_starting)]


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(" ".join(*versions(("lightning-export",)).items()))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def main(version: Version = False) -> None:
    """PyTorch models in deployment formats, proven against PyTorch."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack characters


@app.command()
def formats(as_json: Json = False) -> None:
    """List every format by what it is shipped to, its routes, and whether its toolchains are ready."""
    if as_json:
        _print_json([_record(each) for each in known().values()])
        return
    rows = {each.name: _format_row(each) for each in known().values()}
    for target, group in by_target(known().values()).items():
        _out.print(Text(target, style="bold underline"))
        _show([rows[each.name] for each in group], as_json=False)
        _out.print()


def _format_row(each: Format) -> dict[str, Any]:
    chains = plan.toolchains([each])[each.name]
    return {
        "format": each.name,
        "aliases": ", ".join(each.aliases),
        "routes": ", ".join(f"{route.upstream} → {route.name}" for route in each.routes),
        "toolchains": ", ".join(f"{chain.name}{'' if chain.ready else ' (not installed)'}" for chain in chains),
        "description": each.description,
    }


def _record(each: Format) -> dict[str, Any]:
    """A format's entry in the JSON output."""
    return {
        "format": each.name,
        "aliases": each.aliases,
        "description": each.description,
        "url": each.url,
        "artifact": each.artifact,
        "precision": each.precision,
        "targets": each.targets,
        "uses_gpu": each.uses_gpu,
        "kit": each.on_device is not None,
        "routes": [
            {"name": route.name, "upstream": route.upstream, "toolchain": toolchain.find(route.toolchain).name}
            for route in each.routes
        ],
        "toolchains": [{"name": chain.name, "ready": chain.ready} for chain in plan.toolchains([each])[each.name]],
    }


@app.command()
def doctor(names: Names = None, as_json: Json = False) -> None:
    """List what would be skipped on this machine, and what to do about it; exit code 1 if anything would be.

    What a format could use is not needed: it would be verified further with it.
    """
    chosen = _resolved(names)
    rows: list[dict[str, Any]] = [
        {"format": each.name, "ready": not (lacks := _lacks(each)), "missing": lacks, "could_use": each.could_use()}
        for each in chosen
    ]
    shown = {"format", "ready", "missing", *(key for row in rows for key, value in row.items() if value)}
    _show([{key: value for key, value in row.items() if as_json or key in shown} for row in rows], as_json)
    runnable = (each for each in chosen if not each.lacks())
    missing = dict.fromkeys(chain for each in runnable for chain in _needed(each) if not chain.ready)
    if room := _room(list(missing)):
        _say(f"everything missing together{room}")
    if any(row["missing"] for row in rows):
        raise typer.Exit(1)


@toolchains.command("list")
def list_toolchains(as_json: Json = False) -> None:
    """List the toolchains, what they need, where they are, the disk they take, and when they were last used.

    Below them are environments that were made for other pins or from other training environments.
    """
    made = {each.folder: each for each in toolchain.environments()}
    rows = []
    for chain in map(toolchain.find, toolchain.names()):
        state = "this environment" if chain.in_host else "ready" if chain.ready else "not installed"
        environment = None if chain.in_host else made.pop(chain.folder, None)
        folder = "" if chain.in_host else str(chain.folder)
        rows.append(_toolchain_row(chain.name, state, ", ".join(chain.requirements), folder, environment, as_json))
    for environment in made.values():
        name = environment.folder.name.rpartition("-")[0]
        rows.append(_toolchain_row(name, "of other pins", "", str(environment.folder), environment, as_json))
    _show(rows, as_json)


def _toolchain_row(
    name: str, state: str, requirements: str, folder: str, environment: Environment | None, as_json: bool
) -> dict[str, Any]:
    row = {"toolchain": name, "state": state, "requirements": requirements, "folder": folder}
    if as_json:
        known = {} if environment is None else {"bytes": environment.bytes, "used": environment.used}
        return row | known
    size_of = "" if environment is None else size(environment.bytes)
    used = "" if environment is None else time.strftime("%Y-%m-%d", time.localtime(environment.used))
    return row | {"size": size_of, "last used": used}


@toolchains.command("install")
def install(names: Chains, as_json: Json = False) -> None:
    """Install toolchains by name, or those that formats need."""
    with _one_line_errors():
        made = [(chain.name, chain.interpreter(_say)) for chain in _chains(names)]
    _show([{"toolchain": name, "interpreter": str(python)} for name, python in made], as_json)


@toolchains.command("remove")
def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", autocompletion=_toolchains_starting)] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help=f"All unused for {UNUSED_DAYS} days, those with other pins too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove the environments of toolchains; they are installed again when they are needed."""
    with _one_line_errors():
        if bool(names) == unused:
            raise BadRequest(f"give names of toolchains, or --unused; known: {', '.join(toolchain.names())}")
        folders = [chain.folder for chain in _chains(names or ()) if not chain.in_host and chain.folder.exists()]
    if unused:
        folders = [environment.folder for environment in toolchain.environments() if environment.is_unused]
    for folder in folders:
        shutil.rmtree(folder)
    _show([{"toolchain": folder.name.rpartition("-")[0], "removed": str(folder)} for folder in folders], as_json)


@app.command("export")
def export_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Lightning checkpoint, or a state dict.")],
    model: Annotated[
        str, typer.Option(help="The model's class, or a function that makes it: package.module:Name, or file.py:Name.")
    ],
    inputs: Annotated[Path, typer.Option(help="An .npz with forward's arguments by name: real data.")],
    formats: Annotated[str, typer.Option("--formats", "-f", help="Comma-separated.", autocompletion=_formats_starting)],
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
    with _one_line_errors():
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
            progress=_say,
            checkpoint=checkpoint.record(path, blob),
            labels=checkpoint.lines(labels) if labels else (),
            metadata=checkpoint.metadata(metadata or ()),
            preprocess=checkpoint.step(preprocess),
            postprocess=checkpoint.step(postprocess),
            bench=bench,
        )
    _conclude(report, report.outcomes, as_json)


def _tensors(file: Path) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in checkpoint.inputs(file).items()}


@app.command()
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
    with _one_line_errors(), Engine(timeout=timeout, tell=_say) as engine:
        exports = run if run.name.startswith(EXPORTS) or not (run / EXPORTS).is_dir() else run / EXPORTS
        request = interrupted(exports, trust=trust)
        report = engine.submit(request).result()
        report = engine.bench(report, request.formats)
    _conclude(report, report.outcomes, as_json)


@app.command()
def verify(
    folder: Folder,
    key: Annotated[
        Path | None, typer.Option(help="Check the signature with this public key before anything is run.")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Verify every artifact of an export again, in fresh processes; exit code 1 if one does not agree.

    A format that could not be exported has no artifact; see `report`. Nothing is unpickled without --trust, but a model
    is a program for its runtime: see SECURITY.md before you run somebody else's.
    """
    with _one_line_errors(), Engine() as engine:
        exported = _report(folder)
        if key is not None:
            _say(f"signed by {key}: {', '.join(signed.check(exported, key))}")
        elif (exported.folder / signed.SIGNATURE).exists():
            _say("the signature is not checked: give the public key with --key")
        report = _waited(engine, partial(engine.verify, trust=trust), exported)
    claimed = {outcome.format for outcome in exported.outcomes if outcome.artifact or outcome.publishable}
    _conclude(report, [outcome for outcome in report.outcomes if outcome.format in claimed], as_json)


@app.command()
def bench(folder: Folder, trust: Trust = False, as_json: Json = False) -> None:
    """Time every artifact at batch sizes 1, 2, 4 … until doubling gains less than 5 % throughput.

    PyTorch is timed too with --trust, since its module is a pickle, which may run any code.
    """
    with _one_line_errors(), Engine() as engine:
        report = _report(folder)
        if not trust:
            _say("PyTorch is not timed: its module is a pickle; give --trust if you trust who made the export")
        _import_from_here()
        found = _waited(engine, partial(engine.sweep, trust=trust), report)
    if as_json:
        _print_json([{"format": name, **encode(latency)} for name, latency in found])
        return
    _show(
        [
            {
                "format": name,
                "batch": str(latency.batch),
                "p50 ms": f"{latency.p50_ms:.3g}",
                "p95 ms": f"{latency.p95_ms:.3g}",
                "per second": f"{latency.throughput_per_second:.4g}",
            }
            for name, latency in sorted(found, key=lambda pair: pair[0])
        ],
        as_json=False,
    )


@app.command("report")
def show_report(
    folder: Folder,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show the report of an export; exit code 1 if a format did not agree."""
    with _one_line_errors():
        report = _report(folder)
    if as_markdown:
        typer.echo(markdown(report))
        raise typer.Exit(_code(report.outcomes))
    _conclude(report, report.outcomes, as_json)


@app.command()
def explain(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="FORMAT", autocompletion=_formats_starting)],
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an artifact and PyTorch again, and show in which layers they diverge; exit code 1 if one is beyond tolerance.

    PyTorch's module is a pickle, so an export that you did not make in that folder needs --trust.
    """
    with _one_line_errors(), Engine() as engine:
        report = _report(folder)
        trusted = trust or is_ours(report.folder, manifest.load(report.folder).seal)
        _import_from_here()
        found = _waited(engine, partial(engine.layers, name=resolve([name])[0].name, trust=trusted), report)
    if as_json:
        _print_json(encode(found))
    else:
        _show(
            [{column: text for column, text in row.items() if column != "why"} for row in tables.layers(found)], False
        )
        _say(divergence(found) or "every layer is within the tolerance")
    raise typer.Exit(1 if divergence(found) else 0)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help=_FOLDER)],
    now: Annotated[Path, typer.Argument(metavar="NOW", help="The export to judge.")],
    slower: Annotated[
        float | None, typer.Option(help="Largest allowed ratio of median latencies, such as 1.2.")
    ] = None,
    larger: Annotated[float | None, typer.Option(help="Largest allowed ratio of sizes.")] = None,
    off: Annotated[float | None, typer.Option(help="Largest allowed ratio of max errors.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two exports, or the best ones of two runs; exit code 1 if a state is worse, or a ratio above its limit.

    Latencies are judged only if both were measured on an idle machine, which has to be the same one.
    """
    from polyexport.report.compare import Bounds, compare, rows, untimed

    with _one_line_errors():
        one, other = _report(before), _report(now)
    found = compare(one, other, Bounds(slower, larger, off))
    _show(rows(found), as_json)
    if slower is not None and (why := untimed(one, other)):
        _say(f"latency is not compared: {why}")
    for line in (f"{each.format}: {why}" for each in found for why in each.worse):
        _say(line)
    raise typer.Exit(1 if any(each.worse for each in found) else 0)


@app.command()
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
    with _one_line_errors(), Engine() as engine:
        with _opened(engine, artifact.absolute(), trust=trust) as runner:
            found = runner(checkpoint.inputs(inputs))
        if output is not None:
            write_arrays(output, found)
    if as_json:
        _print_json({name: array.tolist() for name, array in found.items()})
        return
    _show([{"output": name, "dtype": str(a.dtype), "shape": str(list(a.shape))} for name, a in found.items()], False)


@app.command()
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

    with _one_line_errors():
        made = make(artifact, into, archive=archive)
    if as_json:
        _print_json({"kit": str(made)})
    else:
        typer.echo(str(made))


@app.command()
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

    with _one_line_errors():
        if registry is not None and run is None:
            raise BadRequest("--registry needs a run to publish to; give --wandb PROJECT/RUN too")
        report, name = accept(proof, folder)
        if run is not None:
            publish_into(report, run, registry)
    _conclude(report, [report[name]], as_json)


@app.command("wandb-link")
def wandb_link(folder: Folder, as_json: Json = False) -> None:
    """Link the artifacts of offline runs to the W&B registry; run `wandb sync` first."""
    from polyexport.publish.wandb import link

    with _one_line_errors():
        linked = link(folder)
    if as_json:
        _print_json(linked)
    else:
        typer.echo(printable("\n".join(linked)))


# --- pieces -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Print errors as one line, and exit: with 2 for a bad request, 1 for what this machine cannot do."""
    try:
        yield
    except (PolyexportError, OSError) as error:
        console.say(_err, " ".join(f"polyexport: {error}".splitlines()), style="red")
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def _waited(engine: Engine, work: Callable[[Report], T], report: Report) -> T:
    """Show what the engine is doing until `work` is done."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return console.wait(pool.submit(work, report), lambda: engine.doing, console=_err)
        except BaseException:
            engine.close()  # ends what the pool would wait for
            raise


def _resolved(names: Sequence[str] | None) -> tuple[Format, ...]:
    with _one_line_errors():
        return resolve(names) if names else tuple(known().values())


def _say(line: str) -> None:
    console.say(_err, line)


def _chains(names: Sequence[str]) -> list[toolchain.Toolchain]:
    """Toolchains by name, or all that formats of these names need."""
    found: list[toolchain.Toolchain] = []
    for name in names:
        if name in toolchain.names():
            found.append(toolchain.find(name))
        elif name in known():
            found += _needed(known()[name])
        else:
            raise BadRequest(f"no toolchain or format {name!r}; known toolchains: {', '.join(toolchain.names())}")
    return list(dict.fromkeys(found))


def _needed(each: Format) -> list[toolchain.Toolchain]:
    """The toolchains of a format and of all formats that it is made from."""
    return [chain for chains in plan.toolchains([each]).values() for chain in chains]


def _lacks(each: Format) -> str:
    """What a format lacks here, with the fix; empty if nothing is missing."""
    if why := each.lacks():
        return why
    missing = [chain for chain in dict.fromkeys(_needed(each)) if not chain.ready]
    names = " ".join(sorted(chain.name for chain in missing))
    return f"not installed yet: polyexport toolchain install {names}{_room(missing)}" if missing else ""


def _room(missing: Sequence[toolchain.Toolchain]) -> str:
    """The disk space that installing these takes, and whether there is enough; empty if it is none."""
    needed, free = sum(chain.room_bytes for chain in missing), free_bytes(toolchain.cache_folder())
    short = f", but only {gigabytes(free)} free in {toolchain.cache_folder()}" if needed > free else ""
    return f" (up to {gigabytes(needed)} of disk{short})" if needed else ""


def _import_from_here() -> None:
    """Let an export's module be imported from the working folder, as for `python -m`; what is installed comes first."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _opened(engine: Engine, artifact: Path, *, trust: bool) -> contextlib.AbstractContextManager[Runner]:
    """A runner of an artifact in its export, or of one whose folder was copied elsewhere."""
    folder = artifact.parent if (artifact.parent / DESCRIPTION).is_file() else artifact
    if (folder / DESCRIPTION).is_file() and not (followed(folder.parent) / "report.json").is_file():
        return engine.opened(artifact, trust=trust)
    try:
        report = _report(folder.parent)
    except BadRequest:
        described(artifact)  # says what is wrong with the given path
        raise
    return engine.runner(report, folder.name, trust=trust)


def _report(folder: Path) -> Report:
    """The report in a folder, or in the best export of it or of the run in it."""
    for candidate in (folder, folder / BEST, folder / EXPORTS / BEST):
        if (followed(candidate) / "report.json").is_file():
            return Report.load(candidate)
    raise BadRequest(f"{folder} is neither an export nor a folder with a best one: there is no report.json")


def _code(outcomes: Sequence[Outcome]) -> int:
    return 0 if outcomes and all(outcome.publishable for outcome in outcomes) else 1


def _conclude(report: Report, judged: Sequence[Outcome], as_json: bool) -> None:
    """Show the report; exit with code 0 if all of `judged` agree, else 1."""
    if as_json:
        _print_json(encode(report))
    else:
        console.show(report)
    raise typer.Exit(_code(judged))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold", style="bold" if column == next(iter(rows[0])) else None)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.standard().print(table)


def _cell(value: Any) -> Text:
    return Text("yes" if value is True else "no" if value is False else printable(str(value)))


if __name__ == "__main__":
    app()
