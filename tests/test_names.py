"""Inputs and outputs are called what the user calls them, whatever the code and the graphs between are made of."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from every_format import Everything
from polyexport.capture.flatten import flat
from polyexport.formats.onnx import convert_program, convert_trace, load
from polyexport.onnx_graph.names import rename_inputs_outputs
from polyexport.spec import ExportSpec, TensorSpec

OPERATORS = ("embedding", "linear", "softmax", "relu", "linear_1", "add", "mean", "val_0", "polyexport_input_0000")


class Named(torch.nn.Module):
    """Adds its inputs up, and gives its outputs the names that it was made with."""

    def __init__(self, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.linear, self.outputs = torch.nn.Linear(3, 4), outputs

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        made = [self.linear(sum(tensors.values()).clamp(max=float("inf")))]
        made += [made[-1].relu(), made[-1].softmax(-1), made[-1].mean(1)]
        return dict(zip(self.outputs, made + [made[0] + index for index in range(len(self.outputs))], strict=False))


def wrapped(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> tuple[torch.nn.Module, ExportSpec]:
    module = flat(Named(outputs), (), {name: torch.rand(2, 3) for name in inputs})
    answers = module(*module.example)
    tensors = zip(module.output_names, answers, strict=True)
    return module, ExportSpec(
        tuple(TensorSpec(name, "float32", ("batch", 3)) for name in module.input_names),
        tuple(TensorSpec(name, "float32", ("batch", *tensor.shape[1:])) for name, tensor in tensors),
        {"batch": 2},
    )


def to_program(module: torch.nn.Module) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in module.example)
    return torch.export.export(module, module.example, dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize(
    "names",
    [
        ("torch", "device", "inf", "nan", "pytree", "fx_pytree"),
        ("class", "lambda", "True", "None", "_", "int"),
        ("größe", "日本", "x", "X", "x_1", "1x", "a.b", "a/b", "a b"),
        ("add", "linear", "p_inner_linear_weight"),
    ],
)
def test_an_input_may_have_any_name(names: tuple[str, ...]) -> None:
    module, spec = wrapped(names, ("y", "z"))
    assert len(set(spec.input_names)) == len(names)
    inputs = [torch.rand(5, 3) for _ in names]
    expected = module(*inputs)
    traced, programmed = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.trace(module, module.example, check_trace=False), traced)
    torch.export.save(to_program(module), programmed)
    traced.seek(0)
    programmed.seek(0)
    for loaded in (torch.jit.load(traced), torch.export.load(programmed).module()):
        assert all(map(torch.equal, loaded(*inputs), expected))


@pytest.mark.parametrize("route", ["dynamo", "torchscript"])
def test_an_output_may_be_called_as_an_operator_is(route: str, tmp_path: Path) -> None:
    module, spec = wrapped(("ids", "linear_2"), OPERATORS)
    if route == "dynamo":
        torch.export.save(to_program(module), tmp_path / "m.pt2")
        convert_program(tmp_path / "m.pt2", tmp_path / "m.onnx", spec)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("polyexport.capture.snapshot.load", lambda source, outputs: module)
            patch.setattr("polyexport.capture.calls.example_inputs", lambda source, spec: module.example)
            convert_trace(tmp_path, tmp_path / "m.onnx", spec)
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    inputs = {name: np.random.default_rng(0).random((5, 3), np.float32) for name in spec.input_names}
    answer = load(tmp_path / "m.onnx", spec, threads=1)(inputs)
    expected = module(*map(torch.from_numpy, inputs.values()))
    assert tuple(answer) == OPERATORS
    for found, right in zip(answer.values(), expected, strict=True):
        np.testing.assert_allclose(found, right.detach().numpy(), atol=1e-5)


def test_every_format_keeps_a_name_that_an_operator_has_and_takes_no_detour_for_it(everything: Everything) -> None:
    outcomes = everything.report.outcomes
    names = {tuple(tensor.name for tensor in (*each.inputs, *each.outputs)) for each in outcomes}
    assert names == {("relu", "linear")}
    whole = {each.format: (each.state, each.reason) for each in outcomes if each.precision == "float32"}
    assert whole == dict.fromkeys(whole, ("verified", "")), "lower precisions have reasons of their own"
    routes = [note.text for note in everything.report.notes if note.kind == "route"]
    assert [text for text in routes if text.split(":")[0] in whole] == []


def test_no_artifact_is_an_executable_file(everything: Everything) -> None:
    folders = [everything.report.folder / each.format for each in everything.report.outcomes if each.artifact]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert [file for file in files if file.stat().st_mode & 0o111] == []


def test_a_value_with_several_names_gets_them_all_and_a_branch_sees_the_new_ones() -> None:
    """An input passed through, a weight, one value twice, and a value that a subgraph reads under the name taken."""

    def port(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])

    branch = helper.make_graph([helper.make_node("Neg", ["linear"], ["b"])], "branch", [], [port("b")])
    nodes = [
        helper.make_node("Relu", ["i"], ["linear"]),
        helper.make_node("If", ["c"], ["chosen"], then_branch=branch, else_branch=branch),
    ]
    weights = [
        helper.make_tensor("c", TensorProto.BOOL, [], [True]),
        helper.make_tensor("w", TensorProto.FLOAT, [2], [5.0, 6.0]),
    ]
    outputs = [port(name) for name in ("i", "w", "chosen", "chosen", "i")]
    graph = helper.make_graph(nodes, "g", [port("i")], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    wanted = ("same", "linear", "c", "b", "i")
    rename_inputs_outputs(model, {"i": "w"}, wanted)
    onnx.checker.check_model(model, full_check=True)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([-1.0, 2.0], np.float32)
    answer = dict(zip(wanted, session.run(list(wanted), {"w": x}), strict=True))
    right = {"same": x, "linear": [5, 6], "c": [0, -2], "b": [0, -2], "i": x}
    assert {name: found.tolist() for name, found in answer.items()} == {
        n: list(map(float, r)) for n, r in right.items()
    }
