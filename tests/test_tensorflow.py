"""The TensorFlow family on every model of the zoo, each artifact run in its own runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import polyexport
import zoo
from isolated import answer, many

FORMATS = ("saved_model", "graphdef", "tfjs")


@pytest.mark.slow
def test_a_recurrent_layer_agrees_with_pytorch_for_any_batch(tmp_path: Path) -> None:
    """Of 40 steps, which TFLite has with a dynamic batch only without a loop."""
    module, frames = zoo.build("lstm")
    formats = (*FORMATS, "tflite")
    report = polyexport.export(module, frames.repeat(1, 4, 1), formats, tmp_path / "lstm", bench=False, workers=2)
    states = {outcome.format: (outcome.state, outcome.reason) for outcome in report.outcomes}
    assert states == dict.fromkeys(formats, ("verified", ""))
    assert all(outcome.parity and len(outcome.parity.batches) > 1 for outcome in report.outcomes)
    signature = json.loads((tmp_path / "lstm" / "tfjs" / "model.json").read_text())["signature"]
    assert report.model is not None
    assert set(signature["inputs"]) == {tensor.name for tensor in report.model.inputs}
    assert set(signature["outputs"]) == {tensor.name for tensor in report.model.outputs}


@pytest.mark.slow
def test_a_recurrent_layer_in_tflite_agrees_with_pytorch_for_any_length(tmp_path: Path) -> None:
    """By a loop, which TFLite has over an unknown time if the batch is known, as in Encodec."""
    layer, frames = torch.nn.LSTM(4, 5, bidirectional=True, batch_first=True), torch.rand(2, 7, 4)
    options: dict[str, Any] = {"dynamic": {"input": {1: "time"}}, "bench": False}
    outcome = polyexport.export(layer, frames, ["tflite"], tmp_path / "lstm", **options)["tflite"]
    assert (outcome.state, outcome.route, outcome.reason) == ("verified", "tensorflow", "")
    assert outcome.parity
    assert len({sizes.get("time") for sizes in outcome.parity.batches}) > 1


@pytest.mark.slow
def test_the_zoo_agrees_too(lowered: dict[str, dict[str, str]]) -> None:
    """Converted in one process and verified in two others, since each import of TensorFlow takes seconds."""
    roots = list(lowered)
    assert {
        (root, name): lowered[root][name] for root in roots for name in FORMATS if lowered[root][name] != "made"
    } == {}
    found = [many("tensorflow", "verify", ("saved_model", "graphdef"), roots), many("tfjs", "verify", ("tfjs",), roots)]
    cells = {(Path(root).name, name): parity for part in found for root in part for name, parity in part[root].items()}
    assert len(cells) == len(zoo.GROUND | zoo.FURTHER) * len(FORMATS)
    assert {
        cell: parity for cell, parity in cells.items() if not isinstance(parity, dict) or not parity["passed"]
    } == {}
    assert all(len(parity["batches"]) > 1 for parity in cells.values())
    backends = {model: parity["verified_by"] for (model, name), parity in cells.items() if name == "tfjs"}
    assert {model: said for model, said in backends.items() if not said.endswith("and they agree)")} == {}
    slow = {Path(root).name: batches_of_one_matrix(Path(root)) for root in roots}
    assert {model: names for model, names in slow.items() if names} == {}


def batches_of_one_matrix(export: Path) -> list[str]:
    """Products of many matrices with one weight, which TensorFlow.js' wasm backend computes in a plain loop."""
    model = json.loads((export / "many" / "tfjs" / "model.json").read_text())
    weights = (weight for group in model["weightsManifest"] for weight in group["weights"])
    matrices = {weight["name"] for weight in weights if len(weight["shape"]) == 2}
    products = (node for node in model["modelTopology"]["node"] if node["op"] == "BatchMatMulV2")
    return [node["name"] for node in products if node["input"][1] in matrices]


def test_inputs_and_outputs_have_forwards_names_whatever_they_are() -> None:
    """Other letters than ASCII's, names that differ in case only or that TensorFlow gives itself."""
    assert answer("tensorflow", "names") is None
