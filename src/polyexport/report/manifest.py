"""`manifest.json` (version 1): the request of an export, and the batches that every artifact is verified with.

It says where an artifact comes from and what its inputs are; `polyexport verify` and `bench` read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyexport.errors import BadRequest
from polyexport.report.folders import inside
from polyexport.report.outcome import Checkpoint, Outcome, Toolchain
from polyexport.serialization import read_record, write_json
from polyexport.spec import Batch, ExportSpec, Precision, TensorSpec

MANIFEST = "manifest.json"
VERSION = 1
"""Version of the form of `manifest.json`."""


@dataclass(frozen=True, slots=True)
class Made:
    """An artifact: its path relative to the export's folder, and its own signature."""

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
class Part:
    """The module without processing steps that a format cannot have; fields as in `Manifest`."""

    spec: ExportSpec
    batches: tuple[Batch, ...]
    noise: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The origin and signature of the artifacts.

    Attributes:
        checkpoint: The checkpoint of the weights.
        question: What has to be equal, beside the validation batch and its outputs, for an export of the same weights
            to be reused: formats, dynamic axes, calibration.
        spec: PyTorch's own signature.
        batches: Inputs with PyTorch's outputs, the validation batch first.
        noise: File with the noise floor of each element of the validation batch's outputs; empty if it is unknown.
        environment: Versions of the packages and the machine that computed the outputs.
        artifacts: The artifacts, by format.
        parts: For each format whose artifact lacks processing steps, the module without them.
        seal: Shows the user who made the export that it is theirs (see `polyexport.engine.ownership`).
        version: The version of this record's form.
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
    parts: Mapping[str, Part] = field(default_factory=dict)

    def of(self, name: str) -> Manifest:
        """The manifest with signature and batches of what one format's artifact has."""
        part = self.parts.get(name)
        return self if part is None else replace(self, spec=part.spec, batches=part.batches, noise=part.noise)

    @property
    def data(self) -> set[str]:
        """All files with inputs, outputs and noise floors, relative to the export's folder."""
        every: tuple[Manifest | Part, ...] = (self, *self.parts.values())
        return {path for one in every for path in (one.noise, *(batch.path for batch in one.batches)) if path}


def save(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the export in `folder`."""
    write_json(folder / MANIFEST, manifest)


def load(folder: Path) -> Manifest:
    """Read the manifest of the export in `folder`.

    Raises:
        BadRequest: there is none, since the module could not be rebuilt; or it is not a manifest of this version, or
            names files outside of `folder`.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise BadRequest(f"{folder} has no {MANIFEST}: its module could not be rebuilt")
    manifest = read_record(Manifest, file, VERSION)
    made = (artifact.path for artifact in manifest.artifacts.values())
    for path in (*manifest.data, *made):
        inside(folder, path)
    return manifest
