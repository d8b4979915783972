"""ONNX to TensorFlow: the graph's operators as TensorFlow's own, traced by `tf.function`.

This folder is the one place where TensorFlow is imported at module level: it is imported by routes only, inside their
functions, and in the toolchain that has TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from polyexport.lowering.graph import Lowering
from polyexport.lowering.tensorflow import (  # each writes its operators into the table
    convolution as convolution,
    index as index,
    math as math,
    shape as shape,
    vision as vision,
)
from polyexport.lowering.tensorflow.backend import OPS, backend
from polyexport.lowering.tensorflow.weights import Weights
from polyexport.lowering.value import Value

if TYPE_CHECKING:
    import onnx


def lower_model(model: onnx.ModelProto, inputs: list[tf.TensorSpec]) -> tf.Module:
    """A module whose `forward` computes a model's graph: tensors in, a dict of named tensors out.

    Args:
        model: The model from `polyexport.lowering.protobuf.read`, with functions inlined.
        inputs: Name, type and shape of forward's inputs, in the order of its arguments; one that the graph does not
            read is accepted and ignored.

    Raises:
        UnsupportedOp: the graph has an operator, or a use of one, that is not supported.
    """
    weights = Weights()
    names = [output.name for output in model.graph.output]
    lowering = Lowering(backend(weights), OPS, model)

    def forward(*tensors: Any) -> dict[str, Any]:
        given = {spec.name: tensor for spec, tensor in zip(inputs, tensors, strict=True)}
        found = lowering.outputs(given)
        return {name: _named(name, each) for name, each in zip(names, found, strict=True)}

    module = tf.Module()
    module.forward = tf.function(forward, input_signature=inputs, autograph=False).get_concrete_function()
    module.weights = weights.variables
    return module


def _named(name: str, content: Any) -> Any:
    if not isinstance(content, Value):
        raise NotImplementedError(f"the output {name!r} is a sequence, and TensorFlow's signatures have only tensors")
    tensor = content.tensor
    return tf.where(tf.equal(tensor, tensor), tensor, tensor) if _is_sized_at_run_time(tensor) else tf.identity(tensor)


_ALWAYS = ("Placeholder", "TopKV2", "Where")
_BY_OPERANDS = (
    *("Reshape", "Tile", "Pad", "PadV2", "MirrorPad", "Range", "Slice", "StridedSlice"),
    *("ResizeBilinear", "ResizeNearestNeighbor"),
)


def _is_sized_at_run_time(tensor: Any) -> bool:
    """Whether LiteRT allocates a tensor while it runs, or takes an input's.

    Its `CompiledModel` leaves such an output empty, or refuses it, unless another operation follows that its converter
    keeps, and that computes the same values.
    """
    while tensor.op.type in ("Identity", "Transpose"):  # which may change nothing, and be gone then
        tensor = tensor.op.inputs[0]
    kind, operands = tensor.op.type, tensor.op.inputs[1:]
    by_operands = kind in _BY_OPERANDS and any(tf.get_static_value(each) is None for each in operands)
    return kind in _ALWAYS or by_operands
