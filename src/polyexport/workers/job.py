"""Jobs for workers, as they are stored on disk: one record for each kind."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyexport.serialization import decode, encode, read_json, write_json
from polyexport.spec import Batch, ExportSpec

TEMPORARY = "POLYEXPORT_TEMPORARY"
"""The environment variable with a worker's own folder for temporary files, which it may remove."""

PARENT = "POLYEXPORT_PARENT"
"""The environment variable with the id of the process that started a worker, with which it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The fields of every job. Paths are relative to the export's folder.

    Attributes:
        source: What it reads: an artifact, or the folder of a module.
        threads: Number of threads of the runtime.
        sys_path: The training process's import path, for modules that are pickled by reference.
        script: The file that the training process runs, which no worker may import; empty if it may.
        trusted: Whether the files that it reads may be unpickled, which can run any code.
    """

    source: str = "source"
    threads: int = 1
    sys_path: tuple[str, ...] = ()
    script: str = ""
    trusted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare(Job):
    """Run PyTorch: make the reference; see `polyexport.measure.reference.make`.

    Attributes:
        outside: The processing steps to leave out; what is left is written to `capture.processing.part(outside)`.
    """

    dynamic: Any = True
    git_commit: str = ""
    sha256: str = ""
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect(Job):
    """Run PyTorch and write the outputs of its layers; see `polyexport.capture.layers`.

    Attributes:
        batch: File with the inputs.
        target: Folder for the `INSPECTED`.
    """

    batch: str
    target: str


INSPECTED = LAYERS, OUTPUTS, NOISE, READS = "layers.npz", "outputs.npz", "noise.npz", "reads.json"
"""Files with the outputs of PyTorch's layers, its outputs, the noise floors, and which layer reads which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatJob(Job):
    """A job for one format.

    Attributes:
        format: Its name; None for PyTorch itself as a runtime.
        declared: File with the pickled `Format`, if it is the user's own; else None.
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
        target: The artifact's path.
        packages: Requirements whose versions the report lists.
    """

    route: str
    target: str
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(FormatJob):
    """Load an artifact, run it, compare it with PyTorch.

    Attributes:
        batches: Arrays with inputs and reference outputs, the validation batch first, each with its dynamic sizes.
        noise: File with the noise floor of each element of the validation batch's outputs; empty if it is unknown.
    """

    batches: tuple[Batch, ...]
    noise: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench(FormatJob):
    """Time an artifact on the inputs in the file `batch`, in rounds on request.

    Attributes:
        batch: File with the inputs.
        one_row: Whether calls with its first row are timed too, if the artifact takes that.
    """

    batch: str
    one_row: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Explain(FormatJob):
    """Compare an artifact's intermediate tensors with PyTorch's layers.

    Attributes:
        batch: File with the inputs.
        layers: Folder with the files of an `Inspect` job.
    """

    batch: str
    layers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve(FormatJob):
    """Run an artifact on inputs on request."""


def proofs(batches: Sequence[Batch], *, dynamic: bool, made_up: bool) -> tuple[Batch, ...]:
    """The batches to verify an artifact with: static ones need the first's sizes; `made_up` values only if asked."""
    return tuple(batch for batch in batches if (dynamic or batch.sizes == batches[0].sizes) and (made_up or batch.real))


def module_of(batch: str) -> str:
    """The folder of the module whose outputs are in the first batch; both are relative to the export's folder."""
    return Path(batch).with_name("source").as_posix()


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
    """The files that a job reads besides its source."""
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
    """Path of a job's result."""
    return job_path.with_suffix(".result.json")


def reproduce(command: tuple[str, ...], job_path: Path) -> str:
    """The shell command that runs a job again without changing the export."""
    return shlex.join([*command, str(job_path), "--scratch"])
