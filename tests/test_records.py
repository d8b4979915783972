from __future__ import annotations

import copy
import io
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console

from polyexport import BadRequest, ExportSpec, Outcome, Report, TensorSpec
from polyexport.measure.latency import summarize
from polyexport.measure.parity import OutputParity, Parity
from polyexport.report import manifest as manifests, schema
from polyexport.report.console import show
from polyexport.report.files import save
from polyexport.report.html import page
from polyexport.report.manifest import MANIFEST, Made, Manifest
from polyexport.report.outcome import Artifact, Checkpoint, Model, Toolchain, notes
from polyexport.report.report import markdown, metrics, rows
from polyexport.report.tables import sentence
from polyexport.serialization import decode, encode, read_json, write_json, writing
from polyexport.spec import Batch


def report(folder: Path) -> Report:
    spec = TensorSpec("x", "float32", ("batch", 3))
    figures = OutputParity(1e-6, 2.0, 0.0, 1.0, 90.0, None, 1e-7)
    latency = summarize(
        [1.0] * 100, batch=4, threads=2, device="cpu", load_seconds=0.1, first_ms=2.0, peak_memory_bytes=None
    )
    outcomes = (
        Outcome(
            "onnx",
            "float32",
            "verified",
            route="dynamo",
            artifact=Artifact("onnx/model.onnx", 1600, "ab"),
            seconds={"convert": 1.0},
            parity=Parity(True, "", {"y": figures}, ({"batch": 4}, {"batch": 1})),
            latency=latency,
            toolchain=Toolchain("onnx", {"onnx": "1.23"}),
            inputs=(spec,),
            reproduce="python x",
        ),
        Outcome("coreml", "float32", "skipped", reason="coremltools | is\nmissing"),
    )
    model = Model("pkg.Net", 12, (spec,), (spec,))
    return Report(
        Checkpoint("a.ckpt", sha256="ff", epoch=1, global_step=10, monitor="val_loss", score=0.5),
        model,
        outcomes,
        folder=folder,
        baseline=latency,
        notes=notes("batch", "one"),
    )


def test_a_report_is_read_back_unchanged(tmp_path):
    save(report(tmp_path))
    assert Report.load(tmp_path) == report(tmp_path.resolve())


def test_the_file_has_the_fields_of_version_two(tmp_path):
    save(report(tmp_path))
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["version"] == 2
    assert found["checkpoint"] == {
        "path": "a.ckpt",
        "sha256": "ff",
        "epoch": 1,
        "global_step": 10,
        "monitor": "val_loss",
        "score": 0.5,
    }
    assert set(found["model"]) == {"class", "parameters", "inputs", "outputs", "labels", "metadata", "processing"}
    assert set(found["outcomes"][0]) >= {
        "format",
        "precision",
        "state",
        "reason",
        "route",
        "artifact",
        "seconds",
        "parity",
        "latency",
        "toolchain",
        "log",
        "reproduce",
    }
    assert "folder" not in found


def manifest(folder: Path) -> Manifest:
    made = report(folder)
    batches = (Batch("validation_batch.npz", {"batch": 4}),)
    spec = ExportSpec(made.model.inputs, made.model.outputs, {"batch": 4})
    return Manifest(made.checkpoint, {"dynamic": True}, spec, batches, artifacts=Made.of(made.outcomes))


def test_a_manifest_is_read_back_unchanged(tmp_path):
    manifests.save(tmp_path, manifest(tmp_path))
    assert manifests.load(tmp_path) == manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["batches", 0, "sizes"], [4], "Manifest.batches[0].sizes is [4], not an object"),
        (["spec", "inputs"], "x", "Manifest.spec.inputs is 'x', not a list"),
        (["artifacts", "onnx", "precision"], "fp16", "Manifest.artifacts.onnx.precision is 'fp16', not 'float32' or"),
        (["noise"], {"y": 1e-7}, "Manifest.noise is {'y': 1e-07}, not a string"),
        (["version"], 9, "has version 9; this release reads version 1"),
        (["batches", 0, "path"], "../../secret.npz", "'../../secret.npz' is outside of the export"),
    ],
)
def test_a_manifest_of_wrong_types_or_another_version_is_refused_in_one_line(tmp_path, path, value, reason):
    manifests.save(tmp_path, manifest(tmp_path))
    write_json(tmp_path / MANIFEST, changed(read_json(tmp_path / MANIFEST), path, value))
    with pytest.raises(BadRequest, match=re.escape(reason)) as refused:
        manifests.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", schema.RECORDS)
def test_the_schemas_that_ship_are_those_of_the_records(name):
    assert schema.shipped(name).read_text(encoding="utf-8") == schema.text(name), (
        "run python -m polyexport.report.schema"
    )


def judge(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(read_json(schema.shipped(name)))


def test_a_manifest_obeys_the_schema_that_ships(tmp_path):
    manifests.save(tmp_path, manifest(tmp_path))
    found = read_json(tmp_path / MANIFEST)
    judge("manifest.schema.json").validate(found)
    assert not judge("manifest.schema.json").is_valid(changed(found, ["noise"], {"y": 1e-7}))


def test_a_report_obeys_the_schema_that_ships_and_a_wrong_one_does_not(tmp_path):
    save(report(tmp_path))
    found = read_json(tmp_path / "report.json")
    judge("report.schema.json").validate(found)
    for wrong in WRONG.values():
        assert not judge("report.schema.json").is_valid(changed(found, *wrong)), wrong


WRONG = {
    "version is 'two', not an integer": (["version"], "two"),
    "outcomes[0].state is 'fine', not 'verified' or": (["outcomes", 0, "state"], "fine"),
    "outcomes[0].parity.passed is 1, not true or false": (["outcomes", 0, "parity", "passed"], 1),
    "outcomes[1].seconds is [], not an object": (["outcomes", 1, "seconds"], []),
    "model.inputs[0].shape is 'batch', not a list": (["model", "inputs", 0, "shape"], "batch"),
    "notes[0].kind is 'chat', not 'capture' or": (["notes", 0, "kind"], "chat"),
    "outcomes[0].precision is 'fp16', not 'float32' or": (["outcomes", 0, "precision"], "fp16"),
    "checkpoint.path is None, not a string": (["checkpoint", "path"], None),
}


def changed(data: Any, path: list[Any], value: Any) -> Any:
    """A copy with one value replaced."""
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize("reason", WRONG)
def test_a_value_of_another_type_is_refused_with_its_path(tmp_path, reason):
    save(report(tmp_path))
    write_json(tmp_path / "report.json", changed(read_json(tmp_path / "report.json"), *WRONG[reason]))
    with pytest.raises(BadRequest, match=re.escape(f"Report.{reason}")):
        Report.load(tmp_path)


def test_a_missing_field_and_another_version_are_refused(tmp_path):
    save(report(tmp_path))
    found = read_json(tmp_path / "report.json")
    write_json(tmp_path / "report.json", {key: value for key, value in found.items() if key != "checkpoint"})
    with pytest.raises(BadRequest, match="Report lacks checkpoint"):
        Report.load(tmp_path)
    write_json(tmp_path / "report.json", found | {"version": 1})
    with pytest.raises(BadRequest, match="has version 1; this release reads version 2"):
        Report.load(tmp_path)


def test_what_is_not_an_export_is_refused_in_one_line(tmp_path):
    save(report(tmp_path / "one"))
    for name, text, message in (
        ("notes.txt", "one", r"notes\.txt is a file; give the folder of an export$"),
        ("best", "../one", "best is a file; give the folder of an export, or the name of one next to it in a file"),
        ("best", "", "best is a file; "),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadRequest, match=message):
            Report.load(tmp_path / name)
    (tmp_path / "best").write_text("one")
    assert Report.load(tmp_path / "best").folder == tmp_path / "one"
    (tmp_path / "one" / "report.json").unlink()
    os.mkfifo(tmp_path / "one" / "report.json")  # reading it would wait for a writer
    with pytest.raises(BadRequest, match=r"report\.json is not a file"):
        Report.load(tmp_path / "one")


def test_metrics_that_are_not_numbers_are_blank_before_and_after_saving(tmp_path):
    made = report(tmp_path)
    outcome = replace(made["onnx"], metrics={"auc": 0.5, "iou": math.nan, "acc": 0.75})
    made = replace(made, outcomes=(outcome,), metrics={"auc": math.nan, "iou": 1.0, "acc": 0.5})
    save(made)
    expected = [
        {"format": "eager", "auc": "", "iou": "1", "acc": "0.5"},
        {"format": "onnx", "auc": "0.5", "iou": "", "acc": "0.75 (+2.5e-01)"},
    ]
    assert metrics(made) == expected
    assert metrics(Report.load(tmp_path)) == expected


def test_infinity_and_nan_become_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.inf, "b": [math.nan, 1.5]})
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [None, 1.5]}


def test_a_record_with_unknown_keys_is_read():
    spec = ExportSpec((TensorSpec("x", "int64", ("batch",)),), (), {"batch": 4}, {"torch": "2"})
    assert decode(ExportSpec, encode(spec) | {"later": 1}) == spec


def test_a_static_spec_has_the_sizes_of_the_validation_batch():
    spec = ExportSpec(
        (TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch",)),), {"batch": 8}
    )
    assert spec.is_dynamic
    assert not spec.static().is_dynamic
    assert spec.static().inputs[0].shape == (8, 3)
    assert spec.static().outputs[0].shape == (8,)


def test_the_markdown_table_has_one_line_per_row(tmp_path):
    text = markdown(report(tmp_path))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows(report(tmp_path)))
    assert r"coremltools \| is missing" in table[-1]
    assert "python x  # onnx" in text
    assert str(report(tmp_path)) == text


def test_the_table_starts_with_eager_pytorch(tmp_path):
    first = rows(report(tmp_path))[0]
    assert (first["format"], first["state"], first["speed-up"]) == ("eager", "baseline", "1.00×")


def by_stand_in(folder: Path, *, passed: bool = True) -> Report:
    """The report of a format that a stand-in ran in its runtime's place."""
    made = report(folder)
    parity = replace(made["onnx"].parity, passed=passed, off_device=True)
    outcome = replace(made["onnx"], parity=parity, state="verified" if passed else "mismatch")
    return replace(made, outcomes=(outcome,))


def test_verified_by_a_stand_in_is_shown_as_off_device_everywhere(tmp_path):
    folder = tmp_path / "run" / "export"  # with no other export beside it, which the page would show
    folder.mkdir(parents=True)
    save(by_stand_in(folder))
    made = Report.load(folder)
    assert made["onnx"].state == "verified"
    terminal = Console(file=io.StringIO(), width=200)
    show(made, terminal)
    shown = {
        "table": str(rows(made)),
        "markdown": markdown(made),
        "page": page(made),
        "terminal": terminal.file.getvalue(),
        "line": sentence(made["onnx"]),
    }
    assert [name for name, text in shown.items() if "verified off-device" not in text] == []
    assert "verified</span>" not in shown["page"], "nor does one of its chips leave it out"


def test_a_mismatch_off_device_is_a_mismatch(tmp_path):
    assert by_stand_in(tmp_path, passed=False)["onnx"].shown_state == "mismatch"
    assert report(tmp_path)["onnx"].shown_state == "verified"


def test_a_file_of_tensors_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path):
    resource = pytest.importorskip("resource")
    with writing(tmp_path / "weights.pt") as file:
        torch.save(torch.ones(2), file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as on a full disk, the process would end with SIGABRT
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"weights\.pt"), writing(tmp_path / "weights.pt") as file:
            torch.save(torch.zeros(100_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    assert torch.load(tmp_path / "weights.pt").sum() == 2
