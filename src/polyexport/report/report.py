"""What came out: the records behind `report.json` (version 1), and its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from polyexport.errors import BadRequest
from polyexport.measure.latency import Latency, is_quiet
from polyexport.measure.parity import Parity
from polyexport.report import escape
from polyexport.report.folders import finished, followed, inside
from polyexport.serialization import decode, read_json, write_json, write_text
from polyexport.spec import TensorSpec

State = Literal["verified", "degraded", "unverified", "mismatch", "failed", "skipped"]
"""What may be said of a format.

`verified`: loaded from disk in a fresh process and agreed with PyTorch. `degraded`: verified, but something asked for
was dropped. `unverified`: made, but nothing here can prove it. `mismatch`: runs, disagrees. `failed`: the conversion
failed, crashed or hung. `skipped`: a tool is missing, or its upstream failed.
"""

STATES: tuple[State, ...] = get_args(State)
"""All states, the best one first."""

PUBLISHABLE: tuple[State, ...] = ("verified", "degraded")
"""The states of an artifact that agreed with PyTorch."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class Artifact:
    """What lies in a format's folder. `path` is relative to the report's folder; `sha256` covers names and contents."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Where a format was made: the toolchain's name and the versions of the packages it pins."""

    name: str
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one format.

    `seconds` has `convert`, `verify` and `bench`. `log` and `artifact.path` are relative to the report's folder;
    `reproduce` is a shell command that runs the deciding step again and prints what it says. `metrics` are what the
    user's own validation found with the artifact in place of PyTorch, where that was asked for.
    """

    format: str
    precision: str
    state: State
    reason: str = ""
    route: str | None = None
    artifact: Artifact | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    parity: Parity | None = None
    latency: Latency | None = None
    toolchain: Toolchain | None = None
    log: str | None = None
    reproduce: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def publishable(self) -> bool:
        """Whether the artifact agreed with PyTorch."""
        return self.state in PUBLISHABLE

    @property
    def shown_state(self) -> str:
        """The state as every table, page, tag and line shows it: `verified off-device` where a stand-in agreed."""
        off_device = self.publishable and self.parity is not None and self.parity.off_device
        return f"{self.state} off-device" if off_device else self.state


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights that were exported. `score` is the value of `monitor`; None where nothing was monitored."""

    path: str
    sha256: str = ""
    epoch: int | None = None
    global_step: int | None = None
    monitor: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """The exported module: its class, its parameter count, its signature."""

    class_name: str = field(metadata={"json": "class"})
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one export.

    `metrics` are PyTorch's own, beside which an outcome's stand. `folder` is where it lies and is not part of the file.
    """

    checkpoint: Checkpoint
    model: Model | None
    outcomes: tuple[Outcome, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    baseline: Latency | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    version: int = VERSION
    metrics: Mapping[str, float | None] = field(default_factory=dict)
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

    _repr_markdown_ = __str__  # a notebook draws it

    @property
    def is_quiet(self) -> bool:
        """Whether latencies can be compared: the machine had little else to do while they were measured."""
        timed = [self.baseline, *(outcome.latency for outcome in self.outcomes)]
        return is_quiet(latency for latency in timed if latency is not None)

    def pareto(self) -> tuple[Outcome, ...]:
        """The `verified` artifacts that no other one beats: in median latency, max error and size at once.

        A latency that was measured on a busy machine does not count.
        """
        costs = [(outcome, self._costs(outcome)) for outcome in self.outcomes if outcome.state == "verified"]
        return tuple(one for one, cost in costs if not any(_beats(other, cost) for _, other in costs))

    @property
    def fastest(self) -> Outcome | None:
        """The fastest `verified` artifact; None where nothing was timed on a quiet machine."""
        best = self.best()
        return best if best is not None and best.latency is not None and self.is_quiet else None

    def best(
        self, *, max_error: float | None = None, max_ms: float | None = None, max_bytes: int | None = None
    ) -> Outcome | None:
        """The artifact to deploy: the fastest `verified` one within the limits, then the closest, then the smallest.

        It lies on the Pareto front. `degraded` ones are left out, since they lack something that was asked for.

        Args:
            max_error: Greatest allowed `parity.max_abs_error`.
            max_ms: Greatest allowed median latency.
            max_bytes: Greatest allowed size.

        Returns:
            None where none keeps the limits; a figure that was not measured, or on a busy machine, keeps no limit.
        """
        limits = (max_ms, max_error, max_bytes)
        fitting = [
            outcome
            for outcome in self.pareto()
            if all(limit is None or cost <= limit for cost, limit in zip(self._costs(outcome), limits, strict=True))
        ]
        return min(fitting, key=self._costs, default=None)

    def _costs(self, outcome: Outcome) -> tuple[float, float, float]:
        """Median latency, max error and size: less is better; infinite where it was not measured."""
        measured = (
            outcome.latency.p50_ms if outcome.latency and self.is_quiet else None,
            outcome.parity.max_abs_error if outcome.parity else None,
            outcome.artifact.bytes if outcome.artifact else None,
        )
        a, b, c = (math.inf if figure is None else float(figure) for figure in measured)
        return a, b, c

    def save(self) -> None:
        """Write `report.json`, `report.md` and `report.html` into the report's folder."""
        from polyexport.report.html import html

        write_json(self.folder / "report.json", self)
        write_text(self.folder / "report.md", markdown(self))
        html(self)

    @staticmethod
    def load(folder: str | Path) -> Report:
        """Read the report in `folder`: an export, or the `best` beside it.

        Raises:
            FileNotFoundError: there is none.
            BadRequest: it is no report of this version, or names files outside of `folder`.
        """
        folder = followed(Path(folder))
        file = folder / "report.json"
        try:
            report = replace(decode(Report, read_json(file)), folder=folder.resolve())
            for outcome in report.outcomes:
                artifact = [outcome.artifact.path] if outcome.artifact else []
                for path in filter(None, [outcome.format, outcome.log, *artifact]):
                    inside(report.folder, path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRequest(f"{file} cannot be read: {type(error).__name__}: {error}") from error
        if report.version != VERSION:
            raise BadRequest(f"{file} is of version {report.version}; this release reads version {VERSION}")
        return report


def _beats(ours: tuple[float, float, float], theirs: tuple[float, float, float]) -> bool:
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def history(report: Report) -> list[Report]:
    """The exports of one training run, by step, with `report` as the last: those that lie beside it on disk.

    Those of an earlier part of a resumed run are among them, and those of other runs in the same folder are not: they
    come from another folder of checkpoints.
    """
    run, found = _run(report), []
    for folder in finished(report.folder.parent) if report.checkpoint.path else ():
        try:
            each = Report.load(folder)
        except (OSError, BadRequest):
            continue  # it was removed a moment ago, or another version wrote it
        if each.folder != report.folder.resolve() and _run(each) == run:
            found.append(each)
    return [*sorted(found, key=lambda each: each.checkpoint.global_step or 0), report]


def _run(report: Report) -> Path:
    """The folder of a run's checkpoints: above the parts of a path that the export is called by."""
    path = Path(report.checkpoint.path)
    for depth, folder in enumerate(path.parents):
        if "-".join([*path.parts[len(path.parts) - depth - 1 : -1], path.stem]) == report.folder.name:
            return folder
    return path.parent


# --- tables -----------------------------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    """Three digits, without the unit."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def error(value: float | None) -> str:
    """Two digits and the power of ten, which is what counts; `0` for bit-equal."""
    return "" if value is None else f"{value:.1e}" if value else "0"


def size(count: int | None) -> str:
    """Bytes in the unit that a reader expects: `1.6 MB` (powers of 1000)."""
    if count is None:
        return ""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} B"


def sentence(outcome: Outcome) -> str:
    """One line about a format that has come to its end: `onnx (dynamo): verified in 4.1 s, 93.2 kB`."""
    route = f" ({outcome.route})" if outcome.route else ""
    spent = f" in {sum(outcome.seconds.values()):.1f} s" if outcome.seconds else ""
    made = f", {size(outcome.artifact.bytes)}" if outcome.artifact and outcome.artifact.bytes else ""
    because = f": {outcome.reason.splitlines()[0]}" if outcome.reason else ""
    return escape.printable(f"{outcome.format}{route}: {outcome.shown_state}{spent}{made}{because}")


def eager(report: Report) -> Outcome | None:
    """PyTorch itself in the shape of a format, where it was timed."""
    if report.baseline is None:
        return None
    return Outcome(
        "eager", "float32", "verified", latency=replace(report.baseline, speedup=1.0 if report.is_quiet else None)
    )


Figure = str | int | float | None


def figures(report: Report) -> list[dict[str, Figure]]:
    """What every sink shows: one row per format in the order of the report, eager PyTorch first where it was timed.

    A figure that was not measured is None; errors and the noise floor are absolute, latencies in milliseconds for the
    rows of `batch`.
    """
    table = [_figures(outcome) for outcome in report.outcomes]
    baseline = eager(report)
    if baseline:
        table.insert(0, _figures(baseline) | {"state": "baseline"})
    return table


def _figures(outcome: Outcome) -> dict[str, Figure]:
    artifact, parity, latency = outcome.artifact, outcome.parity, outcome.latency
    return {
        "format": outcome.format,
        "precision": outcome.precision,
        "state": outcome.shown_state,
        "route": outcome.route,
        "bytes": artifact.bytes if artifact else None,
        "max_abs_error": parity.max_abs_error if parity else None,
        "noise_floor": parity.noise_floor if parity else None,
        "batch": latency.batch if latency else None,
        "p50_ms": latency.p50_ms if latency else None,
        "p90_ms": latency.p90_ms if latency else None,
        "p95_ms": latency.p95_ms if latency else None,
        "p99_ms": latency.p99_ms if latency else None,
        "throughput_per_second": latency.throughput_per_second if latency else None,
        "speedup": latency.speedup if latency else None,
        "reason": outcome.reason,
    }


COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "format": ("format", str),
    "state": ("state", str),
    "route": ("route", lambda route: route or ""),
    "size": ("bytes", size),
    "max error": ("max_abs_error", error),
    "noise floor": ("noise_floor", error),
    "p50 ms": ("p50_ms", milliseconds),
    "p95 ms": ("p95_ms", milliseconds),
    "speed-up": ("speedup", lambda factor: f"{factor:.2f}×" if factor else ""),
    "reason": ("reason", str),
}
"""The columns of the terminal's table, `report.md`'s and the page's: which figure, and how it is written."""


def _number(figure: str) -> Callable[[Outcome], Any]:
    return lambda outcome: _figures(outcome)[figure]


NUMBERS: Mapping[str, Callable[[Outcome], float | None]] = {
    column: _number(figure)
    for column, (figure, _) in COLUMNS.items()
    if column not in ("format", "state", "route", "reason")
}
"""The figures behind the columns that hold numbers."""


def rows(report: Report) -> list[dict[str, str]]:
    """The figures as they are written in a table."""
    return [
        {name: escape.printable(write(row[figure])) for name, (figure, write) in COLUMNS.items()}
        for row in figures(report)
    ]


def metrics(report: Report) -> list[dict[str, str]]:
    """The validation metrics of PyTorch and of every runtime that has some, with the difference from PyTorch's."""
    if not report.metrics:
        return []
    table = [{"format": "eager", **{name: _metric(value) for name, value in report.metrics.items()}}]
    for outcome in report.outcomes:
        if outcome.metrics:
            found = ((name, outcome.metrics.get(name), value) for name, value in report.metrics.items())
            table.append({"format": outcome.format, **{name: _metric(mine, value) for name, mine, value in found}})
    return table


def _metric(value: float | None, beside: float | None = None) -> str:
    """One that is no number is None once it was on disk."""
    if value is None or not math.isfinite(value):
        return ""
    if beside is None or not math.isfinite(beside):
        return f"{value:.6g}"
    return f"{value:.6g} ({value - beside:+.1e})"


def markdown(report: Report) -> str:
    """The report as Markdown: what was exported, the table, the notes, how to reproduce each step."""
    checkpoint, model = report.checkpoint, report.model
    about = [f"Checkpoint {escape.code(checkpoint.path)}"]
    if checkpoint.epoch is not None:
        about.append(f"epoch {checkpoint.epoch}, step {checkpoint.global_step}")
    if checkpoint.monitor and checkpoint.score is not None:
        about.append(f"{escape.markdown(checkpoint.monitor)} {checkpoint.score:.6g}")
    lines = ["# Export report", "", ", ".join(about) + ".", ""]
    if model:
        signature = f"({', '.join(map(str, model.inputs))}) → ({', '.join(map(str, model.outputs))})"
        about_it = f"{escape.code(model.class_name)}, {model.parameters:,} parameters: {escape.code(signature)}"
        lines += [about_it, ""]
    lines += [*_markdown_table(rows(report)), ""]
    if report.metrics:
        lines += [
            "Validation metrics, with `forward` answered by each runtime:",
            "",
            *_markdown_table(metrics(report)),
            "",
        ]
    if report.baseline:
        measured = report.baseline
        lines += [
            f"Latency: batch {measured.batch}, {measured.threads} threads, {measured.device}, "
            f"{measured.samples} calls per format in alternating rounds.",
            "",
        ]
    lines += [f"* {escape.markdown(note)}" for note in report.notes] + ([""] if report.notes else [])
    commands = "\n".join(
        escape.printable(f"{outcome.reproduce}  # {outcome.format}").replace("\n", " ")
        for outcome in report.outcomes
        if outcome.reproduce
    )
    around = escape.fence(commands, 3)
    return "\n".join([*lines, "## Reproduce", "", f"{around}sh", *filter(None, [commands]), around, ""])


def _markdown_table(table: Sequence[Mapping[str, str]]) -> Iterable[str]:
    yield "| " + " | ".join(map(escape.markdown, table[0])) + " |"
    yield "|" + "---|" * len(table[0])
    for row in table:
        yield "| " + " | ".join(map(escape.markdown, row.values())) + " |"
