"""What came out: the records behind `report.json` (version 1), and its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from polyexport.latency import Latency
from polyexport.parity import Parity
from polyexport.records import decode, read_json, write_json
from polyexport.spec import TensorSpec

State = Literal["verified", "degraded", "unverified", "mismatch", "failed", "skipped"]
"""What may be said of a format.

`verified`: loaded from disk in a fresh process and agreed with PyTorch. `degraded`: verified, but something asked for
was dropped. `unverified`: made, but nothing here can run it. `mismatch`: runs, disagrees. `failed`: the conversion
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
    `reproduce` is a shell command that runs the deciding step again and prints what it says.
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

    @property
    def publishable(self) -> bool:
        """Whether the artifact agreed with PyTorch."""
        return self.state in PUBLISHABLE


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

    class_name: str
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one export. `folder` is where it lies and is not part of the file."""

    checkpoint: Checkpoint
    model: Model | None
    outcomes: tuple[Outcome, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    baseline: Latency | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    version: int = VERSION
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

    def pareto(self) -> tuple[Outcome, ...]:
        """The `verified` artifacts that no other one beats: in median latency, max error and size at once."""
        candidates = [outcome for outcome in self.outcomes if outcome.state == "verified"]
        return tuple(one for one in candidates if not any(_beats(other, one) for other in candidates))

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
            None where none keeps the limits; a figure that was not measured keeps no limit.
        """
        limits = (max_ms, max_error, max_bytes)
        fitting = [
            outcome
            for outcome in self.pareto()
            if all(limit is None or cost <= limit for cost, limit in zip(_costs(outcome), limits, strict=True))
        ]
        return min(fitting, key=_costs, default=None)

    def save(self) -> None:
        """Write `report.json`, `report.md` and `report.html` into the report's folder."""
        from polyexport.sinks.html import html

        write_json(self.folder / "report.json", self)
        (self.folder / "report.md").write_text(markdown(self), encoding="utf-8")
        html(self)

    @staticmethod
    def load(folder: Path) -> Report:
        """Read the report in `folder`.

        Raises:
            FileNotFoundError: there is none.
        """
        return replace(decode(Report, read_json(folder / "report.json")), folder=folder.resolve())


def _costs(outcome: Outcome) -> tuple[float, float, float]:
    """Median latency, max error and size: less is better; infinite where it was not measured."""
    measured = (
        outcome.latency.p50_ms if outcome.latency else None,
        outcome.parity.max_abs_error if outcome.parity else None,
        outcome.artifact.bytes if outcome.artifact else None,
    )
    a, b, c = (math.inf if figure is None else float(figure) for figure in measured)
    return a, b, c


def _beats(one: Outcome, other: Outcome) -> bool:
    ours, theirs = _costs(one), _costs(other)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


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
    return f"{outcome.format}{route}: {outcome.state}{spent}{made}{because}"


Cell = Callable[[Outcome], str]

COLUMNS: Mapping[str, Cell] = {
    "format": lambda o: o.format,
    "state": lambda o: o.state,
    "route": lambda o: o.route or "",
    "size": lambda o: size(o.artifact.bytes if o.artifact else None),
    "max error": lambda o: error(o.parity.max_abs_error if o.parity else None),
    "noise floor": lambda o: error(o.parity.noise_floor if o.parity else None),
    "p50 ms": lambda o: milliseconds(o.latency.p50_ms if o.latency else None),
    "p95 ms": lambda o: milliseconds(o.latency.p95_ms if o.latency else None),
    "speed-up": lambda o: f"{o.latency.speedup:.2f}×" if o.latency and o.latency.speedup else "",
    "reason": lambda o: o.reason,
}
"""The columns of every table of ours: the terminal's, `report.md`'s, the page's."""

NUMBERS: Mapping[str, Callable[[Outcome], float | None]] = {
    "size": lambda o: o.artifact.bytes if o.artifact else None,
    "max error": lambda o: o.parity.max_abs_error if o.parity else None,
    "noise floor": lambda o: o.parity.noise_floor if o.parity else None,
    "p50 ms": lambda o: o.latency.p50_ms if o.latency else None,
    "p95 ms": lambda o: o.latency.p95_ms if o.latency else None,
    "speed-up": lambda o: o.latency.speedup if o.latency else None,
}
"""The figures behind the columns that hold some."""


def eager(report: Report) -> Outcome | None:
    """PyTorch itself in the shape of a format, where it was timed."""
    if report.baseline is None:
        return None
    return Outcome("eager", "float32", "verified", latency=replace(report.baseline, speedup=1.0))


def rows(report: Report) -> list[dict[str, str]]:
    """One row per format in the order of the report, eager PyTorch first where it was timed."""
    table = [{name: cell(outcome) for name, cell in COLUMNS.items()} for outcome in report.outcomes]
    baseline = eager(report)
    if baseline:
        table.insert(0, {name: cell(baseline) for name, cell in COLUMNS.items()} | {"state": "baseline"})
    return table


def markdown(report: Report) -> str:
    """The report as Markdown: what was exported, the table, the notes, how to reproduce each step."""
    checkpoint, model = report.checkpoint, report.model
    about = [f"Checkpoint `{checkpoint.path}`"]
    if checkpoint.epoch is not None:
        about.append(f"epoch {checkpoint.epoch}, step {checkpoint.global_step}")
    if checkpoint.monitor and checkpoint.score is not None:
        about.append(f"{checkpoint.monitor} {checkpoint.score:.6g}")
    lines = ["# Export report", "", ", ".join(about) + ".", ""]
    if model:
        signature = f"({', '.join(map(str, model.inputs))}) → ({', '.join(map(str, model.outputs))})"
        lines += [f"`{model.class_name}`, {model.parameters:,} parameters: `{signature}`", ""]
    lines += [*_markdown_table(rows(report)), ""]
    if report.baseline:
        measured = report.baseline
        lines += [
            f"Latency: batch {measured.batch}, {measured.threads} threads, {measured.device}, "
            f"{measured.samples} calls per format in alternating rounds.",
            "",
        ]
    lines += [f"* {note}" for note in report.notes] + ([""] if report.notes else [])
    lines += ["## Reproduce", "", "```sh"]
    lines += [f"{outcome.reproduce}  # {outcome.format}" for outcome in report.outcomes if outcome.reproduce]
    return "\n".join([*lines, "```", ""])


def _markdown_table(table: Sequence[Mapping[str, str]]) -> Iterable[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in table:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()) + " |"
