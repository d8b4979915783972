"""ONNX and OpenVINO in lower precisions: made, smaller, right on every batch size, and refuted when they are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyexport
from polyexport import FORMATS, ExportSpec, Report, TensorSpec
from polyexport.formats import onnx_quantized
from polyexport.formats.onnx import opened
from polyexport.formats.openvino_nncf import group_size
from polyexport.measure import drafts
from polyexport.measure.drafts import distance
from polyexport.measure.parity import Parity, compare
from polyexport.measure.weights import InFloat, in_four_bits
from polyexport.report import manifest
from polyexport.spec import calibration, read_arrays, write_arrays

ONNX = ("onnx-fp16", "onnx-int8", "onnx-int8-symmetric", "onnx-w8")
OPENVINO = ("openvino-fp16", "openvino-int8", "openvino-w8", "openvino-w4")
EIGHT_BITS = ("onnx-int8", "onnx-w8", "openvino-int8", "openvino-w8")


class Classifier(torch.nn.Module):
    """Convolutions and matrices, of which one number is beyond what half precision holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.ReLU()),
            *(torch.nn.Flatten(), torch.nn.Linear(512, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128)),
            *(torch.nn.ReLU(), torch.nn.Linear(128, 10)),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image) * (1.0 + image.mean((1, 2, 3)).unsqueeze(1) * 1e6) / 1e6


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.manual_seed(0)
    unclean = torch.rand(4, 3, 16, 16)
    unclean[1, 2, 3, 4] = torch.nan
    return polyexport.export(
        Classifier(),
        torch.rand(16, 3, 16, 16),
        ["onnx", "openvino", *ONNX, *OPENVINO],
        tmp_path_factory.mktemp("low") / "out",
        calibration=[torch.rand(5, 3, 16, 16), unclean],
        bench=False,
    )


def judged(report: Report, name: str, path: Path | None = None) -> Parity:
    """What parity says of the artifact, or of another file in its place, on the validation batch."""
    spec, each = manifest.load(report.folder).spec, FORMATS[name]
    batch = read_arrays(report.folder / "validation_batch.npz")
    run = each.open(path or report.folder / name / each.artifact, spec, threads=1)
    reference = {name: batch[name] for name in spec.output_names}
    return compare(run({name: batch[name] for name in spec.input_names}), reference, each.limits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONNX, *OPENVINO])
def test_a_lower_precision_agrees_at_every_batch_size(report, name):
    outcome = report[name]
    assert outcome.publishable, outcome.reason
    assert [str(tensor) for tensor in outcome.inputs] == ["image: float32[batch, 3, 16, 16]"]
    assert {sizes["batch"] for sizes in outcome.parity.batches} >= {16, 1, 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONNX, *OPENVINO])
def test_a_lower_precision_is_smaller(report, name):
    bits = {"float16": 16, "int8": 8, "w8": 8, "w4": 4}[report[name].precision]
    whole = report[name.split("-")[0]].artifact.bytes
    assert report[name].artifact.bytes < whole * (bits / 32 + 0.12)


@pytest.mark.slow
def test_the_report_names_the_calibration_data(report):
    found = report["onnx-int8"].calibration
    assert (found.batches, found.rows) == (("validation_batch.npz", "source/call_001.npz"), 21)
    assert found.left_out == ("source/call_002.npz",)
    assert report["onnx-w8"].calibration is None
    (note,) = (note.text for note in report.notes if "calibrated with" in note.text)
    assert note.startswith(
        "onnx-fp16, onnx-int8, onnx-int8-symmetric, openvino-int8, openvino-w4: calibrated with 2 batches of 21 rows"
    )


@pytest.mark.slow
def test_values_beyond_half_precision_stay_float(report):
    assert "their values exceed float16: 1 × Add, 1 × Div, 2 × Mul" in report["onnx-fp16"].remark


@pytest.mark.slow
def test_the_report_has_the_share_of_the_weights_in_four_bits(report):
    assert report["openvino-w4"].remark == "93% of its weights in 4 bits, 7% in 8 bits"


class Sequence1d(torch.nn.Module):
    """A convolution and a recurrent layer, which NNCF does not store in four bits, the layer in no bits at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rnn = torch.nn.Conv1d(3, 24, 5), torch.nn.GRU(24, 16, batch_first=True)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.body(signal).transpose(1, 2))[0]


@pytest.mark.slow
def test_weights_that_nncf_leaves_are_stored_in_few_bits_too(tmp_path):
    torch.manual_seed(0)
    names = ["openvino-int8", "openvino-w8", "openvino-w4"]
    report = polyexport.export(Sequence1d(), torch.rand(4, 3, 20), names, tmp_path / "out", bench=False)
    assert [(each.state, each.reason) for each in report.outcomes if each.format in names] == [("verified", "")] * 3
    assert "of its weights in float" not in report["openvino-int8"].remark
    assert "in 4 bits" in report["openvino-w4"].remark


@pytest.mark.parametrize(
    ("four", "eight", "in_floats", "remark", "shortfall"),
    [
        (90, 10, 0, "90% of its weights in 4 bits, 10% in 8 bits", ""),
        (40, 60, 0, "", "40% of its weights in 4 bits, 60% in 8 bits"),
        (20, 20, 60, "", "20% of its weights in 4 bits, 20% in 8 bits; 60% of its weights in float, since"),
    ],
)
def test_most_weights_have_to_be_in_four_bits(four, eight, in_floats, remark, shortfall):
    assert in_four_bits(four, eight, in_floats, "since") == InFloat(remark, shortfall)


def test_the_size_of_a_group_divides_the_row():
    assert [group_size(row) for row in (128, 96, 27, 10, 6, 131)] == [32, 32, 27, 10, 6, 131]


# --- shadows: what must not pass --------------------------------------------------------------------------------------


def edited(report: Report, name: str, folder: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of the artifact with its first large weight in int8, or that weight's and its input's numbers, edited."""
    import onnx

    model = onnx.load(report.folder / name / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def change(model: Any, wanted: Callable[[str, np.ndarray], bool], by: Callable[[np.ndarray], np.ndarray]) -> None:
    from onnx import numpy_helper

    tensors = [each for each in model.graph.initializer if wanted(each.name, numpy_helper.to_array(each))]
    assert tensors
    for tensor in tensors[:1]:
        tensor.CopyFrom(numpy_helper.from_array(by(numpy_helper.to_array(tensor)), tensor.name))


def is_weight(name: str, array: np.ndarray) -> bool:
    return array.dtype == np.int8 and array.ndim > 1


def swapped(array: np.ndarray) -> np.ndarray:
    """With the output channels of a weight in reverse, whichever axis they lie on."""
    return np.ascontiguousarray(array[::-1, ::-1])


def is_zero_point(name: str, array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 0 and array > 0


def is_activation_scale(name: str, array: np.ndarray) -> bool:
    return array.dtype == np.float32 and array.ndim == 0 and name.endswith("_scale") and "relu" in name


PLANTED = {
    "a swapped channel": ("onnx-int8", is_weight, swapped),
    "a swapped channel for TensorRT": ("onnx-int8-symmetric", is_weight, swapped),
    "a saturated layer for TensorRT": ("onnx-int8-symmetric", is_activation_scale, lambda scale: scale / 64),
    "swapped weights": ("onnx-w8", is_weight, swapped),
    "a wrong zero point": ("onnx-int8", is_zero_point, lambda zero: zero // 2),
    "a saturated layer": ("onnx-int8", is_activation_scale, lambda scale: scale / 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_error_is_a_mismatch(report, tmp_path, fault):
    name, wanted, by = PLANTED[fault]
    assert judged(report, name).passed
    assert not judged(report, name, edited(report, name, tmp_path, lambda model: change(model, wanted, by))).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", OPENVINO)
def test_a_weight_of_openvino_with_its_channels_in_reverse_is_a_mismatch(report, tmp_path, name):
    import openvino

    assert judged(report, name).passed
    folder = report.folder / name
    (tmp_path / "model.xml").write_bytes((folder / "model.xml").read_bytes())
    constants = [
        node
        for node in openvino.Core().read_model(folder / "model.xml").get_ordered_ops()
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 4
    ]
    data, whole = constants[0].data, (folder / "model.bin").read_bytes()
    assert whole.count(data.tobytes()) == 1
    wrong = whole.replace(data.tobytes(), np.ascontiguousarray(data[::-1]).tobytes())
    (tmp_path / "model.bin").write_bytes(wrong)
    assert not judged(report, name, tmp_path / "model.xml").passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "by"),
    [((3, 4), lambda bound, span: bound + span / 4), ((1, 2, 3, 4), lambda bound, span: bound / 8)],
    ids=["a wrong zero point", "a saturated layer"],
)
def test_a_planted_error_in_openvinos_ranges_is_a_mismatch(report, tmp_path, inputs, by):
    import openvino

    model = openvino.Core().read_model(report.folder / "openvino-int8" / "model.xml")
    for node in [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]:
        low, high = (node.input_value(index).get_node().data for index in (3, 4))
        for index in inputs:
            bound = by(node.input_value(index).get_node().data, high - low)
            node.input(index).replace_source_output(openvino.opset13.constant(bound, np.float32).output(0))
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    assert not judged(report, "openvino-int8", tmp_path / "model.xml").passed


@pytest.mark.slow
def test_for_tensorrt_zero_points_are_0_and_biases_are_float(report):
    import onnx

    model = onnx.load(report.folder / "onnx-int8-symmetric" / "model.onnx")
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {(constants[node.input[2]].dtype.name, bool(constants[node.input[2]].any())) for node in found} == {
        ("int8", False)
    }
    assert "int32" not in {array.dtype.name for array in constants.values()}


# --- batches that cannot be calibrated with ---------------------------------------------------------------------------


def test_where_every_batch_has_a_nan_there_are_no_ranges(tmp_path):
    from planted import calibrates, planted

    x = torch.rand(4, 3)
    x[1, 2] = torch.nan
    made = polyexport.export(
        torch.nn.Linear(3, 2), x, [planted("ranges", calibrates, calibrated=True)], tmp_path / "out", bench=False
    )
    assert made["ranges"].state == "failed"
    assert made["ranges"].reason.startswith("no batch to calibrate with: validation_batch.npz has NaN or infinity")


def test_formats_with_the_same_calibration_share_one_note():
    from polyexport import Outcome
    from polyexport.report.outcome import Artifact, Calibration, of_precisions

    made = Outcome("a-int8", "int8", "verified", artifact=Artifact("a", 1, ""), calibration=Calibration(("x.npz",), 1))
    other = replace(made, format="b-int8", remark="in float32: 1 × Softmax")
    assert list(of_precisions([made, other, Outcome("c", "int8", "failed", calibration=made.calibration)])) == [
        "a-int8, b-int8: calibrated with 1 batch of 1 row in all (x.npz)",
        "b-int8: in float32: 1 × Softmax",
    ]


# --- matrices that cost too much --------------------------------------------------------------------------------------


@pytest.fixture
def outlier(tmp_path: Path) -> tuple[Path, ExportSpec]:
    """An ONNX graph of three matrices; a column between the first two is 1,000 times as large as the others."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(16, 16)).astype(np.float32) / 4 for name in ("first", "second", "third")}
    weights["first"][:, 0] *= 1000
    weights["second"][0] /= 1000
    nodes = [
        helper.make_node("MatMul", [source, name], [target], name=f"node_{name}")
        for source, name, target in (("x", "first", "a"), ("b", "second", "c"), ("d", "third", "y"))
    ]
    nodes[1:1] = [helper.make_node("Relu", ["a"], ["b"])]
    nodes[3:3] = [helper.make_node("Relu", ["c"], ["d"])]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 16]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "x.onnx")
    write_arrays(tmp_path / "x.npz", {"x": random.normal(size=(64, 16)).astype(np.float32)})
    x, y = (TensorSpec(name, "float32", ("batch", 16)) for name in ("x", "y"))
    return tmp_path / "x.onnx", ExportSpec((x,), (y,), calibration=(tmp_path / "x.npz",))


def off(source: Path, target: Path, spec: ExportSpec) -> float:
    """How far the quantized model is from the float one."""
    onnx_quantized.quantize(source, target, spec, methods=["MinMax"])
    batches = list(calibration(spec))
    return distance(*([opened(path, threads=1)(each) for each in batches] for path in (source, target)))


def test_the_costliest_matrix_goes_back_to_float(outlier, tmp_path):
    source, spec = outlier
    assert off(source, tmp_path / "y.onnx", spec) < 0.05
    remark = FORMATS["onnx-int8"].open(tmp_path / "y.onnx", spec, threads=1).remark
    assert "kept in float, each with the error that it alone causes: second (" in remark
    assert "in float32: 2 × MatMul" in remark


def test_a_draft_that_onnx_runtime_does_not_load_is_not_the_only_one(outlier, tmp_path, monkeypatch, capsys):
    """ONNX Runtime's optimizers can make a graph of a whole model in Q/DQ that its own check refuses."""
    source, spec = outlier
    quantized = onnx_quantized._with_ranges

    def refused_as_a_whole(prepared, found, operators, *choice):
        model = quantized(prepared, found, operators, *choice)
        if operators == onnx_quantized._every_operator():
            model.graph.node[-1].op_type = "Unknown"
        return model

    monkeypatch.setattr(onnx_quantized, "_with_ranges", refused_as_a_whole)
    assert off(source, tmp_path / "y.onnx", spec) < 0.05
    assert "ONNX Runtime does not load a draft: " in capsys.readouterr().out


def test_what_symbolic_inference_leaves_behind_is_not_in_the_current_folder(outlier, tmp_path, monkeypatch):
    from onnxruntime import quantization

    def gives_up(source, target, *, skip_symbolic_shape=False):
        if not skip_symbolic_shape:
            Path("sym_shape_infer_temp.onnx").touch()
            raise RuntimeError("Incomplete symbolic shape inference")

    monkeypatch.setattr(quantization, "quant_pre_process", gives_up)
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    onnx_quantized._prepared(outlier[0], tmp_path / "temporary")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_requested_share_of_layers_goes_back_to_float(outlier, tmp_path):
    source, spec = outlier
    off(source, tmp_path / "y.onnx", replace(spec, in_float=1 / 2))
    remark = FORMATS["onnx-int8"].open(tmp_path / "y.onnx", spec, threads=1).remark
    assert "in float32: 3 × MatMul" not in remark
    assert "second (" in remark.partition("kept in float")[2]
    assert len(re.findall(r"\w+ \([\d.]+%\)", remark)) == 2  # of three matrices one or two are the half


def test_without_a_round_the_output_stays_far_off(outlier, tmp_path, monkeypatch):
    source, spec = outlier
    monkeypatch.setattr(drafts, "SHARES", ())
    assert off(source, tmp_path / "y.onnx", spec) > 0.2


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_weights_of_recurrent_layers_are_in_int8_unless_they_are_too_small_to_gain(tmp_path, kind, gates):
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(0)
    weights = [random.normal(size=(1, gates * 8, 8)).astype(np.float32) for _ in "WR"]
    node = helper.make_node(kind, ["x", "W", "R"], ["y"], hidden_size=8)
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["time", *size, 8]) for name, size in SIZES)
    graph = helper.make_graph([node], "net", [x], [y], list(map(numpy_helper.from_array, weights, "WR")))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "x.onnx")
    write_arrays(tmp_path / "x.npz", {"x": random.normal(size=(5, 2, 8)).astype(np.float32)})
    spec = ExportSpec((TensorSpec("x", "float32", ("time", 2, 8)),), (), calibration=(tmp_path / "x.npz",))
    for name in ("onnx-int8", "onnx-w8"):
        FORMATS[name].routes[-1].convert(tmp_path / "x.onnx", tmp_path / f"{name}.onnx", spec)
        opened = FORMATS[name].open(tmp_path / f"{name}.onnx", spec, threads=1)
        assert opened.shortfall == ("100% of its weights in float" if kind == "RNN" else "")


SIZES = (("x", [2]), ("y", [1, 2]))


class Outlier(torch.nn.Module):
    """Between its first two matrices one column is 100,000 times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.first.weight[0] *= 1e5
            self.second.weight[:, 0] /= 1e5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


@pytest.mark.slow
def test_openvinos_costliest_matrix_goes_back_to_float_too(tmp_path):
    torch.manual_seed(0)
    report = polyexport.export(Outlier(), torch.randn(64, 16), ["openvino-int8"], tmp_path / "out", bench=False)
    outcome = report["openvino-int8"]
    assert outcome.publishable, outcome.reason
    assert "kept in float, each with the error that it alone causes: " in outcome.remark


def made(kept: Sequence[str], alone: Sequence[str]) -> drafts.Draft:
    """Of three layers the second costs nearly all of it."""
    costs = {"a": 0.02, "b": 0.5, "c": 0.01}
    quantized = alone or [name for name in costs if name not in kept]
    return drafts.Draft(None, "", sum(costs[name] for name in quantized), tuple(kept))


def test_layers_go_back_until_it_is_near_and_no_further():
    chosen, told = drafts.mended([made((), ())], {"a": "net.a", "b": "net.b", "c": "net.c"}, made)
    assert chosen.kept == ("b",)
    assert told == (
        "kept in float, each with the error that it alone causes: net.b (50.0%) "
        "(error of the outputs: 53.0%, then 3.0%)"
    )


def test_a_share_of_the_layers_goes_back_however_near_the_outputs_are():
    near = drafts.Draft(None, "", 0.01)
    chosen, told = drafts.mended([near], {"a": "net.a", "b": "net.b", "c": "net.c"}, made, 1 / 2)
    assert chosen.kept == ("b", "a")
    assert told.startswith(
        "kept in float, each with the error that it alone causes: net.b (50.0%), net.a (2.0%) (error of"
    )


def test_close_outputs_stay_and_rounds_without_an_effect_are_not_kept():
    near = drafts.Draft(None, "", 0.01)
    assert drafts.mended([near], {"a": "a"}, made) == (near, "")
    far = drafts.Draft(None, "", 0.2)
    assert drafts.mended([far], {"a": "a"}, lambda kept, alone: drafts.Draft(None, "", 0.3, tuple(kept))) == (far, "")


def test_the_costliest_weights_get_8_bits_until_it_is_near_and_half_stay_in_4():
    costs, sizes = {"a": 0.01, "b": 0.5, "c": 0.02}, {"a": 40, "b": 20, "c": 40}
    for scale, expected in ((1, {"a", "c"}), (8, {"a", "c"}), (0.1, {"a", "b", "c"})):

        def made(names: Collection[str], scale: float = scale) -> drafts.Draft:
            return drafts.Draft({*names}, "", scale * sum(costs[name] for name in names))

        assert drafts.partly(sizes, 100, made).model == expected
    assert drafts.partly({"a": 40, "c": 40}, 100, lambda names: drafts.Draft({*names}, "", 1.0)).model == {"a", "c"}


def test_costs_are_measured_until_the_processor_time_is_spent(monkeypatch):
    spent = iter((0, 1, 100, 121, 122))  # seconds at the start, then before each layer
    monkeypatch.setattr(drafts, "_processor_seconds", lambda: next(spent))
    chosen, told = drafts.mended([made((), ())], dict.fromkeys("abcd", "net"), made, share=1.0)
    assert set(chosen.kept) == {"a", "b"}
    assert "net (50.0%)" in told


def test_integers_are_as_far_apart_as_the_share_of_them_that_differs():
    x = np.arange(8)
    assert distance([{"y": x}], [{"y": x}]) == 0
    assert distance([{"y": x}], [{"y": np.where(x < 2, -x - 1, x)}]) == pytest.approx(0.25)


def test_the_distance_is_relative_to_each_output_and_infinite_where_one_is_nan():
    x = np.full((2, 2), 100.0, np.float32)
    assert distance([{"y": x}], [{"y": x * 1.1}]) == pytest.approx(0.1)
    assert distance([{"y": x, "z": x}], [{"y": x * 1.1, "z": x * 1.1}]) == pytest.approx(0.1)
    assert distance([{"y": x}], [{"y": x * np.nan}]) == np.inf
