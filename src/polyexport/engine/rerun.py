"""A finished export once more: each artifact in its own toolchain, to be verified again or used as a function.

Requirements:
* Everything that is needed lies in the export's folder: signature and batches in its manifest, artifacts beside it.
* The export itself is not changed; what a run prints is appended to the format's log.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyexport.engine.dispatch import Dispatcher
from polyexport.engine.routes import Watch, judged
from polyexport.errors import BadRequest, CannotRun
from polyexport.format import Format, Runner
from polyexport.report.report import Outcome, Report
from polyexport.serialization import decode, read_json
from polyexport.spec import Arrays, ExportSpec, read_arrays, write_arrays
from polyexport.workers import toolchain
from polyexport.workers.job import Batch, Job, Kind
from polyexport.workers.toolchain import Toolchain


@dataclass(frozen=True, slots=True)
class Runnable:
    """An artifact, and what it takes to run it."""

    outcome: Outcome
    format: Format
    runtime: Toolchain
    spec: ExportSpec

    @property
    def name(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def log(self) -> str:
        """Where its worker's output goes, relative to the export's folder."""
        return f"logs/{self.name}.log"

    def job(self, kind: Kind, dispatcher: Dispatcher, **more: Any) -> Job:
        """A job of `kind` on the artifact."""
        assert self.outcome.artifact is not None, "what is runnable was made"
        declared = dispatcher.declared(self.format)
        return Job(kind, self.name, declared, source=self.outcome.artifact.path, spec=self.spec, **more)


def signature(report: Report) -> ExportSpec:
    """The module's own signature, which a format's may differ from.

    Raises:
        BadRequest: the export has no manifest, since its module could not be rebuilt.
    """
    return decode(ExportSpec, _manifest(report)["spec"])


def _manifest(report: Report) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(report.folder / "manifest.json")
    except FileNotFoundError:
        raise BadRequest(f"{report.folder} has no manifest.json: its module could not be rebuilt") from None
    return found


def runnables(report: Report, formats: Mapping[str, Format]) -> list[Runnable]:
    """Every artifact of the report that has been run before, with its format out of `formats`."""
    found = []
    for outcome in report.outcomes:
        if outcome.parity is None or outcome.format not in formats:
            continue
        each = formats[outcome.format]
        made_by = next((route for route in each.routes if route.name == outcome.route), each.routes[0])
        spec = signature(report)  # PyTorch's, which a runner answers in, also where the artifact's own differs
        if len(outcome.parity.batches) == 1:  # made with fixed sizes; its inputs do not tell, where they are its own
            spec = spec.static()
        found.append(Runnable(outcome, each, toolchain.find(each.runtime or made_by.toolchain), spec))
    return found


def verify(report: Report, formats: Mapping[str, Format], dispatcher: Dispatcher, watch: Watch) -> Report:
    """Load each artifact in a fresh process and compare it with the recorded answers of PyTorch once more.

    Returns:
        The report with the states of today; an artifact that is not the exported one any more is named in the notes.
    """
    manifest = _manifest(report)
    batches = tuple(decode(Batch, each) for each in manifest["batches"])
    now: dict[str, Outcome] = {}
    notes = []
    for each in runnables(report, formats):
        watch(each.name, "verifying")
        before = each.outcome
        assert before.artifact is not None, "what is runnable was made"
        taken = batches if each.spec.is_dynamic else batches[:1]
        job = each.job("verify", dispatcher, batches=taken, noise=manifest["noise"])
        ended, command = dispatcher.run(job, each.runtime, f"{each.name}.again", each.log, gpu=each.format.needs_gpu)
        outcome = judged(before, ended, command, before.artifact.path)
        if before.publishable and outcome.state == "verified":
            outcome = replace(outcome, state=before.state)  # what was said of it then holds today
        elif outcome.state == "verified":
            outcome = replace(outcome, reason="")
        if outcome.artifact and outcome.artifact.sha256 not in ("", before.artifact.sha256):
            notes.append(f"{each.name}: the artifact is not the one that was exported; its SHA-256 has changed")
        now[each.name] = outcome
        watch(each.name, now[each.name])
    outcomes = tuple(now.get(outcome.format, outcome) for outcome in report.outcomes)
    return replace(report, outcomes=outcomes, notes=(*report.notes, *notes))


@contextlib.contextmanager
def runner(report: Report, each: Runnable, dispatcher: Dispatcher) -> Iterator[Runner]:
    """An artifact as a function, run by a worker of its toolchain until the context is left.

    Raises:
        CannotRun: it cannot be loaded, or (from the function) it cannot run these inputs, or its process ended.
    """
    job = each.job("serve", dispatcher)
    with (
        tempfile.TemporaryDirectory() as folder,
        dispatcher.converse(job, each.runtime, f"{each.name}.serve", each.log, gpu=each.format.needs_gpu) as talk,
    ):
        source, target = (Path(folder, name) for name in ("inputs.npz", "outputs.npz"))
        _expect(each, talk.answer(), report)

        def run(inputs: Arrays) -> Arrays:
            write_arrays(source, inputs)
            _expect(each, talk.ask(json.dumps([str(source), str(target)])), report)
            return read_arrays(target, each.spec.output_names)

        yield run


def _expect(each: Runnable, answer: Any, report: Report) -> None:
    if answer is None:
        raise CannotRun(f"{each.name}: its process ended or took too long; see {report.folder / each.log}")
    if "error" in answer:
        raise CannotRun(f"{each.name}: {answer['error']}")
