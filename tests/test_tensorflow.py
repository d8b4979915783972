"""The TensorFlow family on every model of the zoo, each artifact run in its own runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import polyexport
import zoo

FORMATS = ("saved_model", "graphdef", "tfjs")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.GROUND, *zoo.FURTHER])
def test_agrees_with_pytorch_for_any_batch(name: str, tmp_path: Path) -> None:
    module, inputs = zoo.build(name)
    report = polyexport.export(module, inputs, FORMATS, tmp_path / name, bench=False, workers=2)
    assert {outcome.format: (outcome.state, outcome.reason) for outcome in report.outcomes} == dict.fromkeys(
        FORMATS, ("verified", "")
    )
    signature = json.loads((tmp_path / name / "tfjs" / "model.json").read_text())["signature"]
    assert set(signature["inputs"]) == {tensor.name for tensor in report.model.inputs}
    assert set(signature["outputs"]) == {tensor.name for tensor in report.model.outputs}
    assert all(len(outcome.parity.batches) > 1 for outcome in report.outcomes)
