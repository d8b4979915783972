"""Layer by layer: the first layer that differs from PyTorch is named, whatever the format calls its tensors."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import polyexport
from planted import planted, wrong
from polyexport import Arrays, ExportSpec, Report
from polyexport.capture.flatten import flat
from polyexport.capture.layers import computed
from polyexport.cli import app
from polyexport.measure.layers import Layer, compared, divergence, first, judged, output, paired, worst
from polyexport.measure.tolerance import Tolerance

FLOAT32 = Tolerance.for_precision("float32")
RANDOM = np.random.default_rng(0)


def images(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape or (2, 3, 8, 8)).astype(np.float32)


# --- what a module computes -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A branch, a layer that computes in place, one that does nothing, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.act(self.bn(self.conv(x)))
        z = self.act(self.drop(y) + x)
        return {"scores": self.head(z.mean((2, 3)))}


def test_layers_have_their_values_and_their_inputs_in_order():
    found = computed(flat(Residual().eval(), (torch.from_numpy(images()),), {}), {"x": images()})
    assert found.reads == {
        "conv": (),
        "bn": ("conv",),
        "act": ("bn",),
        "add behind act": ("act",),
        "act (call 2)": ("add behind act",),
        "mean behind act (call 2)": ("act (call 2)",),
        "head": ("mean behind act (call 2)",),
    }
    assert list(found.values) == list(found.reads)
    assert found.answers == {"scores": ("head",)}
    assert (found.values["bn"] < 0).any()  # and not what the layer behind it made of it in place
    assert (found.outputs["scores"] == found.values["head"]).all()


# --- which tensor belongs to which layer ------------------------------------------------------------------------------

CHAIN = {"conv": (), "bn": ("conv",), "relu": ("bn",), "head": ("relu",), output("y"): ("head",)}


def chain() -> Arrays:
    conv = images()
    bn = conv * 3 + 1
    return {"conv": conv, "bn": bn, "relu": np.maximum(bn, 0), "head": images(2, 5)}


def rows(expected: Arrays, found: Arrays, reads: dict[str, tuple[str, ...]], **outputs: str) -> dict[str, Layer]:
    """The layers by name; each of `outputs` is computed by the tensor of that name."""
    ends = [judged(output(name), expected[of], found[of], FLOAT32, None, of) for name, of in outputs.items()]
    return {layer.name: layer for layer in compared(expected, found, reads, FLOAT32, None, ends)}


def test_values_are_matched_in_any_layout_and_under_any_name():
    values = chain()
    found = {"a": values["head"].copy(), "b": np.moveaxis(values["relu"], 1, -1), "c": values["bn"].reshape(6, 64)}
    assert paired(values, found, CHAIN, ()) == {"head": "a", "relu": "b", "bn": "c"}


def test_a_layer_that_was_merged_into_the_next_is_named_with_it():
    values = chain()
    found = rows(values, {"relu": values["relu"], "head": values["head"]}, CHAIN, y="head")
    assert [(name, layer.merged, layer.reason) for name, layer in found.items()] == [
        ("relu", ("conv", "bn"), ""),
        ("head", (), ""),
        ("output y", (), ""),
    ]
    assert divergence(list(found.values())) == ""


def test_the_first_layer_with_a_swapped_channel_is_named_and_so_is_what_was_merged_into_it():
    values = chain()
    bad = values["bn"][:, [1, 0, 2]]
    found = rows(values, {"bn": bad, "relu": np.maximum(bad, 0), "head": -values["head"]}, CHAIN, y="head")
    layers = list(found.values())
    assert first(layers) is found["bn"]
    assert found["bn"].shown_name == "bn (with conv)"
    assert "columns 0, 1 of axis 1" in found["bn"].reason
    assert worst(layers) is found["head"]
    assert divergence(layers).startswith("the first layer beyond the tolerance is bn (with conv) (relative error ")
    assert ", the worst head (" in divergence(layers)


@pytest.mark.parametrize("dead", [0.0, np.nan])
def test_a_layer_without_a_matching_tensor_is_named_by_its_order(dead):
    values = chain()
    found = {name: values[name] for name in ("conv", "bn")}
    found |= {name: np.full_like(values[name], dead) for name in ("relu", "head")}
    layers = list(rows(values, found, CHAIN, y="head").values())
    assert [(layer.name, layer.tensor, bool(layer.reason)) for layer in layers] == [
        ("conv", "conv", False),
        ("bn", "bn", False),
        ("relu", "relu", True),
        ("head", "head", True),
        ("output y", "head", True),
    ]


def test_a_fault_in_the_last_layer_of_a_branch_is_named_though_the_next_layer_is_right():
    values = {"body": images(2, 6), "a": images(2, 4), "b": images(2, 3)}
    reads = {"body": (), "a": ("body",), "b": ("body",), output("y"): ("a",), output("z"): ("b",)}
    found = rows(values, {**values, "a": values["a"][:, ::-1].copy()}, reads, y="a", z="b")
    assert [name for name, layer in found.items() if layer.reason] == ["a", "output y"]


def test_a_tensor_from_before_a_layer_is_never_taken_for_it():
    """The artifact has no values of the convolution alone, and another tensor of its size at the beginning."""
    values = {"stem": images(), **chain()}
    reads = {"stem": (), **CHAIN, "conv": ("stem",)}
    bad = values["bn"][:, ::-1].copy()
    artifact = {"before": images(), "stem": values["stem"], "bn": bad}
    found = rows(values, {**artifact, "relu": np.maximum(bad, 0), "head": -values["head"]}, reads, y="head")
    assert found["bn"].merged == ("conv",)


def test_differences_by_rounding_are_within_the_tolerance():
    """A column of small numbers is off by more than its own scale allows."""
    values = {"layer": images(8, 4) * np.float32([1, 1, 1, 1e-3])}
    found = {"layer": values["layer"] + np.float32([0, 0, 0, 1e-5])}
    noise = {"layer": np.full((8, 4), 1e-5, np.float32)}
    assert [bool(layer.reason) for layer in compared(values, found, {"layer": ()}, FLOAT32, None, ())] == [True]
    assert [bool(layer.reason) for layer in compared(values, found, {"layer": ()}, FLOAT32, noise, ())] == [False]


# --- artifacts --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three convolutions, the middle one with a batch norm, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(8, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.tail, self.act = nn.Conv2d(8, 12, 3, 2, 1), nn.SiLU()
        self.head_a, self.head_b = nn.Linear(12, 10), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.act(self.bn(self.conv(self.stem(x).relu())))
        x = self.tail(x).relu().mean((2, 3))
        return {"a": self.head_a(x), "b": self.head_b(x)}


FORMATS = ("onnx", "openvino", "tflite", "onnx-int8")


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    for _ in range(3):
        made(torch.randn(16, 3, 16, 16))
    return made.eval()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, net: Net) -> Report:
    into = tmp_path_factory.mktemp("explained") / "out"
    made = polyexport.export(net, torch.randn(8, 3, 16, 16), FORMATS, into, bench=False)
    assert [(outcome.format, outcome.state) for outcome in made.outcomes] == [(name, "verified") for name in FORMATS]
    return made


def explained(folder: Path, name: str) -> tuple[int, list[Layer]]:
    """Exit code and table of the command, which this user's own export needs no --trust for."""
    done = CliRunner().invoke(app, ["explain", str(folder), name, "--json"])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, [Layer(**{**row, "merged": tuple(row["merged"])}) for row in json.loads(done.stdout)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_of_an_artifact_that_agrees_agrees(report, name):
    code, layers = explained(report.folder, name)
    named = {part for layer in layers for part in (layer.name, *layer.merged)}
    assert (code, divergence(layers)) == (0, "")
    assert named >= {"stem", "conv", "bn", "act", "tail", "head_a", "head_b", "output a", "output b"}


def with_swapped_channels(data: bytes, weight: np.ndarray) -> bytes:
    """A file in which the first two output channels of a weight have changed places, in whichever layout it lies."""
    swapped = weight[[1, 0, *range(2, len(weight))]]
    for order in permutations(range(weight.ndim)):
        stored = np.ascontiguousarray(weight.transpose(order)).tobytes()
        if data.count(stored) == 1:
            return data.replace(stored, np.ascontiguousarray(swapped.transpose(order)).tobytes())
    raise AssertionError("the weight is not in the file")


FILES = {"onnx": "model.onnx", "openvino": "model.bin", "tflite": "model.tflite"}


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["stem", "tail", "head_a", "head_b"])
@pytest.mark.parametrize("name", FILES)
def test_a_swapped_channel_is_found_in_the_layer_that_has_it(report, net, name, layer):
    file = report.folder / name / FILES[name]
    whole = file.read_bytes()
    file.write_bytes(with_swapped_channels(whole, net.get_submodule(layer).weight.detach().numpy()))
    try:
        code, layers = explained(report.folder, name)
    finally:
        file.write_bytes(whole)
    found = first(layers)
    assert code == 1
    assert found is not None
    assert layer in (found.name, *found.merged), divergence(layers)


@pytest.mark.slow
def test_without_trust_an_export_that_was_made_elsewhere_is_not_unpickled(report, tmp_path):
    shutil.copytree(report.folder, tmp_path / "copied")
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "copied"), "onnx"])
    assert done.exit_code == 1
    assert "if you trust who made the export, give --trust" in done.output


@pytest.mark.slow
def test_a_format_without_layers_is_refused_in_one_line(report):
    done = CliRunner().invoke(app, ["explain", str(report.folder), "pt2"])
    assert done.exit_code == 2
    assert "has no artifact 'pt2' that runs" in done.output


# --- in the report ----------------------------------------------------------------------------------------------------


def intermediates(path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
    """The first layer is right, and the second has the wrong sign."""
    first = np.maximum(inputs["input"], 0)
    return {"one": first, "two": -np.tanh(first)}


def test_a_mismatch_names_the_layer_in_its_reason_and_the_page_has_the_table(tmp_path):
    bad = planted("bad", wrong, intermediates=intermediates)
    net = nn.Sequential(nn.ReLU(), nn.Tanh())
    report = polyexport.export(net, {"input": torch.randn(4, 3)}, [bad], tmp_path / "out", bench=False)
    outcome = report["bad"]
    assert outcome.state == "mismatch"
    assert outcome.reason.endswith("; the first layer beyond the tolerance is 1 (relative error 2)")
    assert [(layer.name, layer.tensor, bool(layer.reason)) for layer in outcome.layers] == [
        ("0", "one", False),
        ("1", "two", True),
        ("output output_0", "output_0", True),
    ]
    assert Report.load(report.folder)["bad"].layers == outcome.layers
    page = (report.folder / "report.html").read_text()
    assert "Layer by layer" in page
    assert "first beyond tolerance" in page
    assert not list((report.folder / "source").glob("explain-*"))
