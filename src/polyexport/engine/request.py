"""One checkpoint to export, as it is requested, and as it is stored on disk until it is done."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyexport.capture.calls import further_calls
from polyexport.capture.code import import_path
from polyexport.capture.snapshot import PROCESSING
from polyexport.engine.dispatch import declared, declared_file
from polyexport.engine.ownership import is_ours, seal
from polyexport.errors import BadRequest, line
from polyexport.format import Format
from polyexport.formats import known
from polyexport.measure.dynamic_axes import Dynamic
from polyexport.report.folders import BEST, REQUEST, clear, let_go, take
from polyexport.report.outcome import Checkpoint
from polyexport.report.report import Report
from polyexport.serialization import decode, read_json, write_json
from polyexport.workers import toolchain


@dataclass(frozen=True, slots=True)
class Request:
    """One checkpoint to export.

    Attributes:
        work: The unfinished folder, from `unfinished`; its `source` has the module (see `capture.snapshot`).
        name: What the finished folder is called.
        formats: The formats to make, in order.
        dynamic: Which input axes are dynamic.
        checkpoint: The checkpoint of the weights, as far as it is known yet.
        notes: Notes for the report about how it came to be.
        held: Path or fsspec URL of the weights, where they are not in the folder yet. The engine moves a path, and
            removes it with an incomplete export if its name ends with `.` and the name of `work`; a URL is copied.
        best: Whether the link `best` is to point to the finished folder.
        keep: How many finished folders may stay in the parent folder; None for all.
        former: Parent folders of a run that this one resumes, where this may have been exported under the same name.
        sys_path: The import path of the process that trained the module.
        commit: The git commit of its code; None where that is this process's.
        labels: Names of an output's classes, to be embedded in each artifact.
        metadata: Further strings to be embedded, by name.
        processing: What runs before and after forward, in words.
        spare: How many bytes of the disk have to stay free for training, while it runs.
    """

    work: Path
    name: str
    formats: tuple[Format, ...]
    dynamic: Dynamic = True
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(""))
    notes: tuple[str, ...] = ()
    held: str | None = None
    best: bool = True
    keep: int | None = None
    former: tuple[Path, ...] = ()
    sys_path: tuple[str, ...] = field(default_factory=import_path)
    commit: str | None = None
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    processing: Mapping[str, str] = field(default_factory=dict)
    spare: int = 0

    @property
    def final(self) -> Path:
        """Path of the finished folder."""
        return self.work.parent / self.name

    @property
    def question(self) -> dict[str, Any]:
        """What has to be equal for an earlier export of the same weights to be reused."""
        further = len(further_calls(self.work / "source"))
        names = sorted(each.name for each in self.formats)
        embedded = {"labels": self.labels, "metadata": self.metadata, "processing": self._processing}
        return {"formats": names, "dynamic": self.dynamic, "calibration": further, **embedded}

    @property
    def _processing(self) -> dict[str, str]:
        """The steps in words, with a hash that distinguishes steps that differ only in their numbers."""
        file = self.work / "source" / PROCESSING
        digest = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if file.is_file() else {}
        return {**self.processing, **digest}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it is stored on disk for `resume`; see `Request`."""

    name: str
    formats: tuple[str, ...]
    dynamic: Any
    checkpoint: Checkpoint
    notes: tuple[str, ...]
    held: str | None
    best: bool
    keep: int | None
    sys_path: tuple[str, ...]
    seal: str = ""
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    processing: Mapping[str, str] = field(default_factory=dict)


def write(request: Request) -> None:
    """Store the request, for `resume`."""
    names = tuple(each.name for each in request.formats)
    taken = (request.dynamic, request.checkpoint, request.notes, request.held, request.best, request.keep)
    embedded = (request.labels, request.metadata, request.processing)
    asked = Asked(request.name, names, *taken, request.sys_path, seal(request.work), *embedded)
    write_json(request.work / REQUEST, asked)


def declare(request: Request) -> None:
    """Store the user's own formats, for `resume`, which reports those that could not be pickled."""
    for each in request.formats:
        with contextlib.suppress(Exception):  # the user's own code
            declared(request.work, each)


def interruption(work: Path) -> str:
    """A line about an interrupted export: which one, what `best` is meanwhile, and the command that finishes it."""
    parent = work.parent
    try:
        best = f"best is {Report.load(parent / BEST).folder.name} until then"
    except (OSError, BadRequest):
        best = "there is no best until then"
    try:
        name = _read(work).name
    except BadRequest as error:  # this is shown when a run ends, and must not stop that
        return f"an export was interrupted, and cannot be finished: {error}; {best}"
    return f"the export of {name} was interrupted; {best}; to finish it: polyexport resume {shlex.quote(str(parent))}"


def _read(work: Path) -> Asked:
    file = work / REQUEST
    try:
        return decode(Asked, read_json(file))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadRequest(f"{file} cannot be read; another version may have written it: {error}") from None


def interrupted(parent: Path, *, trust: bool = True) -> Request:
    """Take over the export that a run left unfinished in `parent`.

    Without `trust` this user must have begun it in that folder, since finishing it runs what was pickled.

    Raises:
        BadRequest: there is none, another process or user has it, or a user's own format cannot be loaded.
    """
    if not parent.is_dir():
        raise BadRequest(f"there is no folder {parent}; give the folder of a run's exports, or of the run")
    work = clear(parent)
    if work is not None and not os.access(work, os.W_OK):
        raise BadRequest(f"{parent} cannot be written, which finishing its interrupted export needs")
    if work is None or not take(work):
        raise BadRequest(f"{parent} has no interrupted export: those in it are complete or still running")
    asked = _read(work)
    if not (trust or is_ours(work, asked.seal)):
        let_go(work)
        raise BadRequest(
            f"the export in {parent} was not begun by you in that folder, and finishing it runs code that was pickled "
            "when it began; if you trust who made it, give --trust"
        )
    formats = tuple(_format(work, name) for name in asked.formats)
    dynamic = asked.dynamic
    if isinstance(dynamic, Mapping):  # JSON has no numbers for keys
        dynamic = {name: {int(axis): called for axis, called in axes.items()} for name, axes in dynamic.items()}
    told = dict.fromkeys((*asked.notes, "training was interrupted, and polyexport resume finished this export"))
    return Request(
        work,
        asked.name,
        formats,
        dynamic,
        asked.checkpoint,
        tuple(told),
        asked.held,
        asked.best,
        asked.keep,
        sys_path=asked.sys_path,
        commit="",
        labels=asked.labels,
        metadata=asked.metadata,
        processing=asked.processing,
    )


def _format(work: Path, name: str) -> Format:
    file = declared_file(work, name)
    if not file.is_file() and name in known():
        return known()[name]
    try:
        import cloudpickle

        found: Format = cloudpickle.loads(file.read_bytes())
        for route in found.routes:
            toolchain.find(route.toolchain)
    except Exception as error:  # the user's own code
        raise BadRequest(
            f"the format {name!r} is your own, and this command cannot load it ({line(error)}); "
            "resume training with fit(ckpt_path=…)"
        ) from None
    return found
