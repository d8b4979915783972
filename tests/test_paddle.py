"""Paddle by X2Paddle: what it can carry is verified, and what it cannot says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyexport
import zoo
from polyexport.formats import paddle

CARRIED = ("lstm", "vit", "resnet", "convnext", "unet")
"""Of the zoo X2Paddle translates eleven; these have between them what the others have."""


def exported(name, tmp_path):
    module, inputs = zoo.build(name)
    report = polyexport.export(module, inputs, ["paddle"], tmp_path / "export", bench=False)
    return report.outcomes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CARRIED)
def test_a_model_is_verified_at_every_batch_size(name, tmp_path):
    outcome = exported(name, tmp_path)
    assert (outcome.state, outcome.route) == ("verified", "x2paddle"), outcome.reason
    assert {sizes["batch"] for sizes in outcome.parity.batches} == {1, 3, zoo.BATCH}
    folder = tmp_path / "export/paddle/inference_model"
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.pdiparams"]


@pytest.mark.slow
def test_what_it_cannot_translate_fails_with_its_own_words(tmp_path):
    outcome = exported("gru", tmp_path)
    assert outcome.state == "failed"
    assert "not supported" in outcome.reason


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


def test_dilations_that_say_nothing_are_taken_from_pools_only(graph):
    own = copied(graph)
    paddle._strip_dilations(own)
    with_dilations = {n.op_type for n in own.graph.node if any(a.name == "dilations" for a in n.attribute)}
    assert with_dilations == {"Conv"}
