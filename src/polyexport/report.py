"""What came out: the records behind `report.json` (version 1), and its tables."""

from __future__ import annotations

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

    def save(self) -> None:
        """Write `report.json` and `report.md` into the report's folder."""
        write_json(self.folder / "report.json", self)
        (self.folder / "report.md").write_text(markdown(self), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Report:
        """Read the report in `folder`.

        Raises:
            FileNotFoundError: there is none.
        """
        return replace(decode(Report, read_json(folder / "report.json")), folder=folder.resolve())


# --- tables -----------------------------------------------------------------------------------------------------------


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def size(count: int | None) -> str:
    """Bytes in the unit that a reader expects: `1.6 MB` (powers of 1000)."""
    if count is None:
        return ""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} B"


Cell = Callable[[Outcome], str]

COLUMNS: Mapping[str, Cell] = {
    "format": lambda o: o.format,
    "state": lambda o: o.state,
    "route": lambda o: o.route or "",
    "size": lambda o: size(o.artifact.bytes if o.artifact else None),
    "max error": lambda o: _error(o.parity.max_abs_error if o.parity else None),
    "noise floor": lambda o: _error(o.parity.noise_floor if o.parity else None),
    "p50 ms": lambda o: _milliseconds(o.latency.p50_ms if o.latency else None),
    "p95 ms": lambda o: _milliseconds(o.latency.p95_ms if o.latency else None),
    "speed-up": lambda o: f"{o.latency.speedup:.2f}×" if o.latency and o.latency.speedup else "",
    "reason": lambda o: o.reason,
}
"""The columns of every table of ours: the terminal's, `report.md`'s."""


def rows(report: Report) -> list[dict[str, str]]:
    """One row per format in the order of the report, eager PyTorch first where it was timed."""
    table = [{name: cell(outcome) for name, cell in COLUMNS.items()} for outcome in report.outcomes]
    if report.baseline:
        eager = Outcome("eager", "float32", "verified", latency=report.baseline)
        row = {name: cell(eager) for name, cell in COLUMNS.items()}
        table.insert(0, row | {"state": "baseline", "speed-up": "1.00×"})
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
