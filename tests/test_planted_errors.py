"""Each low precision is refuted where it is wrong: ExecuTorch, MNN and TensorFlow.js."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import polyexport
from every_format import Small
from planted_errors import WRONG
from polyexport import FORMATS, Report

RIGHT = ["executorch-int8", "executorch-w4", "mnn-w4", "mnn-w8", "tfjs-w8"]
"""One of each runtime; that the others are right too is seen in `test_precisions.py`."""

SECOND = replace(FORMATS["mnn-w4"], name="mnn-w4-second", routes=FORMATS["mnn-w4"].routes[1:])
"""The route that is taken where the first one disagrees."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.manual_seed(0)
    x, into = torch.randn(8, 3, 8, 8), tmp_path_factory.mktemp("wrong") / "out"
    module = Small()
    with torch.no_grad():  # each row is of another class, plainly: four bits would exchange outputs that are close
        hidden = module.head[:2](module.conv(x).relu().flatten(1))
        module.head[2].weight.copy_(5 * torch.linalg.pinv(hidden).T)
        module.head[2].bias.zero_()
    return polyexport.export(module, x, [*RIGHT, SECOND, *WRONG], into, dynamic=False, bench=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RIGHT, SECOND.name])
def test_artifacts_without_a_planted_error_agree(report, name):
    assert (report[name].state, report[name].reason) == ("verified", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.name for each in WRONG])
def test_a_planted_error_is_a_mismatch(report, name):
    assert report[name].state == "mismatch", report[name].reason
