"""What is asked of a worker, as it lies on disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyexport.spec import ExportSpec

Kind = Literal["prepare", "convert", "verify", "bench", "serve"]

TEMPORARY = "POLYEXPORT_TEMPORARY"
"""The variable that tells a worker its own folder for temporary files, which it may remove."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker has to do. `source`, `target` and `batches` are relative to the export's folder.

    Attributes:
        kind: Which of the five jobs.
        format: The format's name; None where PyTorch itself is meant.
        declared: File with the pickled `Format`, for one that is not ours.
        route: The route's name, for `convert`.
        source: What is read: an artifact, or the folder of a module.
        target: What is written, for `convert`.
        spec: The signature.
        batches: Arrays with inputs and reference outputs, the validation batch first, each with its dynamic sizes.
        noise: File with the noise floor of each element of the validation batch's outputs; empty where it is unknown.
        threads: Of the runtime.
        sys_path: The training process's import path, for modules that are pickled by reference.
        trusted: Whether what it reads may be unpickled, and so run code: not in an export of somebody else.
        options: What only one kind of job knows.
    """

    kind: Kind
    format: str | None = None
    declared: str | None = None
    route: str | None = None
    source: str = "source"
    target: str = ""
    spec: ExportSpec | None = None
    batches: tuple[Batch, ...] = ()
    noise: str = ""
    threads: int = 1
    sys_path: tuple[str, ...] = ()
    trusted: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """A file of named arrays, inputs and reference outputs together, and the sizes of its dynamic axes.

    Attributes:
        path: Relative to the export's folder.
        sizes: Size of each dynamic axis.
        label: What its values are, where they are others than those of the validation batch: `rows negated`.
        real: Whether the values are data as it came, and not made from it.
    """

    path: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    label: str = ""
    real: bool = True


def proofs(batches: Sequence[Batch], *, dynamic: bool, made_up: bool) -> tuple[Batch, ...]:
    """The batches that an artifact has to answer: of fixed sizes those of the first; `made_up` values only if asked."""
    return tuple(batch for batch in batches if (dynamic or batch.sizes == batches[0].sizes) and (made_up or batch.real))


def result_path(job_path: Path) -> Path:
    """Where a job's result is written."""
    return job_path.with_suffix(".result.json")


def reproduce(command: tuple[str, ...], job_path: Path) -> str:
    """The shell command that runs a job again without touching the export."""
    return shlex.join([*command, str(job_path), "--scratch"])
