"""ExecuTorch and MNN, which are also the proof that a format is one file and one requirement file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

import polyexport
import zoo
from isolated import in_toolchain
from polyexport.formats import mnn


class Masked(torch.nn.Module):
    """Attention under a mask, a norm, the exact GELU and a logarithm of a sum: MNN has none of them as they are.

    ExecuTorch has no adaptive max pool, and an operation of several results, the chunks, had it fix the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = torch.nn.Linear(8, 24), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        query, key, value = self.project(x)[:, None].chunk(3, -1)
        heard = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])[:, 0]
        scores = self.head(functional.normalize(functional.gelu(heard), dim=-1))
        loudest = functional.adaptive_max_pool1d(value[:, 0].transpose(1, 2), 4)
        return {"heard": heard, "scores": scores - scores.logsumexp(-1, keepdim=True), "loudest": loudest}


def masked() -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    return Masked().eval(), (2 * torch.randn(zoo.BATCH, 6, 8), torch.arange(6).expand(zoo.BATCH, 6) < 4)


@pytest.mark.slow  # their environments are large ones
def test_a_model_is_verified_at_every_batch_size(tmp_path: Path) -> None:
    module, inputs = masked()
    report = polyexport.export(module, inputs, ["executorch", "mnn"], tmp_path / "export", bench=False)
    for outcome in report.outcomes:
        assert (outcome.state, outcome.reason) == ("verified", "")
        assert {sizes["batch"] for sizes in outcome.parity.batches} == {1, 3, zoo.BATCH}


LACKING = ("IsNaN", "Gelu", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")

GRAPH = """
<ir_version: 10, opset_import: ["": 20]>
graph (float[n, 6] x) => (bool[n, 6] nan, float[n, 6] exact, float[n, 6] erf, float[n] l1, float[n] l2,
                          float[n] squares, float[n, 1] log, float[n, 6] by_tanh)
{
    axes = Constant<value_ints = [1]>()
    roots = Sqrt(x)
    nan = IsNaN(roots)
    exact = Gelu(x)
    erf = Erf(x)
    l1 = ReduceL1<keepdims = 0>(x, axes)
    l2 = ReduceL2<keepdims = 0>(x, axes)
    squares = ReduceSumSquare<keepdims = 0>(x, axes)
    log = ReduceLogSumExp(x, axes)
    by_tanh = Gelu<approximate = "tanh">(x)
}
"""


def test_operators_that_mnn_lacks_are_decomposed_and_compute_the_same() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; `pip install onnx`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install onnxruntime`")
    model = onnx.parser.parse_model(GRAPH)
    written = mnn._decomposed(onnx.parser.parse_model(GRAPH))
    left = [node.op_type for node in written.graph.node if node.op_type in LACKING]
    assert left == ["Gelu"]  # the one by tanh
    feed = {"x": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32) * 30}
    before, after = (onnxruntime.InferenceSession(m.SerializeToString()).run(None, feed) for m in (model, written))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert before[0].any()
    assert not before[0].all()


@pytest.mark.parametrize(
    ("code", "printed", "why"),
    [
        (0, "[23:01:55] :220: These Op Not Support: ONNX::IsNaN \nConverted Failed!\n", "MNN has no ONNX::IsNaN"),
        (-11, "Start to Optimize the MNN Net...\n", "killed by SIGSEGV"),
        (1, "", "ended with exit code 1"),
    ],
)
def test_the_reason_of_mnns_converter_is_read_from_its_output(code: int, printed: str, why: str) -> None:
    assert mnn._why(subprocess.CompletedProcess([], code, printed, "")) == why


@pytest.mark.parametrize(("mode", "lacking"), [("cubic", ["GridSample with mode=cubic"]), ("nearest", [])])
def test_a_mode_that_mnn_takes_for_another_is_named(mode: str, lacking: list[str]) -> None:
    node = onnx.helper.make_node("GridSample", ["x", "grid"], ["y"], mode=mode, padding_mode="border")
    model = onnx.helper.make_model(onnx.helper.make_graph([node, node], "grid", [], []))
    assert mnn.lacking_modes(model) == lacking


def test_mnn_answers_a_convolution_over_one_axis_with_three_axes(tmp_path: Path) -> None:
    """Whether it ends the model, or an operation does that works element by element, or others follow."""
    in_toolchain("mnn", "scripts/mnn_axes.py", str(tmp_path))


def test_executorch_computes_what_pytorch_does_in_every_precision(tmp_path: Path) -> None:
    """What it asserts itself is in the script."""
    printed = in_toolchain("executorch", "scripts/executorch_portable.py", str(tmp_path))
    assert float(printed.splitlines()[-1]) < 0.5, "weights in int8 of convolutions before a ReLU"
