"""Paddle: the routes in their order, and our own lowering on every model of the zoo, run by Paddle Inference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import polyexport
import zoo
from isolated import PACKAGE, answer, in_toolchain, many
from polyexport.formats import paddle


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "gru"])
def test_a_model_is_verified_at_every_batch_size_by_our_own_lowering(name, tmp_path):
    outcome, notes = exported_by(paddle.FORMAT, name, tmp_path)
    assert (outcome.route, notes) == ("lowering", ())
    assert {sizes["batch"] for sizes in outcome.parity.batches} == {1, 3, zoo.BATCH}
    folder = tmp_path / "export/paddle/inference_model"
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.pdiparams"]


NO_GRU = "paddle-again: made by the route lowering, since x2paddle: failed: RuntimeError: X2Paddle has no GRU"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "route", "told"), [("resnet", "x2paddle", ()), ("gru", "lowering", (NO_GRU,))])
def test_x2paddle_makes_what_our_lowering_does_not(name, route, told, tmp_path):
    """X2Paddle first: a model that it translates, and one that it does not."""
    turned = replace(paddle.FORMAT, name="paddle-again", aliases=(), routes=paddle.FORMAT.routes[::-1])
    outcome, notes = exported_by(turned, name, tmp_path)
    assert (outcome.route, notes) == (route, told)


def exported_by(form, name, folder):
    """The verified outcome of a model of the zoo, and the notes."""
    module, inputs = zoo.build(name)
    report = polyexport.export(module, inputs, [form], folder / "export", bench=False)
    (outcome,) = report.outcomes
    assert (outcome.state, outcome.reason) == ("verified", "")
    return outcome, tuple(map(str, report.notes))


@pytest.fixture(scope="module")
def roots(exported):
    """Every export of the zoo, converted by our own route in one process."""
    folders = [str(exported(name).folder) for name in zoo.GROUND | zoo.FURTHER]
    made = many("paddle", "convert", ("paddle",), folders)
    assert made == {folder: {"paddle": "made"} for folder in folders}
    return folders


@pytest.mark.slow
class Aligned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


@pytest.mark.slow
def test_corners_stay_aligned_in_paddle_inference(tmp_path):
    report = polyexport.export(Aligned(), torch.rand(2, 3, 4, 4), ["paddle"], tmp_path / "out", bench=False)
    assert report["paddle"].state == "verified", report["paddle"].reason


def test_our_own_lowering_of_the_whole_zoo_agrees_with_pytorch(roots):
    found = many("paddle", "verify", ("paddle",), roots)
    cells = {Path(root).name: parities["paddle"] for root, parities in found.items()}
    assert {
        name: parity for name, parity in cells.items() if not isinstance(parity, dict) or not parity["passed"]
    } == {}
    assert all(len(parity["batches"]) > 1 for parity in cells.values())
    for name, whole, part in (
        ("vit", "1.layer_norm", "1.rsqrt"),
        ("lstm", "1.rnn", "1.tanh"),
        ("gru", "1.rnn", "1.tanh"),
    ):
        (folder,) = [Path(root) for root in roots if Path(root).name == name]
        program = (folder / "many/paddle/inference_model/model.json").read_text()
        assert (whole in program, part in program) == (True, False), "one operator, and not its parts"


@pytest.mark.slow
def test_the_saved_model_calls_its_tensors_as_forward_does(roots):
    """Read by Paddle Inference alone, which knows nothing of this package."""
    (root,) = [Path(root) for root in roots if Path(root).name == "dict_output"]
    printed = in_toolchain("paddle", "scripts/paddle_names.py", str(root / "many/paddle/inference_model"))
    assert json.loads(printed.splitlines()[-1]) == [["image"], ["boxes", "scores"]]


def test_a_weight_inside_a_loop_is_saved():
    """A Scan whose body multiplies by a matrix, saved, and run by Paddle Inference, against numpy."""
    assert answer("paddle", "weight_in_a_loop") is None


def test_a_clip_to_0_and_6_is_what_runtimes_fuse_to_a_convolution():
    """MobileNetV2's: as two comparisons it left oneDNN after each convolution, and took three times as long."""
    assert answer("paddle", "clip_to_0_and_6") is None


def test_a_recurrent_layer_of_any_length_is_paddles_own_operator():
    """Every kind, direction and layout, with lengths and without, against the layer step by step."""
    assert answer("paddle", "own_recurrent_layers") is None


def test_copies_protect_programs_from_passes_of_paddle_inference():
    """What the copies and our own addition are for is wrong without them; the others owe it to their operators."""
    mended, plain = json.loads(in_toolchain("paddle", "paddle_inference.py", str(PACKAGE)).splitlines()[-1])
    assert mended == []
    assert plain == [
        *("y + Floor(y)", "y + Reciprocal(y)", "y + CumSum(y)", "a product, unsqueezed"),
        *("integers transposed and reshaped", "a distance of integers", "a distance of doubles"),
        *("a product added to more axes", "windows in a linear layer", "pixels in rows"),
        "rows of one head, beside themselves",
    ]


def test_the_log_of_a_sum_of_nothing_is_minus_infinity():
    """ReduceLogSumExp over rows that a mask left empty, against numpy; Paddle's own operator answers NaN."""
    assert answer("paddle", "sum_of_nothing") is None


def test_outputs_of_one_value_are_returned_under_each_name():
    """A pass of the runtime makes one of what is computed twice: a value, a constant, an input, a product of two."""
    assert answer("paddle", "outputs_of_one_value") is None


# --- the graph it is given --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A model whose two convolutions have equal weights and whose pool says that it is not dilated."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; `pip install onnx`")
    one, two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    two.load_state_dict(one.state_dict())
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    module = nn.Sequential(one, nn.MaxPool2d(2), two).eval()
    torch.onnx.export(module, (torch.rand(2, 3, 8, 8),), str(path), dynamo=False, opset_version=15)
    return onnx.load(path)


def copied(graph):
    other = type(graph)()
    other.CopyFrom(graph)
    return other


def convolutions(graph):
    return [node for node in graph.graph.node if node.op_type == "Conv"]


def test_weights_that_two_layers_share_become_two(graph):
    first, second = convolutions(graph)
    assert set(first.input[1:]) & set(second.input[1:]) or len(graph.graph.initializer) < 4  # the exporter shares them
    own = copied(graph)
    paddle._unshare_weights(own)
    first, second = convolutions(own)
    assert not set(first.input[1:]) & set(second.input[1:])
    assert len({weight.name for weight in own.graph.initializer}) == 4


def test_the_prepared_graph_computes_the_same(graph):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install onnxruntime`")
    own = copied(graph)
    paddle._strip_dilations(own)
    paddle._unshare_weights(own)
    feed = {graph.graph.input[0].name: torch.rand(2, 3, 8, 8).numpy()}
    answers = [onnxruntime.InferenceSession(each.SerializeToString()).run(None, feed)[0] for each in (graph, own)]
    assert (answers[0] == answers[1]).all()


def test_dilations_without_effect_are_removed_from_pools_only(graph):
    own = copied(graph)
    paddle._strip_dilations(own)
    with_dilations = {n.op_type for n in own.graph.node if any(a.name == "dilations" for a in n.attribute)}
    assert with_dilations == {"Conv"}
