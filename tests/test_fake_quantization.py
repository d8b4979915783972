"""What trained with fake quantization becomes integers with the scales that it has, in a traced module."""

from __future__ import annotations

import copy
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import environments
import polyexport
from polyexport.capture import answer, snapshot
from polyexport.capture.calls import save_call
from polyexport.capture.unwrap import settle
from polyexport.capture.weights import WEIGHTS
from polyexport.spec import ExportSpec, TensorSpec
from polyexport.tracing.exported_program import export_program
from polyexport.tracing.fake_quantization import quantize_in_graph, with_integers
from polyexport.tracing.missing_scales import module_with_all_scales

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, 5)).train()


def eager(engine: str) -> nn.Module:
    fused = quantization.fuse_modules_qat(layers(), [["0", "1", "2"], ["3", "4"], ["6", "7"]])
    net = nn.Sequential(quantization.QuantStub(), fused, quantization.DeQuantStub())
    net.qconfig = quantization.get_default_qat_qconfig(engine)
    return quantization.prepare_qat(net)


def by_fx(engine: str) -> nn.Module:
    return prepare_qat_fx(layers(), quantization.get_default_qat_qconfig_mapping(engine), (IMAGES,))


def trained(prepare: Callable[[str], nn.Module], engine: str) -> tuple[nn.Module, torch.Tensor]:
    """A module that has seen data, with batch norms that do something, and its answer in eval mode."""
    module = prepare(engine)
    for _ in range(3):
        module(2 * IMAGES + 0.5)
    module.eval().apply(quantization.disable_observer)  # which would go on moving the scales
    with torch.no_grad():
        return module, copy.deepcopy(module)(IMAGES)


def traced(module: nn.Module) -> torch.fx.GraphModule:
    settle(module)
    return export_program(module, (IMAGES,), [[0]]).module()


@pytest.mark.parametrize("prepare", [eager, by_fx])
def test_integers_answer_exactly_as_the_module_that_was_trained(prepare):
    module, expected = trained(prepare, "qnnpack")
    graph = traced(module)
    assert with_integers(graph)
    assert torch.allclose(graph(IMAGES), expected, atol=1e-6)
    assert graph(IMAGES[:1]).shape == (1, 5)


@pytest.mark.parametrize("prepare", [eager, by_fx])
def test_steps_of_half_the_range_are_the_same_steps(prepare):
    """x86's activations have seven bits; within their range the steps are the same."""
    module, expected = trained(prepare, "fbgemm")
    graph = traced(module)
    assert with_integers(graph)
    assert (graph(IMAGES) - expected).abs().max() <= 0.05 * expected.abs().max()


def test_weights_are_stored_as_integers_and_nothing_of_batch_norms_is_left():
    graph = traced(trained(eager, "qnnpack")[0])
    with_integers(graph)
    left = {str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"}
    assert left == {"quantize_per_tensor", "dequantize_per_tensor", "conv2d", "relu", "flatten", "linear"}
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    stored = [tensor for name, tensor in graph.named_buffers() if name in used and tensor.dim() > 1]
    assert [tensor.shape[0] for tensor in stored] == [8, 6, 16, 5]
    assert {tensor.dtype for tensor in stored} == {torch.int8}


def test_each_layer_has_integers_right_before_it():
    graph = traced(trained(eager, "qnnpack")[0])
    with_integers(graph)
    layers = [node for node in graph.graph.nodes if str(node.target) in ("aten.conv2d.default", "aten.linear.default")]
    assert len(layers) == 4
    assert {str(node.args[0].target) for node in layers} == {"quantized_decomposed.dequantize_per_tensor.default"}


def test_a_weight_has_a_scale_for_each_channel_where_it_was_trained_with_them():
    graph = traced(trained(eager, "fbgemm")[0])
    with_integers(graph)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.quantized_decomposed.dequantize_per_channel.default) == 4


def test_a_fake_quantizer_with_two_names_is_fixed_under_both():
    """As layers that only move values share that of their input."""
    fake = quantization.FakeQuantize()
    net = nn.Sequential(fake, nn.Flatten(), fake)
    net(IMAGES)
    expected = net.eval().apply(quantization.disable_observer)(IMAGES)
    settle(net)
    assert net[0] is net[2]
    assert not hasattr(net[2], "fake_quant_enabled")
    torch.testing.assert_close(net(IMAGES), expected)


def test_a_module_without_fake_quantization_stays_as_it_is():
    module = layers().eval()
    graph = traced(module)
    before = [str(node.target) for node in graph.graph.nodes]
    assert not with_integers(graph)
    assert [str(node.target) for node in graph.graph.nodes] == before


def saved(module: nn.Module, folder: Path) -> tuple[Path, ExportSpec]:
    """The program of a module, and its signature."""
    settle(module)
    torch.export.save(export_program(module, (IMAGES,), [[0]]), folder / "model.pt2")
    np.savez(folder / "batch.npz", images=IMAGES.numpy())
    inputs, outputs = TensorSpec("images", "float32", ("batch", 3, 12, 12)), TensorSpec("y", "float32", ("batch", 5))
    return folder / "model.pt2", ExportSpec((inputs,), (outputs,), {"batch": 4}, calibration=(folder / "batch.npz",))


def without_scales_of_outputs(*layers: str) -> nn.Module:
    """As a quantizer for x86 leaves the outputs of these layers."""
    module = eager("qnnpack")
    for name in layers:
        module.get_submodule(name).activation_post_process = nn.Identity()
    module(2 * IMAGES + 0.5)
    return module.eval().apply(quantization.disable_observer)


def test_a_layer_without_a_scale_for_its_output_is_named_or_calibrated(tmp_path: Path):
    module = without_scales_of_outputs("1.8")
    expected = copy.deepcopy(module)(IMAGES)
    source, spec = saved(module, tmp_path)
    with pytest.raises(
        RuntimeError, match="left 1 of the tensors that layers read and return without a scale: linear_1"
    ):
        module_with_all_scales(source, spec, calibrated=False)
    graph = module_with_all_scales(source, spec, calibrated=True)
    (back,) = (node.args[0][0] for node in graph.graph.find_nodes(op="output"))
    assert back.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default
    assert (graph(IMAGES) - expected).abs().max() <= 0.51 * back.args[1]


def test_the_scale_behind_a_max_pool_is_that_of_the_layer_before_it(tmp_path: Path):
    """Both round and clip in order, so nothing changes."""
    module = without_scales_of_outputs("1.4")
    module[1][4] = nn.Sequential(module[1][4], nn.MaxPool2d(1), module[1][0].activation_post_process)
    expected = copy.deepcopy(module)(IMAGES)
    source, spec = saved(module, tmp_path)
    graph = module_with_all_scales(source, spec, calibrated=False)
    torch.testing.assert_close(graph(IMAGES), expected, rtol=0, atol=1e-6)
    layers = [node for node in graph.graph.nodes if str(node.target) == "aten.conv2d.default"]
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    assert [[user.target for user in node.users] for node in layers[1:]] == [[quantize]]


def test_of_two_roundings_in_a_row_the_narrower_one_is_kept():
    """Converters that make integers themselves drop the second; after a move of elements both are kept."""
    module, expected = trained(eager, "qnnpack")
    module[1][5] = nn.Sequential(quantization.FakeQuantize(), module[1][5], quantization.FakeQuantize())
    module[1][5][0](expected * 10), module[1][5][2](expected * 20)
    module.apply(quantization.disable_observer)
    graph = traced(module)
    with_integers(graph)
    quantize_in_graph(graph)
    ops = torch.ops.quantized_decomposed
    steps = graph.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default)
    in_a_row = [node for node in steps if node.args[0].target is ops.dequantize_per_tensor.default]
    assert not in_a_row
    (moved,) = (node for node in steps if str(node.args[0].target) == "aten.flatten.using_ints")
    assert moved.args[1] == pytest.approx(float(module[1][5][2].scale))


def test_a_convolution_with_its_batch_norm_answers_as_before():
    module, expected = trained(eager, "qnnpack")
    settle(module)
    with torch.no_grad():
        assert torch.allclose(module(IMAGES), expected, atol=1e-6)


@pytest.mark.slow
def test_what_torchao_quantizes_in_training_is_exported_with_the_scales_from_training():
    """In an environment that has it: where it is installed, every import of transformers imports it."""
    python = environments.interpreter("torchao", "torchao==0.18.0")
    script = Path(__file__).parent / "support" / "scripts" / "torchao_training.py"
    done = subprocess.run([str(python), str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_executorch_computes_in_integers_with_the_scales_that_were_trained(tmp_path: Path):
    module, _ = trained(eager, "qnnpack")
    far = [100 * IMAGES]  # ranges of these would leave next to nothing of the validation batch
    report = polyexport.export(module, IMAGES, ["executorch-int8"], tmp_path / "x", calibration=far, bench=False)
    assert (report["executorch-int8"].state, report["executorch-int8"].reason) == ("verified", "")
    assert (report["executorch-int8"].route, report["executorch-int8"].calibration) == ("trained scales", None)


@pytest.mark.slow
def test_tensorflow_lite_computes_in_integers_with_the_scales_that_were_trained(tmp_path: Path):
    """Which need static shapes, and yet come before a dynamic batch with scales that are not those."""
    module, expected = trained(eager, "qnnpack")
    formats = ["tflite-int8", "tflite-int8-nhwc"]
    report = polyexport.export(module, IMAGES, formats, tmp_path / "x", calibration=[100 * IMAGES], bench=False)
    for outcome in report.outcomes:
        assert (outcome.route, outcome.calibration) == ("trained scales", None), outcome.reason
        assert "float" not in outcome.remark
        assert outcome.inputs[0].dtype == outcome.outputs[0].dtype == "int8"
        assert outcome.parity is not None
        assert (outcome.parity.max_abs_error or 0.0) <= 0.02 * float(expected.abs().max())
    assert report["tflite-int8"].state == "degraded"
    assert (
        "with dynamic axes: trained scales, trained and calibrated scales: for static shapes only"
        in report["tflite-int8"].reason
    )
    assert report["tflite-int8-nhwc"].state == "verified"


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [eager, by_fx])
def test_onnx_and_openvino_compute_in_integers_with_the_scales_that_were_trained(tmp_path: Path, prepare):
    module, expected = trained(prepare, "qnnpack")
    formats = ["onnx-int8", "openvino-int8"]
    far = [100 * IMAGES]  # ranges of these would leave next to nothing of the validation batch
    report = polyexport.export(module, IMAGES, formats, tmp_path / "x", calibration=far, bench=False)
    for name in formats:
        outcome = report[name]
        assert (outcome.state, outcome.route, outcome.calibration) == ("verified", "trained scales", None), (
            outcome.reason
        )
        assert outcome.remark.startswith("with the scales from training")
        assert outcome.parity is not None
        assert (outcome.parity.max_abs_error or 0.0) <= 0.02 * float(expected.abs().max())
    import onnx

    graph = onnx.load(report.folder / "onnx-int8" / "model.onnx").graph
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in weights} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert len(weights) == 4
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + len(weights) + 4  # and the biases


@pytest.mark.slow
def test_a_module_without_fake_quantization_is_calibrated(tmp_path: Path):
    report = polyexport.export(layers().eval(), IMAGES, ["onnx-int8"], tmp_path / "x", bench=False)
    assert (report["onnx-int8"].state, report["onnx-int8"].route) == ("verified", "onnxruntime")
    assert report["onnx-int8"].calibration is not None


def test_an_answer_in_which_observers_moved_the_scales_is_not_compared(tmp_path):
    module, call = eager("qnnpack"), ((IMAGES,), {})
    module(2 * IMAGES + 0.5)
    module.eval()
    save_call(*call, tmp_path)
    snapshot.save_module(module, None, *call, tmp_path)
    torch.save(module.state_dict(), tmp_path / WEIGHTS)
    answer.ask(module, call, tmp_path)
    with pytest.raises(answer.NotCompared, match="observers of fake quantization moved its scales"):
        answer.disagreement(tmp_path, snapshot.load(tmp_path))
    answer.ask(module.apply(quantization.disable_observer), call, tmp_path)
    assert answer.disagreement(tmp_path, snapshot.load(tmp_path)) == ""
