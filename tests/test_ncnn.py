"""ncnn: every model of the zoo, what it has no layer for, the names and axes of its text file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
from isolated import in_toolchain, many
from polyexport.errors import NothingToDo
from polyexport.formats import ncnn
from polyexport.onnx_graph.floats import in_floats
from polyexport.spec import ExportSpec, TensorSpec

FORMATS = ("ncnn", "ncnn-fp16")


@pytest.mark.slow
def test_every_model_agrees_at_three_batch_sizes(exported) -> None:
    roots = [str(exported(model).folder) for model in (*zoo.GROUND, *zoo.FURTHER)]
    made = many("ncnn", "convert", FORMATS, roots)
    assert {(root, name): said for root in roots for name, said in made[root].items() if said != "made"} == {}
    judged = many("ncnn", "verify", FORMATS, roots)
    cells = {(Path(root).name, name): parity for root in roots for name, parity in judged[root].items()}
    assert {cell: said for cell, said in cells.items() if not isinstance(said, dict) or not said["passed"]} == {}
    assert all(sorted({sizes["batch"] for sizes in said["batches"]}) == [1, 3, zoo.BATCH] for said in cells.values())


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("graphs")
    found: dict[str, str] = json.loads(in_toolchain("ncnn", "scripts/ncnn_graphs.py", str(folder)))
    return found


AGREES = {
    "positions": "agrees, reads ids: float32, mask: float32",
    "ids": "agrees, reads ids: int32",
    "extremes": "agrees, reads x: float32",
    "reductions": "agrees, reads x: float32",
    "picks": "agrees, reads x: float32",
    "chosen": "agrees, reads x: float32, mask: float32",
    "unread": "agrees, reads x: float32",
    "lacking": "RuntimeError: ncnn has no layer for Hardmax",
}


@pytest.mark.parametrize("name", AGREES)
def test_a_graph_answers_as_in_onnx_runtime_or_names_the_layer_that_ncnn_lacks(
    graphs: dict[str, str], name: str
) -> None:
    assert graphs[name] == AGREES[name]


_REDUCED = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGICAL = ("And", "Not", "Or", "Xor")
_PICKED = ("ArgMax", "ArgMin", "Gather", "GatherElements", "GatherND")
IN_FLOATS = {"Softplus", "Where", *_COMPARED, *_LOGICAL, *_PICKED, *map("Reduce{}".format, _REDUCED)}


def cases() -> dict[str, Any]:
    """ONNX's own cases of these operators, those with types and forms that PyTorch exports."""
    from onnx.backend.test.case.node import collect_testcases

    found = {}
    for case in collect_testcases(None):
        (node, *others), given = case.model.graph.node, case.data_sets[0][0] if case.data_sets else []
        if not others and node.op_type in IN_FLOATS and "expanded" not in case.name:
            usual = all(array.dtype.kind in "fib" and array.size for array in map(np.asarray, given))
            version = case.model.opset_import[0]
            version.version = 17 if node.op_type in _LOGICAL else version.version  # the same since opset 7
            if usual and case.data_sets and version.version > 12:
                found[case.name] = case
    return found


def structural(op: str) -> int:
    """How many of a node's first inputs are data; what comes behind is constant in what PyTorch exports."""
    return 1 if op.startswith(("Gather", "Reduce")) else 3


def test_graphs_in_floats_compute_what_onnx_says() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; `pip install onnx`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install onnxruntime`")
    tried = set()
    for name, case in cases().items():
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        graph, (given, expected) = model.graph, case.data_sets[0]
        count = structural(graph.node[0].op_type)
        data = dict(zip([value.name for value in graph.input], given, strict=True))
        kept = [value.name for value in graph.input][:count]
        constants = [onnx.numpy_helper.from_array(array, key) for key, array in data.items() if key not in kept]
        graph.initializer.extend(constants)
        inputs = [value for value in graph.input if value.name in kept]
        del graph.input[:]
        graph.input.extend(inputs)
        written = in_floats(model)
        assert {value.type.tensor_type.elem_type for value in (*written.graph.input, *written.graph.output)} == {1}
        feed = {value.name: data[value.name].astype(np.float32) for value in written.graph.input}
        answers = onnxruntime.InferenceSession(written.SerializeToString()).run(None, feed)
        for answer, right in zip(answers, expected, strict=True):
            assert answer.shape == right.shape, name
            np.testing.assert_allclose(answer, right.astype(np.float32), rtol=1e-4, atol=1e-4, err_msg=name)
        tried.add(graph.node[0].op_type)
    assert tried == IN_FLOATS


PARAM = """7767517
3 4
Input in0 0 1 in0
Split s 1 2 in0 1 2
BinaryOp add 2 1 1 2 out0 0=0
"""


def test_inputs_and_outputs_have_forwards_names_and_inputs_no_batch_axis() -> None:
    text = ncnn.rename(ncnn.lifted(PARAM, ["in0"]), {"in0": "image", "out0": "sum"})
    assert text.splitlines() == [
        "7767517",
        "4 5",
        "Input in0 0 1 image",
        "ExpandDims polyexport_row_0 1 1 image polyexport_row_0 -23303=1,0",
        "Split s 1 2 polyexport_row_0 1 2",
        "BinaryOp add 2 1 1 2 sum 0=0",
    ]


def test_names_that_ncnn_cannot_tell_from_its_own_are_replaced() -> None:
    tensors = tuple(TensorSpec(name, "float32", (1, 2)) for name in ("image", "two words", "3"))
    assert ncnn._ports(ExportSpec(tensors, tensors)) == (
        {"image": "image", "two words": "in1", "3": "in2"},
        {"image": "image", "two words": "out1", "3": "out2"},
    )


@pytest.mark.parametrize(("axis", "found"), [("0", []), ("233", ["in0"])])
def test_pnnxs_own_program_tells_whether_an_input_has_its_batch_axis(axis: str, found: list[str]) -> None:
    program = f'ex.input("in0", ncnn.Mat(in0.numpy(), batch_index={axis}).clone())'
    assert ncnn.unsqueezed(program, [(1, 3)]) == found
    assert ncnn.unsqueezed(program, [(1,)]) == []


def test_another_axis_than_the_batchs_is_named() -> None:
    program = 'ex.input("in0", ncnn.Mat(in0.numpy(), batch_index=1).clone())'
    with pytest.raises(RuntimeError, match=r"pnnx takes axis 1 of an input of the shape \(1, 3\) for the batch"):
        ncnn.unsqueezed(program, [(1, 3)])


@pytest.mark.parametrize(("rows", "why"), [(1, ""), (4, "the batch is fixed at 4; make only the first axes dynamic")])
def test_a_fixed_batch_is_refused_with_what_to_do(rows: int, why: str) -> None:
    tensor = TensorSpec("x", "float32", (rows, 3))
    said = ncnn.fixed_batch(ExportSpec((tensor,), (tensor,)))
    assert said.endswith(why)
    assert bool(said) == bool(why)


def test_a_dynamic_batch_that_became_static_is_no_reason(tmp_path: Path) -> None:
    """Static shapes are tried where dynamic ones failed; then the reason is that failure alone."""
    tensor = TensorSpec("x", "float32", ("batch", 3))
    spec = ExportSpec((tensor,), (tensor,), {"batch": 4})
    convert = ncnn.FORMATS[0].routes[0].convert
    with pytest.raises(NothingToDo):
        convert(tmp_path / "model.onnx", tmp_path / "model.param", spec.static())
    with pytest.raises(RuntimeError, match="the batch is fixed at 4"):
        convert(tmp_path / "model.onnx", tmp_path / "model.param", replace(spec.static(), sizes={}))
