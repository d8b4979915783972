"""`manifest.json` (version 1): what an export was asked for and what every artifact of it has to answer.

Whoever finds an artifact learns here where it comes from and how it is called; `polyexport verify` and `bench` read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyexport.errors import BadRequest
from polyexport.report.folders import inside
from polyexport.report.outcome import Checkpoint, Outcome, Toolchain
from polyexport.serialization import read_record, write_json
from polyexport.spec import Batch, ExportSpec, Precision, TensorSpec

MANIFEST = "manifest.json"
VERSION = 1
"""Of the form of `manifest.json`."""


@dataclass(frozen=True, slots=True)
class Made:
    """An artifact: where it lies, relative to the export's folder, and its own signature."""

    path: str
    precision: Precision
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    toolchain: Toolchain | None = None

    @staticmethod
    def of(outcomes: tuple[Outcome, ...]) -> dict[str, Made]:
        """The artifacts of an export by format."""
        return {
            each.format: Made(each.artifact.path, each.precision, each.inputs, each.outputs, each.toolchain)
            for each in outcomes
            if each.artifact
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """What someone has to know who finds an artifact.

    Attributes:
        checkpoint: Where the weights come from.
        question: What makes another export of the same weights a different one: formats, dynamic axes, calibration.
        spec: PyTorch's own signature.
        batches: Inputs with PyTorch's answers, the validation batch first.
        noise: File with the noise floor of each element of the validation batch's outputs; empty where it is unknown.
        environment: Versions of the packages and the machine that computed the answers.
        artifacts: What was made, by format.
        seal: Proves to the user who made it that it is theirs (see `polyexport.engine.ownership`); of no use to others.
        version: Of this record's form.
    """

    checkpoint: Checkpoint
    question: Mapping[str, Any]
    spec: ExportSpec
    batches: tuple[Batch, ...]
    noise: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Made] = field(default_factory=dict)
    seal: str = ""
    version: int = VERSION


def save(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the export in `folder`."""
    write_json(folder / MANIFEST, manifest)


def load(folder: Path) -> Manifest:
    """Read the manifest of the export in `folder`.

    Raises:
        BadRequest: there is none, since the module could not be rebuilt; or it is no manifest of this version, or names
            files outside of `folder`.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise BadRequest(f"{folder} has no {MANIFEST}: its module could not be rebuilt")
    manifest = read_record(Manifest, file, VERSION)
    made = (artifact.path for artifact in manifest.artifacts.values())
    for path in (manifest.noise, *(batch.path for batch in manifest.batches), *made):
        inside(folder, path)
    return manifest
