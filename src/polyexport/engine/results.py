"""The report of a request, and the records that are written beside its artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from polyexport.engine.dispatch import PREPARE_LOG
from polyexport.engine.ownership import seal
from polyexport.engine.request import Request
from polyexport.format import Format
from polyexport.formats import known
from polyexport.load import Description
from polyexport.measure.reference import Reference
from polyexport.report import manifest
from polyexport.report.folders import DESCRIPTION
from polyexport.report.manifest import Made, Manifest, Part
from polyexport.report.outcome import Checkpoint, Model, Outcome, State, notes, of_precisions
from polyexport.report.report import Report
from polyexport.serialization import write_json
from polyexport.spec import ExportSpec
from polyexport.workers.process import JobResult


def not_rebuilt(request: Request, ended: JobResult) -> Report:
    """The report where PyTorch could not be run: every format has the same reason."""
    state: State = "skipped" if ended.kind == "missing" else "failed"
    in_words = ended.kind in ("missing", "bad request")  # for the user
    why = ended.error if in_words else f"the module cannot be rebuilt: {ended.error}"

    def outcome(each: Format) -> Outcome:
        return Outcome(each.name, each.precision, state, why, log=PREPARE_LOG, reproduce=ended.command or None)

    outcomes = tuple(map(outcome, request.formats))
    return Report(request.checkpoint, None, outcomes, notes=notes("capture", *request.notes))


def reported(request: Request, reference: Reference, outcomes: tuple[Outcome, ...], of_routes: Iterable[str]) -> Report:
    """The report on the outcomes."""
    at, spec = reference.checkpoint_at, reference.spec
    return Report(
        checkpoint=replace(
            request.checkpoint,
            sha256=reference.checkpoint_sha256,
            epoch=at.get("epoch", request.checkpoint.epoch),
            global_step=at.get("global_step", request.checkpoint.global_step),
        ),
        model=Model(
            reference.class_name,
            reference.parameters,
            spec.inputs,
            spec.outputs,
            spec.labels,
            request.metadata,
            request.processing,
        ),
        outcomes=outcomes,
        environment=reference.environment,
        notes=(
            *notes("capture", *request.notes),
            *notes("batch", *reference.notes),
            *notes("route", *of_routes),
            *notes("precision", *of_precisions(outcomes)),
        ),
    )


def describe(request: Request, report: Report, reference: Reference, references: Mapping[str, Reference]) -> None:
    """Write the manifest, and `polyexport.json` beside each artifact."""
    made = Manifest(
        report.checkpoint,
        request.question,
        reference.spec,
        reference.batches,
        reference.noise,
        reference.environment,
        Made.of(report.outcomes),
        seal(request.final),
        parts={name: Part(each.spec, each.batches, each.noise) for name, each in references.items()},
    )
    manifest.save(request.work, made)
    for outcome in report.outcomes:
        describe_artifact(request.work, outcome, report.checkpoint, made.of(outcome.format).spec)


def describe_artifact(root: Path, outcome: Outcome, checkpoint: Checkpoint, spec: ExportSpec) -> None:
    """Write `polyexport.json` beside an artifact, where there is one; `spec` is PyTorch's signature."""
    if outcome.artifact and outcome.format in known():
        write_json(root / outcome.format / DESCRIPTION, Description.of(outcome, checkpoint, spec))
