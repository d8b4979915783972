"""The result of each format of an export, and what was exported: the records of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

from polyexport.measure.latency import Latency
from polyexport.measure.layers import Layer
from polyexport.measure.parity import Parity
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import ExportSpec, Precision, TensorSpec

State = Literal["verified", "degraded", "unverified", "mismatch", "failed", "skipped"]
"""The state of a format.

`verified`: loaded from disk in a fresh process and agreed with PyTorch. `degraded`: verified, but something asked for
was dropped. `unverified`: made, but nothing here can prove it. `mismatch`: runs, disagrees. `failed`: the conversion
failed, crashed or hung. `skipped`: a tool is missing, or the format that it is made from failed.
"""

STATES: tuple[State, ...] = get_args(State)
"""All states, the best one first."""

PUBLISHABLE: tuple[State, ...] = ("verified", "degraded")
"""The states of an artifact that agreed with PyTorch."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """The artifact of a format. `path` is relative to the report's folder; `sha256` covers file names and contents."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Where a format was made: the toolchain's name and the versions of the packages it pins."""

    name: str
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The batches that a format was calibrated with.

    Attributes:
        batches: The files, relative to the export's folder.
        rows: Their total number of rows.
        left_out: Files that were not used, since they have NaN or infinity.
    """

    batches: tuple[str, ...]
    rows: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In words, for a note."""
        taken = f"{_counted(len(self.batches), 'batch', 'batches')} of {_counted(self.rows, 'row', 'rows')} in all"
        without = f"; {', '.join(self.left_out)} left out, which has NaN or infinity" if self.left_out else ""
        return f"calibrated with {taken} ({', '.join(self.batches)}){without}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The state of a format with its reason, and its parity if it was run."""

    state: State
    reason: str
    parity: Parity | None


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of an artifact on another machine: `proof.json`, for `polyexport accept` (see `polyexport.kit`).

    Attributes:
        format: The format's name.
        sha256: Hash of the artifact's folder there, as `Artifact.sha256`.
        data: SHA-256 of each file that it was compared with, by its path in the export.
        tolerance: The tolerance that parity was judged by.
        runtime: The package that ran it, with its version: `onnxruntime 1.23.2`.
        machine: System and processor: `macOS 15.2, Apple M3`.
        parity: Agreement with PyTorch's outputs.
        elsewhere: If it disagrees only on batches of other values, on which and how; else empty.
        shortfall: What it lacks there of what was asked for; empty if nothing.
        latency: Latency of the validation batch on that machine, which is not compared with others.
        signature: The artifact's own signature; None if it is PyTorch's.
        version: The version of this record's form.
    """

    format: str
    sha256: str
    data: Mapping[str, str]
    tolerance: Tolerance
    runtime: str
    machine: str
    parity: Parity
    elsewhere: str
    shortfall: str
    latency: Latency
    signature: ExportSpec | None = None
    version: int = 1

    @property
    def verified_by(self) -> str:
        """What ran it, and where: `onnxruntime 1.23.2, macOS 15.2, Apple M3`."""
        return f"{self.runtime}, {self.machine}"

    @property
    def judgement(self) -> Judgement:
        """The state and reason that the proof alone gives."""
        if not self.parity.passed:
            return Judgement("mismatch", f"on {self.verified_by}: {self.parity.reason}", self.parity)
        if lost := "; ".join(filter(None, [self.elsewhere, self.shortfall])):
            return Judgement("degraded", f"on {self.verified_by}: {lost}", self.parity)
        return Judgement("verified", "", self.parity)


@dataclass(frozen=True, slots=True)
class Round:
    """An artifact that was tried while the budget was exceeded, with more layers in float than the one before.

    Attributes:
        share: Of its layers that were put back to float, the costliest first; 0 for the artifact as it was first made.
        bytes: Its size.
        metrics: The user's own.
        p50_ms: Its median latency; None where it was not timed.
        remark: Which layers those are, and what each costs.
        chosen: Whether the artifact is the one that stayed.
    """

    share: float
    bytes: int
    metrics: Mapping[str, float | None]
    p50_ms: float | None = None
    remark: str = ""
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one format.

    `seconds` has `convert`, `verify` and `bench`. `log` and `artifact.path` are relative to the report's folder;
    `reproduce` is a shell command that runs the deciding step again and prints its output. `metrics` are those of the
    user's own validation with the artifact in place of PyTorch, if that was asked for. `remark` is what else a reader
    should know of the artifact, such as which operators stay in float. `by_budget` is whether a budget for the user's
    own metric decided on the state, and not parity. `proofs` are those of other machines, one for each, the oldest
    first; `here` is the judgement before the first of them. `layers` are the module's compared with the artifact's, if
    that is a `mismatch`. `rounds` are the artifacts that were tried because the first one was outside a budget.
    `outside` are the processing steps that are not in the artifact, since the format cannot have them.
    """

    format: str
    precision: Precision
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
    calibration: Calibration | None = None
    remark: str = ""
    by_budget: bool = False
    proofs: tuple[Proof, ...] = ()
    here: Judgement | None = None
    layers: tuple[Layer, ...] = ()
    rounds: tuple[Round, ...] = ()
    outside: tuple[str, ...] = ()

    @property
    def publishable(self) -> bool:
        """Whether the artifact agreed with PyTorch."""
        return self.state in PUBLISHABLE

    @property
    def shown_state(self) -> str:
        """The state as it is shown everywhere: `verified off-device` if a stand-in for the runtime agreed."""
        off_device = self.publishable and not self.proofs and self.parity is not None and self.parity.off_device
        return f"{self.state} off-device" if off_device else self.state


_OUTSIDE = {
    "preprocess": "begins behind preprocess, which the application has to run first",
    "postprocess": "ends in front of postprocess, which the application has to run on its outputs",
}


def lacking(outside: Sequence[str]) -> str:
    """What it means for an application that processing steps are not in the artifact."""
    return ", and ".join(_OUTSIDE[step] for step in outside)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights that were exported. `score` is the value of `monitor`; None if nothing was monitored."""

    path: str
    _: KW_ONLY
    sha256: str = ""
    epoch: int | None = None
    global_step: int | None = None
    monitor: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """The exported module: its class, its parameter count, its signature, and the embedded labels and metadata.

    `processing` has the steps before and after forward, in words.
    """

    class_name: str = field(metadata={"json": "class"})
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    processing: Mapping[str, str] = field(default_factory=dict)


NoteKind = Literal["capture", "batch", "route", "precision", "latency", "metrics"]
"""What a note is about.

`capture`: what was exported and with which arguments. `batch`: the validation batch and PyTorch's outputs. `route`:
why a preferred route was not taken. `precision`: how a low precision was made. `latency`: how formats were timed.
`metrics`: the user's own validation.
"""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a reader of the report should know and that is not part of a format's state."""

    kind: NoteKind
    text: str

    def __str__(self) -> str:
        """The text."""
        return self.text


def notes(kind: NoteKind, *texts: str) -> tuple[Note, ...]:
    """Notes of one kind."""
    return tuple(Note(kind, text) for text in texts)


def of_precisions(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Notes on how low precisions were made, one for all formats that were calibrated with the same batches."""
    alike: dict[str, list[str]] = {}
    for outcome in (each for each in outcomes if each.artifact):
        calibrated = [str(outcome.calibration)] if outcome.calibration else []
        for said in (*calibrated, *([outcome.remark] if outcome.remark else [])):
            alike.setdefault(said, []).append(outcome.format)
    return (f"{', '.join(names)}: {said}" for said, names in alike.items())
