"""The pages of `make test-zoo` and `make test-real`: what they count, and that a stopped run goes on."""

from __future__ import annotations

import architectures
import zoo_table
from outcome_table import cell, page, page_by_format, record, recorded, write

GOOD, BAD = cell("verified", "", "dynamo"), cell("failed", "no <Op>\nfor it", None)
FORMATS = ("onnx", "paddle")


def test_a_format_that_was_not_run_is_neither_verified_nor_counted_as_run():
    text = page("Title", "About.", {"net": {"onnx": GOOD}}, ["net"], FORMATS)
    assert "| net | verified | – |" in text
    assert "1 of 2 cells were run; 1/1 (100.0%) of them are `verified`" in text
    assert "| **verified** | 1/1 (100.0%) | – |" in text
    assert text.endswith("## What was not verified\n\nNothing of what was run.\n")
    assert not zoo_table.enough({"net": {"onnx": GOOD}}, ["net"], FORMATS, 0.97)


def test_a_reason_is_one_line_of_the_page():
    text = page("Title", "About.", {"net": {"onnx": GOOD, "paddle": BAD}}, ["net"], FORMATS)
    assert "* paddle, all models: failed: no &lt;Op> for it\n" in text
    assert "| **verified** | 1/1 (100.0%) | 0/1 (0.0%) |" in text


def test_the_newest_run_wins(tmp_path):
    path = tmp_path / "folder" / "cells.jsonl"
    record(path, "net", {"onnx": BAD, "paddle": GOOD})
    record(path, "net", {"onnx": GOOD})
    found = recorded(path)
    assert found == {"net": {"onnx": GOOD, "paddle": GOOD}}
    write(path, found)
    assert recorded(path) == found
    assert len(path.read_text().splitlines()) == 1


def test_a_run_continues_with_missing_cells_and_repeats_failed_ones_on_request():
    found = {"onnx": GOOD, "paddle": BAD}
    assert zoo_table.missing(found, ("onnx", "paddle", "tflite"), again=False) == ["tflite"]
    assert zoo_table.missing(found, ("onnx", "paddle", "tflite"), again=True) == ["paddle", "tflite"]


def test_there_are_about_a_hundred_families_of_three_libraries():
    libraries = [name.split("/")[0] for name in architectures.FAMILIES]
    assert {"transformers", "timm", "torchvision"} == set(libraries)
    assert len(libraries) >= 100


def test_a_share_of_the_cells_is_enough():
    cells = {f"net{index}": {"onnx": GOOD if index >= 3 else BAD} for index in range(100)}
    assert zoo_table.enough(cells, list(cells), ("onnx",), 0.97)
    assert not zoo_table.enough(cells | {"net3": {"onnx": BAD}}, list(cells), ("onnx",), 0.97)


def test_an_artifact_for_a_missing_device_counts_if_it_was_built():
    built = cell("unverified", "there is no such card", "onnx")
    assert zoo_table.enough({"net": {"tensorrt-rtx": built}}, ["net"], ("tensorrt-rtx",), 0.9)
    assert not zoo_table.enough({"net": {"onnx": built}}, ["net"], ("onnx",), 0.9)


def test_a_format_is_a_row_where_there_are_many_and_a_reason_names_its_models():
    missing = cell("skipped", "there is no compiler", None)
    cells = {"net": {"onnx": GOOD, "paddle": missing}, "mlp": {"onnx": BAD, "paddle": missing}, "new": {}}
    text = page_by_format("Title", "About.", cells, ["net", "mlp", "new"], FORMATS)
    assert "| `onnx` | ✓ | ✗ | – | 1/2 |" in text
    assert "| `paddle` | – | – | – | – |" in text
    assert "2 of 6 cells were run; 1/2 (50.0%) of them are `verified`" in text
    assert "* onnx, mlp: failed: no &lt;Op> for it\n" in text
    assert "* paddle, net, mlp: skipped: there is no compiler\n" in text


MEASURED = cell("verified", "", "dynamo", bytes=520, weights_bytes=1000, p50_ms=0.02, eager_ms=0.25)


def test_what_was_measured_is_beside_what_it_is_compared_with():
    built = cell("unverified", "there is no such card", "onnx", bytes=52_000, weights_bytes=1000, p50_ms=None)
    wrong = cell("mismatch", "off by one", "onnx", bytes=100, weights_bytes=1000)
    cells = {"net": {"onnx": MEASURED, "tensorrt": built, "paddle": wrong}, "mlp": {"onnx": GOOD}}
    lines = page_by_format("Title", "About.", cells, ["net", "mlp"], ("onnx", "paddle", "tensorrt")).splitlines()
    measured = lines[lines.index("## Size and latency") :]
    assert measured[-5:] == [
        "| format | net | mlp |",
        "| --- | --- | --- |",
        "| float32 weights / eager ms | 1 kB / 0.25 |  |",
        "| `onnx` | 0.52 / 0.08 |  |",
        "| `tensorrt` | 52 |  |",
    ]


def test_what_has_an_artifact_is_made_again_for_its_size_and_for_its_time():
    found = {"onnx": MEASURED, "pt2": GOOD, "tensorrt": cell("verified", "", None, bytes=1, p50_ms=None), "paddle": BAD}
    assert zoo_table.missing(found, tuple(found), again=False, sizes=True) == ["pt2"]
    assert zoo_table.missing(found, tuple(found), again=False, times=True) == ["pt2"]
    without = {name: cell("verified", "", None, bytes=1) for name in ("onnx", "coreml")}
    assert zoo_table.missing(without, tuple(without), again=False, sizes=True) == []
    assert zoo_table.missing(without, tuple(without), again=False, times=True) == ["onnx", "coreml"]
