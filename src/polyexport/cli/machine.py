"""Commands that tell what this machine can export."""

from __future__ import annotations

from typing import Any

import typer

from polyexport.cli.options import FormatNames, Json, resolved
from polyexport.cli.output import heading, print_json, say, show
from polyexport.cli.toolchains import disk_space, toolchains_for
from polyexport.engine import plan
from polyexport.format import Format
from polyexport.formats import by_target, known
from polyexport.workers import toolchain


def formats(as_json: Json = False) -> None:
    """List every format by what it is shipped to, its routes, and whether its toolchains are ready."""
    if as_json:
        print_json([_record(each) for each in known().values()])
        return
    rows = {each.name: _format_row(each) for each in known().values()}
    for target, group in by_target(known().values()).items():
        heading(target)
        show([rows[each.name] for each in group], as_json=False)
        typer.echo()


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


def doctor(names: FormatNames = None, as_json: Json = False) -> None:
    """List what would be skipped on this machine, and what to do about it; exit code 1 if anything would be.

    What a format could use is not needed: it would be verified further with it.
    """
    chosen = resolved(names)
    rows: list[dict[str, Any]] = [
        {"format": each.name, "ready": not (lacks := _lacks(each)), "missing": lacks, "could_use": each.could_use()}
        for each in chosen
    ]
    shown = {"format", "ready", "missing", *(key for row in rows for key, value in row.items() if value)}
    show([{key: value for key, value in row.items() if as_json or key in shown} for row in rows], as_json)
    runnable = (each for each in chosen if not each.lacks())
    missing = dict.fromkeys(chain for each in runnable for chain in toolchains_for(each) if not chain.ready)
    if space := disk_space(list(missing)):
        say(f"everything missing together{space}")
    if any(row["missing"] for row in rows):
        raise typer.Exit(1)


def _lacks(each: Format) -> str:
    """What a format lacks here, with the fix; empty if nothing is missing."""
    if why := each.lacks():
        return why
    missing = [chain for chain in dict.fromkeys(toolchains_for(each)) if not chain.ready]
    names = " ".join(sorted(chain.name for chain in missing))
    return f"not installed yet: polyexport toolchain install {names}{disk_space(missing)}" if missing else ""
