"""Recurrent layers of an ONNX graph, step by step, against ONNX Runtime's own."""

import numpy as np
import onnx
import onnxruntime
import pytest

from polyexport.onnx_graph.unrolled import STEPS, unrolled

CELLS = {"LSTM": ("y, h, c", "first, first"), "GRU": ("y, h", "first")}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
LIKE_PYTORCH = {"LSTM": "", "GRU": "linear_before_reset = 1, "}


def layer(kind: str, direction: str = "forward", *, steps: object = 5, more: str = "", b: str = "b", lengths: str = ""):
    """A model of one layer of three inputs and four units, whose first weight is computed from two halves."""
    count, (outputs, states) = DIRECTIONS[direction], CELLS[kind]
    settings = f'{more or LIKE_PYTORCH[kind]} hidden_size = 4, direction = "{direction}"'
    shapes = {"y": f"{steps}, {count}, n, 4", "h": f"{count}, n, 4", "c": f"{count}, n, 4"}
    typed = ", ".join(f"float[{shapes[name]}] {name}" for name in outputs.split(", "))
    text = f"""
    <ir_version: 10, opset_import: ["": 20]>
    graph (float[{steps}, n, 3] x, float[{count}, n, 4] first, int32[n] counts) => ({typed})
    {{
        w = Concat<axis = 1>(upper, lower)
        {outputs} = {kind}<{settings}>(x, w, r, {b}, {lengths}, {states})
    }}
    """
    model, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    gates = 4 * {"LSTM": 4, "GRU": 3}[kind]
    shapes = {"upper": (count, 4, 3), "lower": (count, gates - 4, 3), "r": (count, gates, 4), "b": (count, 2 * gates)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def answers(model: onnx.ModelProto, steps: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    given = {"x": random.normal(size=(steps, 2, 3)), "first": random.normal(size=(count, 2, 4))}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(
        None, {name: array.astype(np.float32) for name, array in given.items()} | {"counts": [steps] * 2}
    )


@pytest.mark.parametrize("b", ["b", ""])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_each_step_is_as_in_the_layer(kind, direction, b):
    expected = answers(layer(kind, direction, b=b), 5, DIRECTIONS[direction])
    model = unrolled(layer(kind, direction, b=b))
    assert kind not in {node.op_type for node in model.graph.node}
    for found, array in zip(answers(model, 5, DIRECTIONS[direction]), expected, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        layer("LSTM", steps=STEPS + 1),
        layer("LSTM", steps="time"),
        layer("LSTM", lengths="counts"),
        layer("LSTM", more="clip = 1.0,"),
        layer("LSTM", more="input_forget = 1,"),
        layer("GRU", more="linear_before_reset = 0,"),
        layer("GRU", b="drawn"),
    ],
)
def test_a_layer_that_is_not_written_step_by_step(model):
    assert unrolled(model) is None
