"""Commands for a finished export: verify, time, show, explain and compare it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from polyexport.cli.options import FOLDER, Folder, Json, Trust, formats_starting, import_from_here, report_in
from polyexport.cli.output import conclude, exit_code, one_line_errors, print_json, say, show, waited
from polyexport.engine.engine import Engine
from polyexport.engine.ownership import is_ours
from polyexport.formats import resolve
from polyexport.measure.layers import divergence
from polyexport.publish import signed
from polyexport.report import manifest, tables
from polyexport.report.escape import printable
from polyexport.report.report import markdown
from polyexport.serialization import encode


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
    with one_line_errors(), Engine() as engine:
        exported = report_in(folder)
        if key is not None:
            say(f"signed by {key}: {', '.join(signed.check(exported, key))}")
        elif (exported.folder / signed.SIGNATURE).exists():
            say("the signature is not checked: give the public key with --key")
        report = waited(engine, partial(engine.verify, trust=trust), exported)
    claimed = {outcome.format for outcome in exported.outcomes if outcome.artifact or outcome.publishable}
    conclude(report, [outcome for outcome in report.outcomes if outcome.format in claimed], as_json)


def bench(folder: Folder, trust: Trust = False, as_json: Json = False) -> None:
    """Time every artifact at batch sizes 1, 2, 4 … until doubling gains less than 5 % throughput.

    PyTorch is timed too with --trust, since its module is a pickle, which may run any code.
    """
    with one_line_errors(), Engine() as engine:
        report = report_in(folder)
        if not trust:
            say("PyTorch is not timed: its module is a pickle; give --trust if you trust who made the export")
        import_from_here()
        found = waited(engine, partial(engine.sweep, trust=trust), report)
    if as_json:
        print_json([{"format": name, **encode(latency)} for name, latency in found])
        return
    show(
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


def show_report(
    folder: Folder,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show the report of an export; exit code 1 if a format did not agree."""
    with one_line_errors():
        report = report_in(folder)
    if as_markdown:
        typer.echo(markdown(report))
        raise typer.Exit(exit_code(report.outcomes))
    conclude(report, report.outcomes, as_json)


def explain(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="FORMAT", autocompletion=formats_starting)],
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an artifact and PyTorch again, and show in which layers they diverge; exit code 1 if one is beyond tolerance.

    PyTorch's module is a pickle, so an export that you did not make in that folder needs --trust.
    """
    with one_line_errors(), Engine() as engine:
        report = report_in(folder)
        trusted = trust or is_ours(report.folder, manifest.load(report.folder).seal)
        import_from_here()
        found = waited(engine, partial(engine.layers, name=resolve([name])[0].name, trust=trusted), report)
    if as_json:
        print_json(encode(found))
    else:
        show([{column: text for column, text in row.items() if column != "why"} for row in tables.layers(found)], False)
        say(divergence(found) or "every layer is within the tolerance")
    raise typer.Exit(1 if divergence(found) else 0)


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help=FOLDER)],
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

    with one_line_errors():
        one, other = report_in(before), report_in(now)
    found = compare(one, other, Bounds(slower, larger, off))
    show(rows(found), as_json)
    if slower is not None and (why := untimed(one, other)):
        say(f"latency is not compared: {why}")
    for line in (f"{each.format}: {why}" for each in found for why in each.worse):
        say(line)
    raise typer.Exit(1 if any(each.worse for each in found) else 0)


def wandb_link(folder: Folder, as_json: Json = False) -> None:
    """Link the artifacts of offline runs to the W&B registry; run `wandb sync` first."""
    from polyexport.publish.wandb_registry import link

    with one_line_errors():
        linked = link(folder)
    if as_json:
        print_json(linked)
    else:
        typer.echo(printable("\n".join(linked)))
