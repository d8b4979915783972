from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from polyexport import ExportSpec, Outcome, Report, TensorSpec
from polyexport.measure.latency import summarise
from polyexport.measure.parity import OutputParity, Parity
from polyexport.report.report import Artifact, Checkpoint, Model, Toolchain, markdown, metrics, rows
from polyexport.serialization import decode, encode, read_json, write_json


def report(folder: Path) -> Report:
    spec = TensorSpec("x", "float32", ("batch", 3))
    figures = OutputParity(1e-6, 2.0, 0.0, 1.0, 90.0, None, 1e-7)
    latency = summarise(
        [1.0] * 100, batch=4, threads=2, device="cpu", load_seconds=0.1, first_ms=2.0, peak_memory_bytes=None
    )
    outcomes = (
        Outcome(
            "onnx", "float32", "verified", route="dynamo", artifact=Artifact("onnx/model.onnx", 1600, "ab"),
            seconds={"convert": 1.0}, parity=Parity(True, "", {"y": figures}, ({"batch": 4}, {"batch": 1})),
            latency=latency, toolchain=Toolchain("onnx", {"onnx": "1.23"}), inputs=(spec,), reproduce="python x",
        ),
        Outcome("coreml", "float32", "skipped", reason="coremltools | is\nmissing"),
    )  # fmt: skip  # a record reads better in rows
    model = Model("pkg.Net", 12, (spec,), (spec,))
    return Report(Checkpoint("a.ckpt", "ff", 1, 10, "val_loss", 0.5), model, outcomes, folder=folder, baseline=latency)


def test_a_report_comes_back_from_disk_as_it_was(tmp_path):
    report(tmp_path).save()
    assert Report.load(tmp_path) == report(tmp_path.resolve())


def test_the_file_has_the_fields_of_version_one(tmp_path):
    report(tmp_path).save()
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["version"] == 1
    assert found["checkpoint"] == {
        "path": "a.ckpt", "sha256": "ff", "epoch": 1, "global_step": 10, "monitor": "val_loss", "score": 0.5,
    }  # fmt: skip
    assert set(found["model"]) == {"class", "parameters", "inputs", "outputs"}
    assert set(found["outcomes"][0]) >= {
        "format", "precision", "state", "reason", "route", "artifact", "seconds", "parity", "latency", "toolchain",
        "log", "reproduce",
    }  # fmt: skip
    assert "folder" not in found


def test_metrics_that_are_no_number_are_left_blank_before_and_after_the_disk(tmp_path):
    made = report(tmp_path)
    outcome = replace(made["onnx"], metrics={"auc": 0.5, "iou": math.nan, "acc": 0.75})
    made = replace(made, outcomes=(outcome,), metrics={"auc": math.nan, "iou": 1.0, "acc": 0.5})
    made.save()
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
