"""Artifacts of a finished export, each run in its own toolchain: verified again, or used as a function.

Requirements:
* All that is needed is in the export's folder: signature and batches in its manifest, and the artifacts.
* The export itself is not changed; what a run prints is appended to the format's log.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from polyexport.engine.dispatch import Dispatcher
from polyexport.engine.routes import Watch, counted, judged, label, narrow, placed
from polyexport.errors import BadRequest, CannotRun, line
from polyexport.format import Format
from polyexport.measure.reference import VALIDATION_BATCH
from polyexport.report import manifest
from polyexport.report.manifest import Manifest
from polyexport.report.outcome import Outcome, State
from polyexport.report.report import Report
from polyexport.spec import Arrays, ExportSpec, Runner, read_arrays, write_arrays
from polyexport.workers import toolchain
from polyexport.workers.job import Convert, Serve, Verify, proofs, read_job
from polyexport.workers.process import JobResult
from polyexport.workers.toolchain import Toolchain


class FormatFields(TypedDict):
    """Fields of `polyexport.workers.job.FormatJob`."""

    format: str
    declared: str | None
    source: str
    spec: ExportSpec
    trusted: bool


@dataclass(frozen=True, slots=True)
class Runnable:
    """An artifact, with all that is needed to run it; `path` and `batch` are relative to the export's folder.

    `batch` is the file with the inputs that it was verified with first.
    """

    path: str
    format: Format
    runtime: Toolchain
    spec: ExportSpec
    batch: str = VALIDATION_BATCH

    @property
    def name(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def log(self) -> str:
        """Where its worker's output goes, relative to the export's folder."""
        return f"logs/{self.name}.log"

    def of_job(self, dispatcher: Dispatcher) -> FormatFields:
        """The fields that each job on the artifact has."""
        return {
            "format": self.name,
            "declared": dispatcher.declared(self.format),
            "source": self.path,
            "spec": self.spec,
            "trusted": dispatcher.trusted,
        }


def signature(report: Report, name: str = "") -> ExportSpec:
    """The module's signature; of a format `name`, that of what its artifact has of the module. Its own may differ.

    Raises:
        BadRequest: the export has no manifest that can be read.
    """
    return manifest.load(report.folder).of(name).spec


def runnables(report: Report, formats: Mapping[str, Format]) -> list[Runnable]:
    """Every artifact of the report that has been run before, with its format from `formats`."""
    found = [
        (outcome, outcome.artifact.path)
        for outcome in report.outcomes
        if outcome.parity is not None and outcome.artifact is not None and outcome.format in formats
    ]
    if not found:  # then there may be no manifest
        return []
    exported = manifest.load(report.folder)
    return [_runnable(exported.of(each.format), each, path, formats[each.format]) for each, path in found]


def _runnable(exported: Manifest, outcome: Outcome, path: str, each: Format) -> Runnable:
    made_by = next((route for route in each.routes if route.name == outcome.route), each.routes[0])
    # a runner uses PyTorch's names and dtypes, even where the artifact's own differ
    spec = exported.spec.static() if _is_static(outcome) else exported.spec
    return Runnable(path, each, toolchain.find(each.runtime or made_by.toolchain), spec, exported.batches[0].path)


def _is_static(outcome: Outcome) -> bool:
    """Whether it was made with static shapes; the recorded inputs of an artifact that was run are its own."""
    if outcome.parity is None:
        return not any(tensor.dynamic for tensor in outcome.inputs)
    return len(outcome.parity.batches) == 1


def verify(report: Report, formats: Mapping[str, Format], dispatcher: Dispatcher, watch: Watch) -> Report:
    """Load each artifact in a fresh process and compare it with PyTorch's recorded outputs again.

    Returns:
        The report with the states of today: an artifact that cannot be run today, or is not the exported one any more,
            is not `verified`.
    """
    exported = manifest.load(report.folder)

    def today(before: Outcome) -> Outcome:
        if before.artifact is None or before.format not in formats:
            return _not_run(before)
        had = exported.of(before.format)
        each = _runnable(had, before, before.artifact.path, formats[before.format])
        watch(each.name, "verifying")
        ended = _verified(each, had, dispatcher, f"{each.name}.again")
        now = judged(replace(before, parity=None), ended, before.artifact.path)
        found = _beside(before, counted(report.folder, now))
        if found.state == "verified" and (why := ended.value["elsewhere"]):
            found = replace(found, state="degraded", reason=narrow(why))
        watch(each.name, found)
        return found

    return replace(report, outcomes=tuple(map(today, report.outcomes)))


def _verified(each: Runnable, exported: Manifest, dispatcher: Dispatcher, name: str) -> JobResult:
    taken = proofs(exported.batches, dynamic=each.spec.is_dynamic, made_up=each.format.precision == "float32")
    job = Verify(**each.of_job(dispatcher), batches=taken, noise=exported.noise)
    return dispatcher.run(job, each.runtime, name, each.log, gpu=each.format.uses_gpu)


def recorded(report: Report, path: str, names: Iterable[str]) -> Arrays:
    """Arrays of a batch of the export.

    Raises:
        BadRequest: the file is damaged, or lacks one of them.
        OSError: it cannot be read.
    """
    try:
        return read_arrays(report.folder / path, names)
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise many types for a damaged file
        raise BadRequest(f"{report.folder / path} cannot be read: {line(error, 300)}") from error


def mends(report: Report, each: Runnable) -> bool:
    """Whether an artifact can be made again with some of its layers in float."""
    return any(route.mends and route.name == report[each.name].route for route in each.format.routes)


def remade(report: Report, each: Runnable, share: float, dispatcher: Dispatcher) -> Outcome:
    """An artifact made and verified once more with a share of its layers in float, beside the one in its place.

    Raises:
        CannotRun: it cannot be made.
    """
    before, exported = report[each.name], manifest.load(report.folder).of(each.name)
    (route,) = (route for route in each.format.routes if route.name == before.route)
    static = each.spec.is_dynamic != exported.spec.is_dynamic
    name = label(each.format, route, static=static, outside=before.outside)
    job = read_job(report.folder / "source" / "jobs" / f"{name}.convert.json")
    assert isinstance(job, Convert), "it is called one"
    name = f"{name}.float-{share:g}"
    target = Path("source", "made", name, each.format.artifact).as_posix()
    job = replace(job, target=target, spec=replace(job.spec, in_float=share))
    ended = dispatcher.run(job, toolchain.find(route.toolchain), f"{name}.convert", each.log)
    if not ended.ok:
        raise CannotRun(f"{each.name} with {share:.1%} of its layers in float: {ended.error}")
    ended = _verified(replace(each, path=target), exported, dispatcher, f"{name}.verify")
    blank = replace(before, reason="", parity=None, latency=None, metrics={}, layers=())
    found = counted(report.folder, judged(blank, ended, target))
    lost = [before.reason] if before.state == "degraded" else []
    lost += [narrow(ended.value["elsewhere"]), ended.value["shortfall"]] if ended.ok else []
    if found.state == "verified" and any(lost):
        found = replace(found, state="degraded", reason="; ".join(filter(None, lost)))
    return found


def settled(report: Report, outcome: Outcome, each: Format) -> Outcome:
    """Give an artifact that was made again the place of the one before."""
    assert outcome.artifact is not None, "it was made"
    where = placed(report.folder, each, outcome.artifact.path)
    return replace(outcome, artifact=replace(outcome.artifact, path=where))


def _not_run(before: Outcome) -> Outcome:
    """An outcome whose artifact cannot be run; if it was not claimed to agree, it stays as it is."""
    if not before.publishable:
        return before
    why = f"the format {before.format!r} is unknown here" if before.artifact else "the report lists no artifact"
    return replace(
        before, state="unverified", parity=None, reason=f"{before.state} when exported, not run today: {why}"
    )


def _beside(before: Outcome, now: Outcome) -> Outcome:
    """Today's outcome, with what was recorded at the export."""
    if _is_another(before, now):
        changed = "the artifact was changed after the export: its SHA-256 differs"
        state: State = "unverified" if now.state == "verified" else now.state
        return replace(now, state=state, reason=f"{changed}; {now.reason}" if state == now.state else changed)
    if before.by_budget and before.state == "verified" and now.state == "mismatch":
        # single elements were off at the export too, and the budget allowed them
        return replace(now, state=before.state, reason="")
    if now.state == "verified" and (before.publishable or (before.state == "unverified" and before.parity)):
        return replace(now, state=before.state)  # the limitation that was recorded then still holds
    return replace(now, reason="") if now.state == "verified" else now


def _is_another(before: Outcome, now: Outcome) -> bool:
    """Whether the artifact has changed; one that could not be run was not hashed."""
    hashes = [each.artifact.sha256 for each in (before, now) if each.artifact]
    return all(hashes) and len(set(hashes)) > 1


@contextlib.contextmanager
def runner(report: Report, each: Runnable, dispatcher: Dispatcher) -> Iterator[Runner]:
    """An artifact as a function, run by a worker of its toolchain until the context exits.

    Raises:
        BadRequest: (from the function) an input is missing.
        CannotRun: it cannot be loaded, or (from the function) it cannot run these inputs, or its process ended.
    """
    job = Serve(**each.of_job(dispatcher))
    with (
        tempfile.TemporaryDirectory() as folder,
        dispatcher.converse(job, each.runtime, f"{each.name}.serve", each.log, gpu=each.format.uses_gpu) as talk,
    ):
        source, target = (Path(folder, name) for name in ("inputs.npz", "outputs.npz"))
        _expect(each, talk.answer(), report)

        def run(inputs: Arrays) -> Arrays:
            if missing := [name for name in each.spec.input_names if name not in inputs]:
                given, takes = ", ".join(inputs) or "nothing", ", ".join(each.spec.input_names)
                raise BadRequest(f"{each.name} takes {takes}, but was given {given}: there is no {missing[0]}")
            write_arrays(source, inputs)
            _expect(each, talk.ask(json.dumps([str(source), str(target)])), report)
            return read_arrays(target, each.spec.output_names)

        yield run


def _expect(each: Runnable, answer: Any, report: Report) -> None:
    if answer is None:
        raise CannotRun(f"{each.name}: its process ended or took too long; see {report.folder / each.log}")
    if "error" in answer:
        raise CannotRun(f"{each.name}: {answer['error']}")
