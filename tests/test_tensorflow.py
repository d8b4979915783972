"""The TensorFlow family on every model of the zoo, each artifact run in its own runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import polyexport
import zoo
from test_lowering import PACKAGE, in_toolchain

FORMATS = ("saved_model", "graphdef", "tfjs")

END_TO_END = ("lstm",)


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_agrees_with_pytorch_for_any_batch(name: str, tmp_path: Path) -> None:
    module, inputs = zoo.build(name)
    report = polyexport.export(module, inputs, FORMATS, tmp_path / name, bench=False, workers=2)
    states = {outcome.format: (outcome.state, outcome.reason) for outcome in report.outcomes}
    assert states == dict.fromkeys(FORMATS, ("verified", ""))
    assert all(outcome.parity and len(outcome.parity.batches) > 1 for outcome in report.outcomes)
    signature = json.loads((tmp_path / name / "tfjs" / "model.json").read_text())["signature"]
    assert report.model is not None
    assert set(signature["inputs"]) == {tensor.name for tensor in report.model.inputs}
    assert set(signature["outputs"]) == {tensor.name for tensor in report.model.outputs}


@pytest.mark.slow
def test_the_rest_of_the_zoo_agrees_too(tmp_path: Path) -> None:
    """Converted in one process and verified in two others, since each import of TensorFlow takes seconds."""
    names = [name for name in (zoo.GROUND | zoo.FURTHER) if name not in END_TO_END]
    for name in names:
        module, inputs = zoo.build(name)
        polyexport.export(module, inputs, ["onnx"], tmp_path / name, bench=False, workers=1)
    roots = [str(tmp_path / name) for name in names]
    script = (str(Path(__file__).with_name("many_exports.py")), str(PACKAGE))
    made = json.loads(in_toolchain("tensorflow", *script, "convert", ",".join(FORMATS), *roots))
    assert made == {root: dict.fromkeys(FORMATS, "made") for root in roots}
    found = [
        json.loads(in_toolchain("tensorflow", *script, "verify", "saved_model,graphdef", *roots)),
        json.loads(in_toolchain("tfjs", *script, "verify", "tfjs", *roots)),
    ]
    cells = {(Path(root).name, name): parity for part in found for root in part for name, parity in part[root].items()}
    assert len(cells) == len(names) * len(FORMATS)
    assert {
        cell: parity for cell, parity in cells.items() if not isinstance(parity, dict) or not parity["passed"]
    } == {}
    assert all(len(parity["batches"]) > 1 for parity in cells.values())
    backends = {model: parity["verified_by"] for (model, name), parity in cells.items() if name == "tfjs"}
    assert {model: said for model, said in backends.items() if not said.endswith("and they agree)")} == {}
