"""The report of an export: the record behind `report.json` (version 2), and its tables."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from polyexport.errors import BadRequest
from polyexport.measure.budget import Budget, losses
from polyexport.measure.latency import Latency, is_quiet
from polyexport.report import escape, tables
from polyexport.report.folders import BEST, finished, followed, inside
from polyexport.report.outcome import Checkpoint, Model, Note, Outcome
from polyexport.serialization import read_record

VERSION = 2
"""Version of the form of `report.json`."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one export.

    `metrics` are PyTorch's own, to compare those of outcomes with; `budget` is how much worse those may be. `folder` is
    the export's folder and not part of the file.
    """

    checkpoint: Checkpoint
    model: Model | None
    outcomes: tuple[Outcome, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    baseline: Latency | None = None
    notes: tuple[Note, ...] = ()
    seconds: float = 0.0
    version: int = VERSION
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    budget: Mapping[str, Budget] = field(default_factory=dict)
    folder: Path = field(default=Path(), metadata={"json": False})

    def __getitem__(self, name: str) -> Outcome:
        """The outcome of one format, by its name.

        Raises:
            KeyError: the format was not asked for.
        """
        for outcome in self.outcomes:
            if outcome.format == name:
                return outcome
        raise KeyError(f"no outcome for {name!r}; this report has {', '.join(o.format for o in self.outcomes)}")

    def __str__(self) -> str:
        """The report as Markdown, as in `report.md`."""
        return markdown(self)

    _repr_markdown_ = __str__  # used by notebooks

    def _repr_html_(self) -> str | None:
        """The page for a notebook; None if it was not written, and Markdown is shown."""
        try:
            page = (self.folder / "report.html").read_text(encoding="utf-8")
        except OSError:
            return None
        # sandboxed, since a page by somebody else must not reach the notebook
        about = 'title="export report" width="100%" height="700"'
        return f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page)}" {about}></iframe>'

    @property
    def is_quiet(self) -> bool:
        """Whether latencies can be compared: the machine was idle while they were measured."""
        timed = [self.baseline, *(outcome.latency for outcome in self.outcomes)]
        return is_quiet(latency for latency in timed if latency is not None)

    def pareto(self) -> tuple[Outcome, ...]:
        """The `verified` artifacts that no other one beats in median latency, max error and size at once.

        Latencies that were measured on a busy machine do not count.
        """
        costs = [(outcome, self._costs(outcome)) for outcome in self.outcomes if outcome.state == "verified"]
        return tuple(one for one, cost in costs if not any(_beats(other, cost) for _, other in costs))

    @property
    def fastest(self) -> Outcome | None:
        """The fastest `verified` artifact; None if nothing was timed on an idle machine."""
        best = self.best()
        return best if best is not None and best.latency is not None and self.is_quiet else None

    @property
    def publishable(self) -> tuple[Outcome, ...]:
        """The outcomes whose artifacts agreed with PyTorch."""
        return tuple(outcome for outcome in self.outcomes if outcome.publishable)

    def best(
        self,
        *,
        max_error: float | None = None,
        max_ms: float | None = None,
        max_bytes: int | None = None,
        max_drop: float | None = None,
    ) -> Outcome | None:
        """The artifact to deploy: the fastest `verified` one within the limits, then the closest, then the smallest.

        It is on the Pareto front. `degraded` ones are left out, since they lack something that was asked for.

        Args:
            max_error: Largest allowed `parity.max_abs_error`.
            max_ms: Largest allowed median latency in milliseconds.
            max_bytes: Largest allowed size in bytes.
            max_drop: How much worse each metric with a budget may be than PyTorch's, in its own unit.

        Returns:
            None if none is within the limits; a value that was not measured, or on a busy machine, is within no limit.
        """
        limits = (max_ms, max_error, max_bytes)
        fitting = [
            outcome
            for outcome in self.pareto()
            if (max_drop is None or self._drop(outcome) <= max_drop)
            and all(limit is None or cost <= limit for cost, limit in zip(self._costs(outcome), limits, strict=True))
        ]
        return min(fitting, key=self._costs, default=None)

    def _drop(self, outcome: Outcome) -> float:
        """How much worse the worst metric with a budget is than PyTorch's; infinite if it was not measured."""
        lost = losses(self.budget, self.metrics, outcome.metrics).values()
        return max((math.inf if each is None else each for each in lost), default=math.inf)

    def _costs(self, outcome: Outcome) -> tuple[float, float, float]:
        """Median latency, max error and size: lower is better; infinite if not measured."""
        measured = (
            outcome.latency.p50_ms if outcome.latency and self.is_quiet else None,
            outcome.parity.max_abs_error if outcome.parity else None,
            outcome.artifact.bytes if outcome.artifact else None,
        )
        a, b, c = (math.inf if figure is None else float(figure) for figure in measured)
        return a, b, c

    @staticmethod
    def load(folder: str | Path) -> Report:
        """Read the report in `folder`: an export, or the link `best`.

        Raises:
            FileNotFoundError: there is no report.
            BadRequest: it is not a report of this version, or names files outside of `folder`.
        """
        folder = followed(Path(folder))
        if folder.is_file():
            names = f", or the name of one next to it in a file called {BEST}"
            raise BadRequest(f"{folder} is a file; give the folder of an export{names if folder.name == BEST else ''}")
        report = replace(read_record(Report, folder / "report.json", VERSION), folder=folder.resolve())
        for outcome in report.outcomes:
            artifact = [outcome.artifact.path] if outcome.artifact else []
            for path in filter(None, [outcome.format, outcome.log, *artifact]):
                inside(report.folder, path)
        return report


def _beats(ours: tuple[float, float, float], theirs: tuple[float, float, float]) -> bool:
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def history(report: Report) -> list[Report]:
    """The exports of one training run, by step, with `report` as the last: those that are next to it on disk.

    It includes exports from before the run was resumed, but not those of other runs in the same folder, whose
    checkpoints are in another folder.
    """
    run, found = _run(report), []
    for folder in finished(report.folder.parent) if report.checkpoint.path else ():
        try:
            each = Report.load(folder)
        except (OSError, BadRequest):
            continue  # it was just removed, or written by another version
        if each.folder != report.folder.resolve() and _run(each) == run:
            found.append(each)
    return [*sorted(found, key=lambda each: each.checkpoint.global_step or 0), report]


def _run(report: Report) -> Path:
    """The folder of a run's checkpoints: the checkpoint's path without the parts that name the export."""
    path = Path(report.checkpoint.path)
    for depth, folder in enumerate(path.parents):
        if "-".join([*path.parts[len(path.parts) - depth - 1 : -1], path.stem]) == report.folder.name:
            return folder
    return path.parent


def eager(report: Report) -> Outcome | None:
    """PyTorch itself as an outcome, if it was timed."""
    if report.baseline is None:
        return None
    return Outcome(
        "eager", "float32", "verified", latency=replace(report.baseline, speedup=1.0 if report.is_quiet else None)
    )


def figures(report: Report) -> list[dict[str, tables.Figure]]:
    """The rows that every sink shows: one per format in the order of the report, eager PyTorch first if it was timed.

    A value that was not measured is None; errors and the noise floor are absolute, latencies are in milliseconds for
    `batch` rows.
    """
    table = [tables.figures(outcome) | {"metric_change": _change(report, outcome)} for outcome in report.outcomes]
    baseline = eager(report)
    if baseline:
        table.insert(0, tables.figures(baseline) | {"metric_change": None, "state": "baseline"})
    return table


def _change(report: Report, outcome: Outcome) -> str | None:
    """The difference of each metric with a budget from PyTorch's; None if it was not measured."""
    found = ((name, outcome.metrics.get(name), report.metrics.get(name)) for name in report.budget)
    return ", ".join(f"{name} {tables.change(mine, ours)}" for name, mine, ours in found if mine is not None) or None


def columns(report: Report) -> Mapping[str, tables.Column]:
    """The columns of the report's table: with a budget, metric changes have one too."""
    return {name: column for name, column in tables.COLUMNS.items() if report.budget or name != tables.CHANGE}


def rows(report: Report) -> list[dict[str, str]]:
    """The figures, formatted for a table."""
    return [tables.written(row, columns(report)) for row in figures(report)]


def metrics(report: Report) -> list[dict[str, str]]:
    """The validation metrics of PyTorch and of every runtime that has them, with the difference from PyTorch's."""
    if not report.metrics:
        return []
    table = [{"format": "eager", **{name: tables.metric(value) for name, value in report.metrics.items()}}]
    for outcome in report.outcomes:
        if outcome.metrics:
            found = ((name, outcome.metrics.get(name), value) for name, value in report.metrics.items())
            table.append(
                {"format": outcome.format, **{name: tables.metric(mine, value) for name, mine, value in found}}
            )
    return table


def rounds(report: Report, outcome: Outcome) -> list[dict[str, str]]:
    """The artifacts that were tried while a format was outside its budget, one row per round."""
    return [
        {
            "layers back to float": f"{each.share:.1%}" if each.share else "as first made",
            "size": tables.size(each.bytes),
            "p50 ms": tables.milliseconds(each.p50_ms),
            **{name: tables.metric(each.metrics.get(name), value) for name, value in report.metrics.items()},
            "stayed": "yes" if each.chosen else "",
            "about": escape.printable(each.remark),
        }
        for each in outcome.rounds
    ]


def proofs(report: Report) -> list[dict[str, str]]:
    """The results on other machines, one row for each proof."""
    return [
        {
            "format": outcome.format,
            "verified by": escape.printable(proof.verified_by),
            "state": proof.judgement.state,
            "max error": tables.error(proof.parity.max_abs_error),
            "p50 ms": tables.milliseconds(proof.latency.p50_ms),
            "p95 ms": tables.milliseconds(proof.latency.p95_ms),
            "batch": str(proof.latency.batch),
        }
        for outcome in report.outcomes
        for proof in outcome.proofs
    ]


def markdown(report: Report) -> str:
    """The report as Markdown: what was exported, the table, the notes, how to reproduce each step."""
    lines = ["# Export report", "", *_exported(report), *tables.markdown(rows(report)), "", *_measured(report)]
    lines += [f"* {escape.markdown(note.text)}" for note in report.notes] + ([""] if report.notes else [])
    return escape.printable("\n".join([*lines, *_commands(report), ""]))


def _exported(report: Report) -> Iterator[str]:
    """The checkpoint, and the model with its signature."""
    checkpoint, model = report.checkpoint, report.model
    about = [f"Checkpoint {escape.code(checkpoint.path)}"]
    if checkpoint.epoch is not None:
        about.append(f"epoch {checkpoint.epoch}, step {checkpoint.global_step}")
    if checkpoint.monitor and checkpoint.score is not None:
        about.append(f"{escape.markdown(checkpoint.monitor)} {checkpoint.score:.6g}")
    yield from (", ".join(about) + ".", "")
    if model:
        signature = f"({', '.join(map(str, model.inputs))}) → ({', '.join(map(str, model.outputs))})"
        yield f"{escape.code(model.class_name)}, {model.parameters:,} parameters: {escape.code(signature)}"
        yield ""
        if embedded := tables.embedded(model, report.outcomes):
            yield from (f"In each artifact: {escape.markdown(embedded)}.", "")


def _measured(report: Report) -> Iterator[str]:
    """The metrics, the rounds of the budget, other machines, and how latency was measured."""
    if report.metrics:
        title = "Validation metrics, with each runtime in place of `forward`:"
        yield from (title, "", *tables.markdown(metrics(report)), "")
    for outcome in (each for each in report.outcomes if each.rounds):
        title = f"Rounds of {outcome.format}, which was outside the budget at first:"
        yield from (title, "", *tables.markdown(rounds(report, outcome)), "")
    if elsewhere := proofs(report):
        yield from ("On other machines, by `polyexport kit`:", "", *tables.markdown(elsewhere), "")
    if measured := report.baseline:
        yield (
            f"Latency: batch {measured.batch}, {measured.threads} threads, {escape.markdown(measured.device)}, "
            f"{measured.samples} calls per format in alternating rounds."
        )
        yield ""


def _commands(report: Report) -> list[str]:
    """The commands that reproduce each outcome, as a block of code."""
    commands = "\n".join(
        escape.printable(f"{outcome.reproduce}  # {outcome.format}").replace("\n", " ")
        for outcome in report.outcomes
        if outcome.reproduce
    )
    around = escape.fence(commands, 3)
    return ["## Reproduce", "", f"{around}sh", *filter(None, [commands]), around]
