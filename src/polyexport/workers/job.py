"""What is asked of a worker, as it lies on disk: one record for each kind of job."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyexport.serialization import decode, encode, read_json, write_json
from polyexport.spec import Batch, ExportSpec

TEMPORARY = "POLYEXPORT_TEMPORARY"
"""The variable that tells a worker its own folder for temporary files, which it may remove."""

PARENT = "POLYEXPORT_PARENT"
"""The variable that tells a worker the id of the process that started it, with which it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every job has. Its files are named relative to the export's folder.

    Attributes:
        source: What is read: an artifact, or the folder of a module.
        threads: Of the runtime.
        sys_path: The training process's import path, for modules that are pickled by reference.
        script: The file that the training process runs, which no worker may import; empty where it may.
        trusted: Whether what it reads may be unpickled, and so run code: not in an export of somebody else.
    """

    source: str = "source"
    threads: int = 1
    sys_path: tuple[str, ...] = ()
    script: str = ""
    trusted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare(Job):
    """Run PyTorch: make the reference; see `polyexport.measure.reference.make`."""

    dynamic: Any = True
    git_commit: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect(Job):
    """Run PyTorch and write what its layers compute; see `polyexport.capture.layers`.

    Attributes:
        batch: File with the inputs.
        target: Folder for the `INSPECTED`.
    """

    batch: str
    target: str


INSPECTED = LAYERS, OUTPUTS, NOISE, READS = "layers.npz", "outputs.npz", "noise.npz", "reads.json"
"""What PyTorch's layers compute, its outputs, how much of both is rounding, and which layer reads which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatJob(Job):
    """What concerns one format.

    Attributes:
        format: Its name; None where PyTorch itself is meant, as a runtime like the others.
        declared: File with the pickled `Format`, for one that is not ours.
        spec: The signature.
    """

    format: str | None
    declared: str | None = None
    spec: ExportSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert(FormatJob):
    """Write an artifact.

    Attributes:
        route: The route's name.
        target: The artifact.
        packages: Requirements whose versions the report is to name.
    """

    route: str
    target: str
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(FormatJob):
    """Load an artifact, run it, compare it with PyTorch.

    Attributes:
        batches: Arrays with inputs and reference outputs, the validation batch first, each with its dynamic sizes.
        noise: File with the noise floor of each element of the validation batch's outputs; empty where it is unknown.
    """

    batches: tuple[Batch, ...]
    noise: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench(FormatJob):
    """Time an artifact on the inputs in the file `batch`, in rounds that are asked for.

    Attributes:
        batch: The file.
        one_row: Whether its first row alone is timed too, where the artifact takes that.
    """

    batch: str
    one_row: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Explain(FormatJob):
    """Compare what an artifact computes on its way with PyTorch's layers.

    Attributes:
        batch: File with the inputs.
        layers: Folder with what `Inspect` wrote of them.
    """

    batch: str
    layers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve(FormatJob):
    """Run an artifact on whatever is asked."""


def proofs(batches: Sequence[Batch], *, dynamic: bool, made_up: bool) -> tuple[Batch, ...]:
    """The batches that an artifact has to answer: of fixed sizes those of the first; `made_up` values only if asked."""
    return tuple(batch for batch in batches if (dynamic or batch.sizes == batches[0].sizes) and (made_up or batch.real))


_KINDS: Mapping[str, type[Job]] = {
    kind.__name__.lower(): kind for kind in (Prepare, Convert, Verify, Bench, Inspect, Explain, Serve)
}


def write_job(path: Path, job: Job) -> None:
    """Write a job's file."""
    write_json(path, {"kind": type(job).__name__.lower(), **encode(job)})


def read_job(path: Path) -> Job:
    """Read a job's file."""
    given = read_json(path)
    return decode(_KINDS[given["kind"]], given)


def files_named_by(job: Job) -> list[str]:
    """The files that a job reads beside its source."""
    named: list[str] = []
    if isinstance(job, FormatJob):
        named += [*filter(None, [job.declared]), *(path.as_posix() for path in job.spec.calibration)]
    if isinstance(job, Verify):
        named += [*(batch.path for batch in job.batches), *filter(None, [job.noise])]
    if isinstance(job, Bench | Inspect | Explain):
        named.append(job.batch)
    if isinstance(job, Explain):
        named += [f"{job.layers}/{name}" for name in INSPECTED]
    return named


def result_path(job_path: Path) -> Path:
    """Where a job's result is written."""
    return job_path.with_suffix(".result.json")


def reproduce(command: tuple[str, ...], job_path: Path) -> str:
    """The shell command that runs a job again without touching the export."""
    return shlex.join([*command, str(job_path), "--scratch"])
