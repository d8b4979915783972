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
from isolated import AS_PACKAGE, in_toolchain
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


def test_what_mnn_lacks_is_written_out_and_computes_the_same() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; `pip install onnx`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install onnxruntime`")
    model = onnx.parser.parse_model(GRAPH)
    written = mnn._written_out(onnx.parser.parse_model(GRAPH))
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
        (1, "", "it ended with exit code 1"),
    ],
)
def test_why_mnns_converter_wrote_nothing_is_read_from_what_it_prints(code: int, printed: str, why: str) -> None:
    assert mnn._why(subprocess.CompletedProcess([], code, printed, "")) == why


@pytest.mark.parametrize(("mode", "lacking"), [("cubic", ["GridSample with mode=cubic"]), ("nearest", [])])
def test_a_mode_that_mnn_takes_for_another_is_named(mode: str, lacking: list[str]) -> None:
    node = onnx.helper.make_node("GridSample", ["x", "grid"], ["y"], mode=mode, padding_mode="border")
    model = onnx.helper.make_model(onnx.helper.make_graph([node, node], "grid", [], []))
    assert mnn.lacking_modes(model) == lacking


def test_mnn_answers_a_convolution_over_one_axis_with_three_axes(tmp_path: Path) -> None:
    """Whether it ends the model, or an operation does that works element by element, or others follow."""
    script = tmp_path / "axes.py"
    script.write_text(
        f"""
{AS_PACKAGE}
import numpy as np, onnx
from pathlib import Path
from polyexport.formats.mnn import convert, load
from polyexport.spec import ExportSpec, TensorSpec
folder = Path({str(tmp_path)!r})
model = onnx.parser.parse_model('''
<ir_version: 10, opset_import: ["": 20]>
graph (float[n, 3, 10] x) => (float[n, 5, 8] last, float[n, 5, 8] lifted, float[n, 8, 5] turned, float[n, 3, 12] up)
{{
    last = Conv(x, w)
    lifted = Relu(last)
    turned = Transpose<perm = [0, 2, 1]>(lifted)
    up = ConvTranspose(x, v)
}}
''')
random = np.random.default_rng(0)
weights = {{"w": random.random((5, 3, 3), np.float32), "v": random.random((3, 3, 3), np.float32)}}
model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
onnx.save(model, folder / "m.onnx")
shapes = {{"last": (4, 5, 8), "lifted": (4, 5, 8), "turned": (4, 8, 5), "up": (4, 3, 12)}}
outputs = tuple(TensorSpec(name, "float32", ("n", *shape[1:])) for name, shape in shapes.items())
spec = ExportSpec((TensorSpec("x", "float32", ("n", 3, 10)),), outputs, {{"n": 4}})
convert(folder / "m.onnx", folder / "m.mnn", spec)
x = random.random((4, 3, 10), np.float32)
found = load(folder / "m.mnn", spec, threads=1)({{"x": x}})
windows = np.lib.stride_tricks.sliding_window_view(x, 3, axis=2)
expected = np.einsum("ncdk,ock->nod", windows, weights["w"])
assert {{name: array.shape for name, array in found.items()}} == shapes
np.testing.assert_allclose(found["last"], expected, rtol=1e-4)
np.testing.assert_allclose(found["turned"], expected.transpose(0, 2, 1), rtol=1e-4)
"""
    )
    in_toolchain("mnn", str(script))


def test_executorchs_portable_kernels_take_what_xnnpacks_partitioner_refuses(tmp_path: Path) -> None:
    """A permuted tensor that several operators read."""
    script = tmp_path / "portable.py"
    script.write_text(
        f"""
{AS_PACKAGE}
import numpy as np, torch
from pathlib import Path
from polyexport.formats import executorch
from polyexport.spec import ExportSpec, TensorSpec
class Readers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 8, 3, padding=1)
    def forward(self, x):
        y = self.conv(x).permute(0, 2, 1)
        return y.reshape(x.shape[0], -1), y.sum(1), y.softmax(-1).transpose(1, 2)
torch.manual_seed(0)
module, folder, free = Readers().eval(), Path({str(tmp_path)!r}), torch.export.Dim.DYNAMIC
program = torch.export.export(module, (torch.rand(4, 3, 10),), dynamic_shapes=({{0: free}},))
torch.export.save(program, folder / "m.pt2")
outputs = tuple(TensorSpec(f"output_{{i}}", "float32", ("batch",)) for i in range(3))
spec = ExportSpec((TensorSpec("x", "float32", ("batch", 3, 10)),), outputs, {{"batch": 4}})
refused = False
try:
    executorch.convert(folder / "m.pt2", folder / "m.pte", spec)
except Exception:
    refused = True
executorch.convert_portable(folder / "m.pt2", folder / "m.pte", spec)
x = torch.rand(7, 3, 10)
found = executorch.load(folder / "m.pte", spec, threads=1)({{"x": x.numpy()}})
for array, tensor in zip(found.values(), module(x), strict=True):
    np.testing.assert_allclose(array, tensor.detach().numpy(), atol=1e-5)
print("refused" if refused else "taken")
"""
    )
    assert in_toolchain("executorch", str(script)).split()[-1] == "refused"
