"""Every format on every model of the zoo: a new format is tested by existing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import polyexport
import zoo
from polyexport import FORMATS, ExportSpec, Report, TensorSpec
from polyexport.capture.flatten import flat
from polyexport.formats import onnx
from polyexport.formats.graphdef import check_size

GROUND_FORMATS = ("torchscript", "pt2", "onnx", "openvino")


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.FORMATS)
@pytest.mark.parametrize("model", [*zoo.GROUND, *zoo.FURTHER])
def test_agrees_with_pytorch_at_three_batch_sizes(exported, model, name):
    outcome = exported(model)[name]
    assert (outcome.state, outcome.reason) == ("verified", "")
    assert [sizes["batch"] for sizes in outcome.parity.batches] == [zoo.BATCH, 1, 3]


@pytest.fixture(scope="session")
def dictionary(exported) -> Report:
    return exported("dict_output")


@pytest.mark.parametrize("name", GROUND_FORMATS)
def test_a_loaded_artifact_answers_by_name_as_pytorch_does(dictionary, name):
    module, _ = zoo.build("dict_output")
    image = np.random.default_rng(1).random((7, 3, 32, 32), dtype=np.float32)
    answer = polyexport.load(dictionary.folder / name)({"image": image})
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(image))
    assert list(answer) == ["boxes", "scores"]
    for key, tensor in expected.items():
        assert np.allclose(answer[key], tensor.numpy(), atol=1e-5), key


@pytest.mark.parametrize("name", GROUND_FORMATS)
def test_the_code_on_the_report_page_answers_as_pytorch_does(dictionary, name, monkeypatch):
    from polyexport.report.html import snippets

    python = next(each for each in snippets(dictionary[name]) if each.language == "Python")
    monkeypatch.chdir(dictionary.folder)
    found: dict = {}
    exec(python.code, found)
    outputs = found["outputs"]
    with np.load("validation_batch.npz") as batch:
        for key, answer in zip(
            ["boxes", "scores"], outputs.values() if hasattr(outputs, "values") else outputs, strict=True
        ):
            assert np.allclose(np.asarray(answer), batch[key], atol=1e-4), key


def test_onnx_has_our_names_axes_and_metadata(dictionary):
    import onnx

    model = onnx.load(dictionary.folder / "onnx" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (image,) = model.graph.input
    assert image.name == "image"
    assert image.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [output.name for output in model.graph.output] == ["boxes", "scores"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["checkpoint_sha256"] == dictionary.checkpoint.sha256
    assert metadata["inputs"] == "image: float32[batch, 3, 32, 32]"


def test_openvino_has_our_names_axes_and_metadata(dictionary):
    import openvino

    model = openvino.Core().read_model(dictionary.folder / "openvino" / "model.xml")
    assert [port.any_name for port in model.inputs] == ["image"]
    assert [port.any_name for port in model.outputs] == ["boxes", "scores"]
    assert model.inputs[0].partial_shape[0].is_dynamic
    assert model.get_rt_info(["polyexport", "checkpoint_sha256"]).value == dictionary.checkpoint.sha256


def test_pytorchs_own_formats_carry_the_metadata(dictionary):
    for name, load in (("torchscript", torch.jit.load), ("pt2", torch.export.load)):
        key = "_extra_files" if name == "torchscript" else "extra_files"
        extra = {"polyexport.json": ""}
        load(str(dictionary.folder / FORMATS[name].name / FORMATS[name].artifact), **{key: extra})
        text = extra["polyexport.json"]
        assert dictionary.checkpoint.sha256 in (text if isinstance(text, str) else text.decode())


class Sorted(torch.nn.Module):
    """`torch.export` cannot trace it, since the branch depends on data, and a trace keeps one side; a script both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > -1e9:
            return x * 2
        return x


def test_if_one_exporter_fails_the_other_is_used(tmp_path: Path):
    report = polyexport.export(Sorted(), torch.rand(4, 3), ["pt2", "onnx", "openvino"], tmp_path / "x", bench=False)
    assert report["pt2"].state == "failed"
    assert (report["onnx"].state, report["onnx"].route) == ("verified", "script")
    assert any("torchscript: one branch only: forward branches on its data" in n.text for n in report.notes)
    assert report["openvino"].state == "verified"


class Greatest(torch.nn.Module):
    """Adaptive max pools over parts of uneven size, by value or with their places."""

    def __init__(self, *, places: bool = False) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: torch.Tensor):
        found, places = functional.adaptive_max_pool2d(x, (4, 3), return_indices=True)
        return (found, places) if self.places else (found, functional.adaptive_max_pool1d(x.flatten(2), 5))


class Both(torch.nn.Module):
    def __init__(self, one: torch.nn.Module, other: torch.nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.other(x)


def to_onnx(module: torch.nn.Module, folder: Path) -> tuple[torch.Tensor, ...]:
    """Export it by way of a program with a free batch, and answer as ONNX Runtime does for another batch size."""
    program = torch.export.export(module, (torch.rand(2, 3, 11, 13),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, folder / "m.pt2")
    image = torch.rand(3, 3, 11, 13)
    names = [TensorSpec(f"output_{index}", "float32", ()) for index in range(2)]
    spec = ExportSpec((TensorSpec("x", "float32", (2, 3, 11, 13)),), tuple(names))
    onnx.convert_program(folder / "m.pt2", folder / "m.onnx", spec)
    found = onnx.load(folder / "m.onnx", spec, threads=1)({"x": image.numpy()})
    return image, *map(torch.from_numpy, found.values())


def test_adaptive_maxima_over_uneven_parts_reach_onnx(tmp_path: Path):
    image, *found = to_onnx(Greatest(), tmp_path)
    assert all(map(torch.equal, found, Greatest()(image)))


def test_a_pool_larger_than_its_image_is_cut_to_it(tmp_path: Path):
    import onnx as library

    pools = [torch.nn.AvgPool2d((40, 9), stride, (2, 1), ceil_mode=True) for stride in (None, (40, 2))]
    module = Both(*pools)
    image, *found = to_onnx(module, tmp_path)
    assert all(map(torch.allclose, found, module(image)))
    nodes = library.load(tmp_path / "m.onnx").graph.node
    shapes = [list(each.ints) for node in nodes for each in node.attribute if each.name == "kernel_shape"]
    assert shapes == [[15, 9]] * 2


def test_the_reason_names_what_the_exporter_lacks(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"^DispatchError: No ONNX function found for .*adaptive_max_pool2d"):
        to_onnx(Greatest(places=True), tmp_path)


class Shares(torch.nn.Module):
    """Ones with the probability given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(x.sigmoid())


@pytest.mark.parametrize("route", ["dynamo", "torchscript"])
def test_onnx_draws_ones_with_the_probability_of_ones(route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime's own Bernoulli draws them with that of zeros, as the standard's definition has it."""
    module, x = flat(Shares(), (torch.full((2, 5000), -3.0),), {}), np.full((2, 5000), -3.0, np.float32)
    spec = ExportSpec((TensorSpec("x", "float32", (2, 5000)),), (TensorSpec("y", "float32", (2, 5000)),))
    if route == "dynamo":
        torch.export.save(torch.export.export(module, module.example, strict=False), tmp_path / "m.pt2")
        onnx.convert_program(tmp_path / "m.pt2", tmp_path / "m.onnx", spec)
    else:
        monkeypatch.setattr("polyexport.capture.snapshot.load", lambda source, outputs: module)
        monkeypatch.setattr("polyexport.capture.calls.example_inputs", lambda source, spec: module.example)
        onnx.convert_trace(tmp_path, tmp_path / "m.onnx", spec)
    drawn = onnx.load(tmp_path / "m.onnx", spec, threads=1)({"x": x})["y"]
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert abs(drawn.mean() - 1 / (1 + np.exp(3.0))) < 0.02


def test_the_exported_module_is_not_touched(tmp_path: Path):
    module, inputs = zoo.build("tuple_output")
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    polyexport.export(module, inputs, ["torchscript"], tmp_path / "x", bench=False)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_exporting_in_another_order_gives_the_same_result(tmp_path: Path):
    module, inputs = zoo.build("dict_output")
    one = polyexport.export(module, inputs, ["torchscript", "onnx"], tmp_path / "one", bench=False)
    other = polyexport.export(module, inputs, ["onnx", "torchscript"], tmp_path / "other", bench=False)
    for name in ("torchscript", "onnx"):
        assert one[name].parity == other[name].parity


def test_a_frozen_graph_refuses_weights_that_one_message_cannot_hold(tmp_path):
    weights = tmp_path / "variables" / "variables.data-00000-of-00001"
    weights.parent.mkdir()
    weights.touch()
    check_size(tmp_path)
    os.truncate(weights, 2**31)  # a hole takes no space
    with pytest.raises(ValueError, match=r"is limited to 2 GiB, but the weights take 2\.00 GiB"):
        check_size(tmp_path)
