"""Raw bytes are cast where they enter a graph, for runtimes in which no other layer takes them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from polyexport.onnx_graph.uint8_inputs import cast_early

PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def graph(*nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A graph from `pixels` to `y`, in which `one` is 1 and `sizes` a slice's bounds."""
    ends = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", 4, 4, 3])]
    out = [helper.make_tensor_value_info("y", kind, None)]
    weights = {"one": np.array(1, np.uint8), "start": np.array([1]), "end": np.array([3]), "scale": np.float32(255)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "g", ends, out, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": PIXELS})[0]


node = helper.make_node
MOVED = node("Transpose", ["pixels"], ["moved"], perm=[0, 3, 1, 2])
CROPPED = node("Slice", ["moved", "start", "end"], ["cropped"])
CAST = node("Cast", ["cropped"], ["float"], to=TensorProto.FLOAT)
SCALED = node("Div", ["float", "scale"], ["y"])


def test_layers_that_move_bytes_move_floats():
    model = graph(MOVED, CROPPED, CAST, SCALED)
    before = run(model)
    assert cast_early(model)
    assert [each.op_type for each in model.graph.node] == ["Cast", "Transpose", "Slice", "Cast", "Div"]
    assert np.array_equal(run(model), before)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    assert {each.name for each in inferred if each.type.tensor_type.elem_type == TensorProto.UINT8} == set()


@pytest.mark.parametrize(
    "model",
    [
        graph(node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT), SCALED),
        graph(MOVED, node("Add", ["moved", "one"], ["y"]), kind=TensorProto.UINT8),
        graph(node("Transpose", ["pixels"], ["y"]), kind=TensorProto.UINT8),
    ],
    ids=["cast at once", "computed with as bytes", "an output"],
)
def test_other_graphs_are_left_alone(model: onnx.ModelProto):
    before = model.SerializeToString()
    assert not cast_early(model)
    assert model.SerializeToString() == before
