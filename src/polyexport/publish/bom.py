"""`bom.json`: the files of an export and the packages that made it, as a CycloneDX bill of materials (ML-BOM).

https://cyclonedx.org/docs/1.6/json/

The same export gives the same bytes: there is no timestamp, and the serial number is a hash of the content.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyexport.measure.verification import sha256
from polyexport.report.html import title
from polyexport.report.manifest import MANIFEST
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report, figures
from polyexport.serialization import write_json
from polyexport.spec import TensorSpec

BOM = "bom.json"
_MODEL = "model"
_FIGURES = ("state", "precision", "route", "bytes", "max_abs_error", "noise_floor", "p50_ms", "batch")
"""Measurements of an artifact that become properties of its component."""


class BillOfMaterials:
    """A sink that writes `bom.json` into the export's folder."""

    def __call__(self, report: Report) -> None:
        """Write the bill of materials of a report."""
        write_json(report.folder / BOM, bom(report))


def bom(report: Report) -> dict[str, Any]:
    """The bill of materials: the model, each artifact that agrees with PyTorch with its files, and the packages."""
    agreed = report.publishable
    packages = {ref: package for outcome in agreed for ref, package in _packages(outcome)}
    components = [*(_artifact(report, outcome) for outcome in agreed), *packages.values(), *_evidence(report.folder)]
    uses = [{"ref": _MODEL, "dependsOn": [outcome.format for outcome in agreed]}]
    uses += [{"ref": outcome.format, "dependsOn": [ref for ref, _ in _packages(outcome)]} for outcome in agreed]
    content = {
        "metadata": {"tools": {"components": [_tool(report)]}, "component": _model(report)},
        "components": components,
        "dependencies": uses,
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, repr(content))
    about = {"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX"}
    return {**about, "specVersion": "1.6", "serialNumber": f"urn:uuid:{number}", "version": 1, **content}


def _tool(report: Report) -> dict[str, Any]:
    name = "lightning-export"
    return {"type": "application", "name": name, "version": report.environment.get(name, "")}


def _model(report: Report) -> dict[str, Any]:
    """The checkpoint as a model, with its signature and the user's metrics."""
    model, checkpoint = report.model, report.checkpoint
    found: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": _MODEL, "name": title(report)}
    if checkpoint.sha256:
        found["hashes"] = [_hash(checkpoint.sha256)]
    card: dict[str, Any] = {}
    if model:
        inputs, outputs = ([_tensor(each) for each in side] for side in (model.inputs, model.outputs))
        card["modelParameters"] = {"modelArchitecture": model.class_name, "inputs": inputs, "outputs": outputs}
        found["properties"] = _properties({"parameters": model.parameters, **model.metadata})
    scored = {checkpoint.monitor: checkpoint.score} if checkpoint.monitor else {}
    return found | {"modelCard": card | _performance({**scored, **report.metrics})}


def _tensor(tensor: TensorSpec) -> dict[str, str]:
    return {"format": str(tensor)}


def _artifact(report: Report, outcome: Outcome) -> dict[str, Any]:
    """The component of an artifact, with its measurements and files."""
    measured = next(row for row in figures(report) if row["format"] == outcome.format)
    files = sorted(path for path in (report.folder / outcome.format).rglob("*") if path.is_file())
    return {
        "type": "machine-learning-model",
        "bom-ref": outcome.format,
        "name": f"{title(report)}-{outcome.format}",
        "properties": _properties({name: measured[name] for name in _FIGURES}),
        "components": [_file(report.folder, file) for file in files],
    } | ({"modelCard": _performance(outcome.metrics)} if outcome.metrics else {})


def _evidence(folder: Path) -> Iterator[dict[str, Any]]:
    """What the artifacts were verified with: the manifest, and the batches with PyTorch's outputs."""
    for file in sorted([*folder.glob(MANIFEST), *folder.glob("*.npz")]):
        yield _file(folder, file)


def _file(folder: Path, file: Path) -> dict[str, Any]:
    name = file.relative_to(folder).as_posix()
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_hash(sha256(file))]}


def _hash(content: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": content}


def _packages(outcome: Outcome) -> Iterator[tuple[str, dict[str, Any]]]:
    """The packages of the toolchain that made an artifact, by their package URL (https://github.com/package-url/purl-spec)."""
    for name, version in (outcome.toolchain.packages if outcome.toolchain else {}).items():
        kept = version.replace("+", "%2B")
        url = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{kept}"
        yield url, {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": f"polyexport:{name}", "value": f"{value}"} for name, value in values.items() if value is not None]


def _performance(metrics: Mapping[str, float | None]) -> dict[str, Any]:
    measured = [{"type": name, "value": f"{value:g}"} for name, value in metrics.items() if value is not None]
    return {"quantitativeAnalysis": {"performanceMetrics": measured}} if measured else {}
