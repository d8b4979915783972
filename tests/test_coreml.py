"""Core ML: every model of the zoo, and packages that are wrong."""

from __future__ import annotations

import json
import operator
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import polyexport
from polyexport import FORMATS
from polyexport.coreml import evaluate
from polyexport.coreml.evaluate import evaluator
from polyexport.coreml.program import Name, Operation, Program, read
from polyexport.errors import CannotRun
from polyexport.formats import coreml, coreml_quantized
from polyexport.measure.drafts import distance
from polyexport.measure.parity import Parity, compare
from polyexport.measure.tolerance import Tolerance
from polyexport.report.folders import DESCRIPTION
from polyexport.spec import ExportSpec, TensorSpec, calibration, write_arrays

pytest.importorskip("coremltools", reason="coremltools is not installed; `pip install coremltools`")


class Agent(nn.Module):
    """Words of MIL's on either side, a name that it cannot write, and one that it can."""

    def forward(self, state: torch.Tensor, größe: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"any": (state > 0).any(1), "bool": state * größe, "action": state.argmax(1)}


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """An export in half precision, and its inputs."""
    torch.manual_seed(0)  # no two states so near that half precision takes them for the same
    inputs = {"state": torch.randn(3, 4), "größe": torch.rand(3, 1)}
    folder = tmp_path_factory.mktemp("agent") / "export"
    return polyexport.export(Agent(), inputs, ["coreml-fp16"], folder, bench=False), inputs


def test_half_precision_is_judged_by_its_own_limits(agent):
    (outcome,) = agent[0].outcomes
    assert (outcome.parity.passed, outcome.precision) == (True, "float16")
    assert outcome.parity.max_abs_error > 1e-5  # it did round


def test_names_that_differ_in_letters_that_core_ml_lacks_stay_apart():
    inputs = tuple(TensorSpec(name, "float32", (2,)) for name in ("größe", "grüße", "gr__e", "x"))
    spec = coreml.as_core_ml(ExportSpec(inputs, (inputs[1], TensorSpec("gröüe", "float32", (2,)))))
    assert spec.input_names == ("gr__e", "gr__e_", "gr__e__", "x")
    assert spec.output_names == ("gr__e_", "gr__e___")


def test_names_that_core_ml_cannot_have_are_a_one_line_note(agent):
    report, inputs = agent
    (outcome,) = report.outcomes
    assert outcome.state == "degraded"
    assert outcome.reason == (
        "names that Core ML does not allow: state is state_workaround, größe is gr__e, any is any_workaround, "
        "bool is bool_workaround"
    )
    assert [tensor.name for tensor in outcome.inputs] == ["state_workaround", "gr__e"]
    assert [tensor.dtype for tensor in outcome.outputs] == ["float32", "float32", "int32"], "a bool is float32"
    assert [tensor.name for tensor in report.model.inputs] == ["state", "größe"]
    answer = polyexport.load(report.folder / "coreml-fp16")({name: each.numpy() for name, each in inputs.items()})
    assert answer["bool"] == pytest.approx((inputs["state"] * inputs["größe"]).numpy(), rel=1e-2)


class Ragged(nn.Module):
    """Sizes and divisors that are in the data, a scalar, an input passed through, and one tensor under two names."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        inside = torch.arange(lengths.max()) < lengths.unsqueeze(1)
        sums = x.cumsum(1) * scale
        return {"inside": inside.sum(1), "share": 100 // lengths, "lengths": lengths, "sums": sums, "again": sums}


def test_a_module_that_reads_its_data_is_traced_with_the_validation_batch(tmp_path):
    inputs = (torch.randn(3, 4), torch.tensor([2, 4, 1]), torch.tensor(0.5))
    report = polyexport.export(Ragged(), inputs, ["coreml"], tmp_path / "out", bench=False)
    assert (report["coreml"].state, report["coreml"].reason) == ("verified", "")
    assert report["coreml"].shown_state == "verified off-device"
    about = json.loads((report.folder / "coreml" / DESCRIPTION).read_text())
    assert about["verified_by"] == ["MIL program evaluated off-device"]


def test_an_example_is_the_validation_batch_with_two_rows_at_least(tmp_path):
    write_arrays(tmp_path / "batch.npz", {"x": np.array([[3, 4]])})
    tensor = TensorSpec("x", "int64", ("batch", 2))
    spec = ExportSpec((tensor,), (), {"batch": 1}, calibration=(tmp_path / "batch.npz",))
    found = coreml._example(spec)["x"]
    assert (found.tolist(), found.dtype) == ([[3, 4], [3, 4]], np.int32)


# --- wrong packages ---------------------------------------------------------------------------------------------------


class Difference(nn.Module):
    """Two inputs that may be taken for each other, and layers that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(6, 16)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(left).relu()) - self.three(right)


ROWS = TensorSpec("left", "float32", ("batch", 6))
SPEC = ExportSpec(
    inputs=(ROWS, TensorSpec("right", "float32", ("batch", 6))),
    outputs=(TensorSpec("difference", "float32", ("batch", 16)),),
    sizes={"batch": 4},
    metadata={"checkpoint_sha256": "abc"},
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A package, inputs for it, and what PyTorch answers."""
    torch.manual_seed(0)
    folder, module = tmp_path_factory.mktemp("difference"), Difference().eval()
    inputs = (torch.randn(4, 6), torch.randn(4, 6))
    with torch.no_grad():
        expected = module(*inputs)
        torch.jit.trace(module, inputs).save(str(folder / "m.torchscript"))
    coreml.convert_trace(folder / "m.torchscript", folder / "m.mlpackage", SPEC, precision="float32")
    arrays = {"left": inputs[0].numpy(), "right": inputs[1].numpy()}
    return folder / "m.mlpackage", arrays, {"difference": expected.numpy()}, module


@pytest.fixture
def package(saved, tmp_path):
    """A copy of the package, to be changed."""
    return Path(shutil.copytree(saved[0], tmp_path / "m.mlpackage"))


def passes(package, saved):
    _, inputs, expected, _ = saved
    runner = coreml.package(evaluator(package), SPEC)
    return compare(runner(inputs), expected, Tolerance.for_precision("float32")).passed


def changed(package, change):
    """Rewrite the program in a package."""
    from coremltools.proto import Model_pb2

    (path,) = package.rglob("*.mlmodel")
    model = Model_pb2.Model()
    model.ParseFromString(path.read_bytes())
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    change(block, model)
    path.write_bytes(model.SerializeToString())


def find(block, kind, index=0):
    return [operation for operation in block.operations if operation.type == kind][index]


def test_the_package_as_written_passes(package, saved):
    assert passes(package, saved)


def test_one_changed_weight_fails(package, saved):
    (path,) = package.rglob("weight.bin")
    content, weight = bytearray(path.read_bytes()), saved[3].two.weight.detach().numpy()
    place = content.index(weight.tobytes()) + weight[3, 5].nbytes * (3 * 16 + 5)
    content[place : place + 4] = np.float32(weight[3, 5] + 0.5).tobytes()
    path.write_bytes(content)
    assert not passes(package, saved)


def test_two_swapped_inputs_fail(package, saved):
    def swap(block, model):
        names = {"left": "right", "right": "left"}
        for operation in block.operations:
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        binding.name = names.get(binding.name, binding.name)

    changed(package, swap)
    assert not passes(package, saved)


def test_a_dropped_layer_fails(package, saved):
    def drop(block, model):
        dropped = find(block, "relu")
        before, after = dropped.inputs["x"].arguments[0].name, dropped.outputs[0].name
        block.operations.remove(dropped)
        for operation in block.operations:
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name" and binding.name == after:
                        binding.name = before

    changed(package, drop)
    assert not passes(package, saved)


def test_an_op_that_the_evaluator_lacks_is_named(package):
    def rename(block, model):
        find(block, "relu").type = "frobnicate"

    changed(package, rename)
    with pytest.raises(CannotRun, match="does not support frobnicate"):
        coreml.package(evaluator(package), SPEC)


def test_a_value_of_another_shape_than_declared_is_an_error(package, saved):
    def shrink(block, model):
        find(block, "relu").outputs[0].type.tensorType.dimensions[1].constant.size = 15

    changed(package, shrink)
    with pytest.raises(ValueError, match=r"relu returns .* declared"):
        passes(package, saved)


def test_a_batch_beyond_the_declared_bounds_is_an_error(saved):
    runner = coreml.package(evaluator(saved[0]), SPEC)
    many = {name: np.zeros((5000, 6), np.float32) for name in ("left", "right")}
    with pytest.raises(ValueError, match="the package takes"):
        runner(many)


# --- the border -------------------------------------------------------------------------------------------------------


def test_names_types_and_metadata_are_in_the_package(saved):
    from coremltools.models import MLModel

    model = MLModel(str(saved[0]), skip_model_load=True)
    description = model.get_spec().description
    assert [feature.name for feature in description.input] == ["left", "right"]
    assert [feature.name for feature in description.output] == ["difference"]
    assert model.user_defined_metadata["checkpoint_sha256"] == "abc"


@pytest.mark.parametrize(("dtype", "there"), [("int64", "int32"), ("bool", "int32"), ("float32", "float32")])
def test_types_that_core_ml_lacks_are_int32_at_inputs_and_outputs(dtype, there):
    spec = ExportSpec((TensorSpec("x", dtype, ("batch", 2)),), ())
    assert coreml.as_core_ml(spec).inputs == (TensorSpec("x", there, ("batch", 2)),)


# --- lower precisions -------------------------------------------------------------------------------------------------

COMPRESS = {
    "coreml-w8": coreml_quantized.quantize_weights,
    "coreml-w4": coreml_quantized.palettize_weights,
    "coreml-int8": coreml_quantized.quantize,
}


@dataclass(frozen=True)
class Compressed:
    """A small network as packages of every precision, by format, and what PyTorch answers to five rows."""

    packages: dict[str, Path]
    spec: ExportSpec
    inputs: dict[str, np.ndarray]
    expected: np.ndarray

    def judged(self, name: str) -> Parity:
        run = coreml_quantized.load_compressed(self.packages[name], self.spec, threads=1)
        return compare(run(self.inputs), {"y": self.expected}, FORMATS[name].limits)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Compressed:
    torch.manual_seed(0)
    folder, images = tmp_path_factory.mktemp("compressed"), torch.randn(5, 3, 12, 12)
    layers = (nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20))
    module = nn.Sequential(*layers).eval()
    write_arrays(folder / "one.npz", {"x": images[:2].numpy()})
    write_arrays(folder / "other.npz", {"x": images[2:].numpy()})
    spec = ExportSpec(
        (TensorSpec("x", "float32", ("batch", 3, 12, 12)),),
        (TensorSpec("y", "float32", ("batch", 20)),),
        {"batch": 2},
        calibration=(folder / "one.npz", folder / "other.npz"),
    )
    torch.jit.trace(module, images[:2]).save(folder / "m.pt")
    packages = {name: folder / f"{name}.mlpackage" for name in ("coreml-fp16", *COMPRESS)}
    coreml.convert_trace(folder / "m.pt", packages["coreml-fp16"], spec, precision="float16")
    for name, compress in COMPRESS.items():
        compress(packages["coreml-fp16"], packages[name], spec)
    with torch.no_grad():
        return Compressed(packages, spec, {"x": images.numpy()}, module(images).numpy())


@pytest.mark.parametrize("name", COMPRESS)
def test_a_lower_precision_agrees_at_another_batch_size(compressed, name):
    assert compressed.judged(name).reason == ""
    assert coreml_quantized.load_compressed(compressed.packages[name], compressed.spec, threads=1).shortfall == ""


def shifted(argument: np.ndarray) -> np.ndarray:
    return np.clip(argument.astype(np.int32) + 40, -128, 127).astype(argument.dtype)


def reversed_channels(argument: np.ndarray) -> np.ndarray:
    return argument[::-1].copy()


def an_eighth(argument: np.ndarray) -> np.ndarray:
    return argument / 8


ERRORS = [
    ("coreml-w8", "constexpr_affine_dequantize", "zero_point", shifted),
    ("coreml-w8", "constexpr_affine_dequantize", "quantized_data", reversed_channels),
    ("coreml-w4", "constexpr_lut_to_dense", "lut", reversed_channels),
    ("coreml-w4", "constexpr_lut_to_dense", "indices", reversed_channels),
    ("coreml-int8", "constexpr_affine_dequantize", "quantized_data", reversed_channels),
    ("coreml-int8", "quantize", "zero_point", shifted),
    ("coreml-int8", "quantize", "scale", an_eighth),
]
"""A format, and the argument of an operation of its package that is wrong, and how."""


@pytest.mark.parametrize(("name", "kind", "argument", "wrong"), ERRORS)
def test_a_wrong_number_in_a_compressed_package_is_a_mismatch(compressed, name, kind, argument, wrong, monkeypatch):
    def read_spoiled(package: Path) -> Program:
        found = read(package)
        constants = {
            each.outputs[0].name: each.arguments["val"] for each in found.main.operations if each.kind == "const"
        }

        def spoiled(operation: Operation) -> Operation:
            given = operation.arguments.get(argument)
            value = constants[given.name] if isinstance(given, Name) else given
            if operation.kind != kind or value is None:
                return operation
            return replace(operation, arguments={**operation.arguments, argument: np.asarray(wrong(value))})

        operations = tuple(map(spoiled, found.main.operations))
        assert any(map(operator.is_not, operations, found.main.operations))
        return replace(found, main=replace(found.main, operations=operations))

    monkeypatch.setattr(evaluate, "read", read_spoiled)
    assert not compressed.judged(name).passed


def test_small_weights_are_compressed_where_most_are_small(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(coreml_quantized, "_FEWEST_WEIGHTS", 8000)
    for compress in (coreml_quantized.quantize_weights, coreml_quantized.palettize_weights):
        compress(compressed.packages["coreml-fp16"], tmp_path / "small.mlpackage", compressed.spec)
        loaded = coreml_quantized.load_palettized(tmp_path / "small.mlpackage", compressed.spec, threads=1)
        assert "in float" not in loaded.remark + loaded.shortfall


def test_some_weights_in_8_bits_are_nearer_and_half_stay_in_4(compressed, tmp_path):
    coreml_quantized.palettize_some_weights(
        compressed.packages["coreml-fp16"], tmp_path / "some.mlpackage", compressed.spec
    )
    loaded = coreml_quantized.load_palettized(tmp_path / "some.mlpackage", compressed.spec, threads=1)
    assert re.match(r"\d\d% of its weights in 4 bits, \d+% in 8 bits", loaded.remark)
    assert loaded.shortfall == ""
    whole = coreml_quantized.load_palettized(compressed.packages["coreml-w4"], compressed.spec, threads=1)
    expected = [{"y": compressed.expected}]
    assert distance(expected, [loaded(compressed.inputs)]) < distance(expected, [whole(compressed.inputs)])


def test_a_share_of_the_layers_goes_back_to_float_in_int8(compressed, tmp_path):
    spec = replace(compressed.spec, in_float=0.5)
    coreml_quantized.quantize(compressed.packages["coreml-fp16"], tmp_path / "mended.mlpackage", spec)
    count = {
        name: sum(each.kind == "quantize" for each in read(path).main.operations)
        for name, path in (("whole", compressed.packages["coreml-int8"]), ("mended", tmp_path / "mended.mlpackage"))
    }
    assert 0 < count["mended"] < count["whole"]
    assert "kept in float" in coreml_quantized.load_compressed(tmp_path / "mended.mlpackage", spec, threads=1).remark


def test_ranges_are_those_of_all_batches_and_come_with_their_outputs(compressed):
    found, outputs = coreml_quantized.ranges(compressed.packages["coreml-fp16"], compressed.spec)
    x = compressed.inputs["x"]
    assert found["x"] == {"rmin": float(x.min()), "rmax": float(x.max())}
    own = coreml_quantized.load(compressed.packages["coreml-fp16"], compressed.spec, threads=1)
    expected = map(own, calibration(compressed.spec))
    assert all(np.allclose(y["y"], its["y"], atol=1e-3) for y, its in zip(outputs, expected, strict=True))


class Unranged(nn.Module):
    """A GRU, which is a loop in Core ML, and a sum of which one term has no scale in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.head(self.gru(x)[0])
        return seen + seen.tanh() * 1e-6


def test_what_has_no_range_or_scale_stays_in_float(tmp_path):
    torch.manual_seed(0)
    x, module = torch.randn(4, 5, 4), Unranged().eval()
    write_arrays(tmp_path / "x.npz", {"x": x.numpy()})
    ports = ((TensorSpec("x", "float32", ("batch", 5, 4)),), (TensorSpec("y", "float32", ("batch", 5, 32)),))
    spec = ExportSpec(*ports, {"batch": 4}, calibration=(tmp_path / "x.npz",))
    torch.jit.trace(module, x).save(tmp_path / "m.pt")
    coreml.convert_trace(tmp_path / "m.pt", tmp_path / "half.mlpackage", spec, precision="float16")
    coreml_quantized.quantize(tmp_path / "half.mlpackage", tmp_path / "int8.mlpackage", spec)
    kinds = [each.kind for each in read(tmp_path / "int8.mlpackage").main.operations]
    assert "quantize" in kinds
    run = coreml_quantized.load_compressed(tmp_path / "int8.mlpackage", spec, threads=1)
    with torch.no_grad():
        assert compare(run({"x": x.numpy()}), {"y": module(x).numpy()}, FORMATS["coreml-int8"].limits).passed


def test_weights_left_in_float_are_reported(compressed, tmp_path):
    opened = coreml_quantized.load_compressed(compressed.packages["coreml-fp16"], compressed.spec, threads=1)
    assert opened.shortfall.startswith("100% of its weights in float, which have fewer than 512 numbers")
    assert "coreml-fp16" in opened.shortfall


def test_a_palette_is_as_near_as_sixteen_numbers_can_be():
    weights = np.repeat(np.arange(16.0), 40).astype(np.float32).reshape(32, 20)
    table, indices = coreml_quantized.palette(weights)
    assert np.array_equal(table[indices], weights)
    spread = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    table, indices = coreml_quantized.palette(spread)
    assert indices.max() == 15
    distances = np.abs(spread[..., None] - table)
    assert np.array_equal(distances.argmin(-1), indices)
    assert np.square(table[indices] - spread).mean() < 0.011  # the best sixteen numbers for a Gaussian leave 0.0095
