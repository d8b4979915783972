"""Each low precision is refuted where it is wrong: ExecuTorch, MNN and TensorFlow.js."""

from __future__ import annotations

import pytest
import torch

import polyexport
from every_format import Small
from planted_errors import WRONG
from polyexport import Report

RIGHT = ["executorch-int8", "mnn-w8", "tfjs-w8"]
"""One of each runtime; that the others are right too is seen in `test_precisions.py`."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.manual_seed(0)
    x, into = torch.rand(4, 3, 8, 8), tmp_path_factory.mktemp("wrong") / "out"
    module = Small()
    torch.nn.init.normal_(module.head[2].weight)  # else its outputs are its biases, which are all alike
    return polyexport.export(module, x, [*RIGHT, *WRONG], into, dynamic=False, bench=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_artifacts_without_a_planted_error_agree(report, name):
    assert (report[name].state, report[name].reason) == ("verified", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.name for each in WRONG])
def test_a_planted_error_is_a_mismatch(report, name):
    assert report[name].state == "mismatch", report[name].reason
