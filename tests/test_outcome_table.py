"""The pages of `make test-zoo` and `make test-real`: what they count, and that a stopped run goes on."""

from __future__ import annotations

import architectures
import zoo_table
from outcome_table import cell, page, record, recorded

GOOD, BAD = cell("verified", "", "dynamo"), cell("failed", "no <Op>\nfor it", None)
FORMATS = ("onnx", "paddle")


def test_what_was_not_run_is_neither_verified_nor_counted_as_run():
    text = page("Title", "About.", {"net": {"onnx": GOOD}}, ["net"], FORMATS)
    assert "| net | verified | – |" in text
    assert "1 of 2 cells were run; 1/1 (100.0%) of them are `verified`" in text
    assert "| **verified** | 1/1 (100.0%) | – |" in text
    assert text.endswith("## What was not verified\n\nNothing of what was run.\n")
    assert not zoo_table.enough({"net": {"onnx": GOOD}}, ["net"], FORMATS)


def test_a_reason_is_one_line_of_the_page():
    text = page("Title", "About.", {"net": {"onnx": GOOD, "paddle": BAD}}, ["net"], FORMATS)
    assert "* net, paddle: failed: no &lt;Op> for it\n" in text
    assert "| **verified** | 1/1 (100.0%) | 0/1 (0.0%) |" in text


def test_the_newest_run_has_the_last_word(tmp_path):
    path = tmp_path / "folder" / "cells.jsonl"
    record(path, "net", {"onnx": BAD, "paddle": GOOD})
    record(path, "net", {"onnx": GOOD})
    assert recorded(path) == {"net": {"onnx": GOOD, "paddle": GOOD}}


def test_a_run_goes_on_with_what_is_missing_and_repeats_what_failed_when_asked():
    found = {"onnx": GOOD, "paddle": BAD}
    assert zoo_table.missing(found, ("onnx", "paddle", "tflite"), again=False) == ["tflite"]
    assert zoo_table.missing(found, ("onnx", "paddle", "tflite"), again=True) == ["paddle", "tflite"]


def test_there_are_about_a_hundred_families_of_three_libraries():
    libraries = [name.split("/")[0] for name in architectures.FAMILIES]
    assert {"transformers", "timm", "torchvision"} == set(libraries)
    assert len(libraries) >= 100


def test_enough_is_97_percent():
    cells = {f"net{index}": {"onnx": GOOD if index >= 3 else BAD} for index in range(100)}
    assert zoo_table.enough(cells, list(cells), ("onnx",))
    assert not zoo_table.enough(cells | {"net3": {"onnx": BAD}}, list(cells), ("onnx",))
