"""Weights of recurrent layers that are stored in int8, in float32 again, for runtimes that compile loops of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_RECURRENT = ("GRU", "LSTM", "RNN")


def in_float32(model: onnx.ModelProto, folder: Path) -> bool:
    """Replace the `DequantizeLinear` of each stored weight that only recurrent layers read by its result, in place.

    Args:
        model: The graph; tensors in other files need not be loaded.
        folder: The folder of those files.

    Returns:
        Whether there was any.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {each.name: each for each in graph.initializer}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    found = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and constants.keys() >= set(node.input)
        and readers.get(node.output[0], {""}) <= {*_RECURRENT}
    ]
    for node in found:
        stored = (numpy_helper.to_array(constants[name], base_dir=str(folder)) for name in node.input)
        steps, scale, *zero = (array.astype(np.float32) for array in stored)
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        shape = [1] * steps.ndim
        if scale.ndim:
            shape[axis] = -1
        shift = zero[0].reshape(shape) if zero else np.float32(0)
        graph.initializer.append(numpy_helper.from_array((steps - shift) * scale.reshape(shape), node.output[0]))
        graph.node.remove(node)
    return bool(found)
