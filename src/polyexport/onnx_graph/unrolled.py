"""Writes each step of a recurrent layer as operators, for quantizers that know products and no loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.onnx_graph.constants import Constants
from polyexport.onnx_graph.decompose import decomposed
from polyexport.onnx_graph.static_shapes import set_values

if TYPE_CHECKING:
    import onnx

STEPS = 32
"""Longest sequence that is unrolled: each step has a copy of the weights that read the state."""

_CELLS = (
    "LSTMStep (given, hidden, cell, w, b) => (new_hidden, new_cell) { "
    "own = Gemm<transB = 1>(hidden, w, b) gates = Add(given, own) "
    "sum_i, sum_o, sum_f, sum_c = Split<axis = 1, num_outputs = 4>(gates) "
    "i = Sigmoid(sum_i) o = Sigmoid(sum_o) f = Sigmoid(sum_f) c = Tanh(sum_c) "
    "kept = Mul(f, cell) added = Mul(i, c) new_cell = Add(kept, added) "
    "size = Tanh(new_cell) new_hidden = Mul(o, size) }",
    "GRUStep (given, hidden, w, b) => (new_hidden) { own = Gemm<transB = 1>(hidden, w, b) "
    "given_z, given_r, given_h = Split<axis = 1, num_outputs = 3>(given) "
    "own_z, own_r, own_h = Split<axis = 1, num_outputs = 3>(own) "
    "sum_z = Add(given_z, own_z) z = Sigmoid(sum_z) sum_r = Add(given_r, own_r) r = Sigmoid(sum_r) "
    "part = Mul(r, own_h) sum_h = Add(given_h, part) h = Tanh(sum_h) "
    "change = Sub(hidden, h) kept = Mul(z, change) new_hidden = Add(h, kept) }",
)
"""One step, as a function in ONNX's text form: of the input's share of the gates, the states, a weight and a bias."""

_STATES = {"LSTM": 2, "GRU": 1}
_RECURRENT = (*_STATES, "RNN")
_SETTINGS = {"input_forget": 0, "layout": 0, "linear_before_reset": 1}
"""What attributes have to be, besides the size and the direction: as PyTorch's layers compute."""

_DIRECTIONS = {b"forward": (1,), b"reverse": (-1,), b"bidirectional": (1, -1)}


def unrolled(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model, which is changed, with operators in place of each LSTM and GRU.

    They have to be as PyTorch's exporters write them, from opset 18 on, over a known number of steps up to `STEPS`.

    Returns:
        None if it has no recurrent layers, or one that is not like that.
    """
    from onnx import shape_inference

    graph = model.graph
    if not any(node.op_type in _RECURRENT for node in graph.node):
        return None
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {each.name: each.type.tensor_type.shape.dim for each in (*inferred.input, *inferred.value_info)}
    constants = Constants(model)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in _RECURRENT:
            nodes.append(node)
            continue
        shape = shapes.get(node.input[0])
        steps = shape[0].dim_value if shape else 0
        weights = [constants.find(name) for name in node.input[1:4] if name]
        if not 0 < steps <= STEPS or not _is_plain(node) or any(each is None for each in weights):
            return None
        nodes += _steps(graph, node, steps, *weights)
    set_values(graph.node, nodes)
    return decomposed(model, _CELLS)


def _is_plain(node: onnx.NodeProto) -> bool:
    """Whether it is a layer as in PyTorch, with initial states, and without lengths of sequences."""
    lengths, *states = node.input[4:] or [""]
    settings = {"linear_before_reset": 0} if node.op_type == "GRU" else {}
    settings |= {each.name: each.i for each in node.attribute if each.name not in ("hidden_size", "direction")}
    return (
        not lengths
        and len(states) == _STATES.get(node.op_type)
        and all(states)
        and all(_SETTINGS.get(name) == value for name, value in settings.items())
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes nodes, and constants into a graph, with names that begin with `prefix`."""

    graph: onnx.GraphProto
    prefix: str
    nodes: list[onnx.NodeProto]

    def constant(self, value: np.ndarray | list[int] | int) -> str:
        """A constant's name."""
        from onnx import numpy_helper

        name = f"{self.prefix}_constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def call(self, kind: str, *inputs: str, count: int = 1, **attributes: Any) -> list[str]:
        """The names of an operator's outputs."""
        from onnx import helper

        names = [f"{self.prefix}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names


def _steps(
    graph: onnx.GraphProto, node: onnx.NodeProto, count: int, w: Any, r: Any, b: Any = None
) -> list[onnx.NodeProto]:
    """The nodes of a layer over `count` steps, with its weights for the input and the states, and its biases."""
    from onnx import helper

    writer = _Writer(graph, next(filter(None, node.output)), [])
    size = r.shape[1]
    b = np.zeros((len(r), 2 * size), r.dtype) if b is None else b
    direction = next((each.s for each in node.attribute if each.name == "direction"), b"forward")
    made = []
    for index, way in enumerate(_DIRECTIONS[direction]):
        product = writer.call("MatMul", node.input[0], writer.constant(w[index].T))
        given = writer.call("Add", *product, writer.constant(b[index, :size]))
        own = writer.constant(r[index]), writer.constant(b[index, size:])
        states = [name for first in node.input[5:] for name in writer.call("Gather", first, writer.constant(index))]
        outputs = []
        for step in range(count)[::way]:
            row = writer.call("Gather", *given, writer.constant(step))
            states = writer.call(f"{node.op_type}Step", *row, *states, *own, count=len(states))
            outputs += writer.call("Unsqueeze", states[0], writer.constant([0, 1]))
        last = [name for state in states for name in writer.call("Unsqueeze", state, writer.constant([0]))]
        made.append([*writer.call("Concat", *outputs[::way], axis=0), *last])
    for of_directions, output, axis in zip(zip(*made, strict=True), node.output, (1, 0, 0), strict=False):
        if output:
            writer.nodes.append(helper.make_node("Concat", of_directions, [output], axis=axis))
    return writer.nodes
