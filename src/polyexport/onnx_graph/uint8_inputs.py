"""uint8 inputs, cast to float32 where they enter the graph, for runtimes that have no layer for uint8.

A graph that begins with raw images transposes or crops them before it casts them to float: layers that only move
values, which give the same in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_MOVING = frozenset(
    (
        *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "SpaceToDepth", "Split"),
        *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
    )
)
"""Operators that move values of their first input, without arithmetic; further inputs are indices and sizes."""
_MEASURING = frozenset(["Cast", "Shape", "Size"])
"""Operators whose result does not depend on whether a value is uint8 or the same number in float32."""


def cast_early(model: onnx.ModelProto) -> bool:
    """Cast each uint8 input to float32 in front of the layers that move its values.

    An input is left alone if its values are cast at once, or reach a layer that computes with them as uint8.

    Returns:
        Whether the graph was changed.
    """
    import onnx

    graph, uint8 = model.graph, onnx.TensorProto.UINT8
    inputs = [each.name for each in graph.input if each.type.tensor_type.elem_type == uint8]
    changed = False
    for name in inputs:
        moved = _moved(graph, name)
        if not moved:
            continue
        early = f"polyexport_float_{name}"
        for node in graph.node:
            for index, given in enumerate(node.input):
                if given == name:
                    node.input[index] = early
        graph.node.insert(0, onnx.helper.make_node("Cast", [name], [early], to=onnx.TensorProto.FLOAT))
        kept = [value for value in graph.value_info if value.name not in moved]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        changed = True
    return changed


def _moved(graph: onnx.GraphProto, name: str) -> set[str]:
    """The values that are an input's, moved; empty if there are none, or they are computed with as uint8."""
    moved: set[str] = set()
    ends = {value.name for value in graph.output}
    if name in ends or any(name in _captured(node) for node in graph.node):
        return set()
    for node in graph.node:  # in topological order
        read = [index for index, given in enumerate(node.input) if given == name or given in moved]
        if not read or (node.op_type in _MEASURING and not node.domain):
            continue
        if node.op_type not in _MOVING or node.domain or read != [0] or ends.intersection(node.output):
            return set()
        moved.update(node.output)
    return set() if any(moved.intersection(_captured(node)) for node in graph.node) else moved


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """All names that the subgraphs of a node read."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (value.name for value in graph.output)
