"""Replaces slices with a negative step by gathers, for runtimes and generators that only slice forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def without_reversals(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, which is changed, with each slice that goes backwards replaced by a gather along each of its axes.

    Sizes have to be static and constants initializers, as `with_sizes` leaves them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    sizes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values}
    known = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        axes = _backwards(node, known, sizes.get(node.input[0], [])) if node.op_type == "Slice" else {}
        nodes += _gathers(model.graph, node, axes) if axes else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _backwards(node: onnx.NodeProto, known: Mapping[str, np.ndarray], sizes: list[int]) -> dict[int, np.ndarray]:
    """The indices along each axis that a slice takes, if a step is negative; else none."""
    starts, ends, axes, steps = (known.get(name) for name in [*node.input[1:], "", ""][:4])
    if starts is None or ends is None or steps is None or (steps > 0).all():
        return {}
    axes = np.arange(len(starts)) if axes is None else axes % len(sizes)
    found = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = sizes[axis]
        # an end before the first index, which Python would count from the last
        last = None if step < 0 and end < -size else int(end)
        found[int(axis)] = np.arange(size)[int(start) : last : int(step)]
    return found


def _gathers(graph: onnx.GraphProto, node: onnx.NodeProto, axes: Mapping[int, np.ndarray]) -> list[onnx.NodeProto]:
    from onnx import helper, numpy_helper

    (made,) = node.output
    names = [node.input[0], *(f"{made}_axis_{axis}" for axis in list(axes)[:-1]), made]
    nodes = []
    for (axis, indices), source, target in zip(axes.items(), names[:-1], names[1:], strict=True):
        graph.initializer.append(numpy_helper.from_array(indices, f"{made}_indices_{axis}"))
        nodes.append(helper.make_node("Gather", [source, f"{made}_indices_{axis}"], [target], axis=axis))
    return nodes
