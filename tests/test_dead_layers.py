"""A layer whose output is 0 in all batches has no range, and yet int8 formats come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import polyexport
from polyexport.measure.ranges import Step, too_narrow


class Dead(nn.Module):
    """Two branches, of which one is 0, in a sum; and a layer that is 0 by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.alive, self.dead, self.last = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 8)
        nn.init.constant_(self.dead.bias, -50.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dead = torch.relu(self.dead(x))
        return self.last(torch.relu(self.alive(x)) + dead) + self.last(dead)


@pytest.mark.slow
def test_a_dead_layer_comes_out_in_int8(tmp_path: Path):
    formats = ["onnx-int8", "openvino-int8", "coreml-int8", "executorch-int8", "mnn-int8", "tflite-int8-nhwc"]
    report = polyexport.export(Dead().eval(), torch.randn(8, 16), formats, tmp_path / "x", bench=False)
    for outcome in report.outcomes:
        assert outcome.parity is not None, outcome.reason
        # how near it is depends on how a format rounds so few numbers
        assert (outcome.parity.outputs["output_0"].cosine or 0.0) > 0.97, outcome


def test_a_range_of_zeros_is_as_wide_as_what_its_layer_reads():
    assert too_narrow({"x": (-2.0, 2.0), "y": (0.0, 0.0)}, [Step(["x"], "y", False)]) == {"y": 4.0}


def test_a_range_of_zeros_in_a_sum_is_at_most_the_sums():
    steps = [Step(["x"], "dead", False), Step(["dead", "alive"], "sum", True)]
    ranges = {"x": (0.0, 255.0), "dead": (0.0, 1e-22), "alive": (0.0, 0.1), "sum": (0.0, 0.1)}
    assert too_narrow(ranges, steps) == {"dead": 0.1}


def test_a_small_operand_of_a_sum_has_a_five_hundredth_of_its_range():
    ranges = {"a": (-1e-6, 1e-6), "b": (0.0, 1.0), "sum": (0.0, 1.0)}
    assert too_narrow(ranges, [Step(["a", "b"], "sum", True)]) == {"a": 1 / 512}


def test_ranges_that_are_wide_enough_stay():
    ranges = {"x": (0.0, 255.0), "y": (-1e-3, 1e-3)}
    assert too_narrow(ranges, [Step(["x"], "y", False)]) == {}
