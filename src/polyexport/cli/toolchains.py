"""Commands for toolchains: the environments that converters and runtimes are installed in."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from polyexport.cli.options import Json, ToolchainNames, toolchains_starting
from polyexport.cli.output import one_line_errors, say, show
from polyexport.engine import plan
from polyexport.errors import BadRequest
from polyexport.format import Format
from polyexport.formats import known
from polyexport.report.tables import size
from polyexport.workers import toolchain
from polyexport.workers.disk import UNUSED_DAYS, Environment, free_bytes, gigabytes


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
    show(rows, as_json)


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


def install(names: ToolchainNames, as_json: Json = False) -> None:
    """Install toolchains by name, or those that formats need."""
    with one_line_errors():
        made = [(chain.name, chain.interpreter(say)) for chain in toolchains_of(names)]
    show([{"toolchain": name, "interpreter": str(python)} for name, python in made], as_json)


def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", autocompletion=toolchains_starting)] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help=f"All unused for {UNUSED_DAYS} days, those with other pins too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove the environments of toolchains; they are installed again when they are needed."""
    with one_line_errors():
        if bool(names) == unused:
            raise BadRequest(f"give names of toolchains, or --unused; known: {', '.join(toolchain.names())}")
        folders = [chain.folder for chain in toolchains_of(names or ()) if not chain.in_host and chain.folder.exists()]
    if unused:
        folders = [environment.folder for environment in toolchain.environments() if environment.is_unused]
    for folder in folders:
        shutil.rmtree(folder)
    show([{"toolchain": folder.name.rpartition("-")[0], "removed": str(folder)} for folder in folders], as_json)


def toolchains_of(names: Sequence[str]) -> list[toolchain.Toolchain]:
    """Toolchains by name, or all that formats of these names need."""
    found: list[toolchain.Toolchain] = []
    for name in names:
        if name in toolchain.names():
            found.append(toolchain.find(name))
        elif name in known():
            found += toolchains_for(known()[name])
        else:
            raise BadRequest(f"no toolchain or format {name!r}; known toolchains: {', '.join(toolchain.names())}")
    return list(dict.fromkeys(found))


def toolchains_for(each: Format) -> list[toolchain.Toolchain]:
    """The toolchains of a format and of all formats that it is made from."""
    return [chain for chains in plan.toolchains([each]).values() for chain in chains]


def disk_space(missing: Sequence[toolchain.Toolchain]) -> str:
    """The disk space that installing these takes, and whether there is enough; empty if it is none."""
    needed, free = sum(chain.room_bytes for chain in missing), free_bytes(toolchain.cache_folder())
    short = f", but only {gigabytes(free)} free in {toolchain.cache_folder()}" if needed > free else ""
    return f" (up to {gigabytes(needed)} of disk{short})" if needed else ""
