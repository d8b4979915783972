"""A model card: the report for readers on a model hub.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from polyexport.report import escape, tables
from polyexport.report.html import snippets, title
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report, metrics, rows

_COLUMNS = ("format", "state", "size", "max error", "p50 ms", "p95 ms", "batch-1 ms", "speed-up")


def card(report: Report, repository: str, *, use: str = "", license_id: str = "") -> str:
    """The card of the artifacts that agree with PyTorch, as Markdown with a YAML header.

    Args:
        report: A finished export.
        repository: The repository of the artifacts: `user/model`.
        use: Intended and out-of-scope uses, in the user's words.
        license_id: The license, by the hub's identifier: `apache-2.0`.
    """
    agreed = report.publishable
    lines = [*_metadata(agreed, license_id), f"# {escape.markdown(repository)}", ""]
    lines += [*_about(report), "", "## Intended use", "", use.strip() or "Not stated by the author.", ""]
    lines += ["## Inputs and outputs", "", *_signature(report), "", "## Artifacts", "", *_artifacts(report, agreed)]
    if report.metrics:
        lines += ["## Metrics", "", "From the author's own validation, with each runtime in place of PyTorch:", ""]
        lines += [*tables.markdown(_of(agreed, metrics(report))), ""]
    return "\n".join([*lines, "## How to load", "", *_loading(agreed, repository)])


def description(report: Report) -> str:
    """What was exported, and the table of the artifacts that agree with PyTorch, as Markdown without a header."""
    return "\n".join([*_about(report), "", *_signature(report), "", *_artifacts(report, report.publishable)])


def _metadata(agreed: Sequence[Outcome], license_id: str) -> Iterator[str]:
    """The header that the hub reads, in YAML, of which JSON is a subset."""
    yield "---"
    if license_id:
        yield f"license: {json.dumps(license_id)}"
    yield f"tags: {json.dumps(['polyexport', *(outcome.format for outcome in agreed)])}"
    yield from ("---", "")


def _about(report: Report) -> Iterator[str]:
    checkpoint, model = report.checkpoint, report.model
    if model:
        yield f"{escape.code(model.class_name)}, {model.parameters:,} parameters,"
    at = f", epoch {checkpoint.epoch}, step {checkpoint.global_step}" if checkpoint.epoch is not None else ""
    score = ""
    if checkpoint.monitor and checkpoint.score is not None:
        score = f", {escape.markdown(checkpoint.monitor)} {checkpoint.score:.6g}"
    yield f"exported from {escape.code(title(report))} (SHA-256 `{checkpoint.sha256}`{at}{score})."


def _signature(report: Report) -> Iterator[str]:
    if report.model:
        for kind, tensors in (("input", report.model.inputs), ("output", report.model.outputs)):
            yield from (f"* {kind} {escape.code(str(tensor))}" for tensor in tensors)
        if embedded := tables.embedded(report.model, report.publishable):
            yield from ("", f"In each artifact: {escape.markdown(embedded)}.")


def _artifacts(report: Report, agreed: Sequence[Outcome]) -> Iterator[str]:
    """The table, and what its columns mean."""
    shown = [{name: row[name] for name in _COLUMNS} for row in rows(report)]
    yield from tables.markdown(_of(agreed, shown))
    yield ""
    yield "Each artifact was loaded by its own runtime in a new process, and compared with PyTorch on validation data."
    for outcome in agreed:
        if outcome.reason:
            yield f"{outcome.format} is {outcome.shown_state}: {escape.markdown(outcome.reason)}."
    if measured := report.baseline:
        yield f"Latency: batch {measured.batch}, {measured.threads} threads, {escape.markdown(measured.device)}."
    yield ""


def _of(agreed: Sequence[Outcome], table: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of PyTorch and of the artifacts in `agreed`."""
    names = {"eager", *(outcome.format for outcome in agreed)}
    return [row for row in table if row["format"] in names]


def _loading(agreed: Sequence[Outcome], repository: str) -> Iterator[str]:
    yield from _code(
        "python",
        "import polyexport\nfrom huggingface_hub import snapshot_download\n\n"
        f"folder = snapshot_download({json.dumps(repository)})\n"
        f'run = polyexport.load(f"{{folder}}/{agreed[0].format}")  # named arrays to named arrays',
    )
    yield "Without polyexport, in the downloaded folder:"
    for outcome in agreed:
        for snippet in snippets(outcome)[:1]:
            yield from ("", f"### {outcome.format}", "", *_code(snippet.language.lower(), snippet.code))


def _code(language: str, code: str) -> Iterator[str]:
    around = escape.fence(code, 3)
    yield from (f"{around}{language}", code.strip(), around, "")
