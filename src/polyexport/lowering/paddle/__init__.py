"""ONNX to Paddle: the graph's operators as Paddle's own, in a static program.

This folder is the one place where Paddle is imported at module level: it is imported by routes only, inside their
functions, and in the toolchain that has Paddle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle
from paddle.static import InputSpec, Program

from polyexport.lowering.backend import Tensor
from polyexport.lowering.graph import Lowering
from polyexport.lowering.paddle import (  # each writes its operators into the table
    convolution as convolution,
    index as index,
    inference,
    math as math,
    shape as shape,
    vision as vision,
)
from polyexport.lowering.paddle.backend import OPS, backend
from polyexport.lowering.paddle.weights import Weights
from polyexport.lowering.value import Value

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Lowered:
    """A program, its weights in their own scope, and its input and output tensors by name."""

    program: Program
    scope: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def save(self, prefix: Path) -> None:
        """Write an inference model, `<prefix>.json` and `<prefix>.pdiparams`, with the outputs' names."""
        read = inference.read(self.inputs, self.outputs, self.program)
        with paddle.static.scope_guard(self.scope):
            program = paddle.static.normalize_program(self.program, read, list(self.outputs.values()))
            fetches = [op for op in program.global_block().ops if op.name() == "pd_op.fetch"]
            for op, name in zip(fetches, self.outputs, strict=True):
                op.set_str_attr("name", name)
            paddle.base.core.serialize_pir_program(program, f"{prefix}.json", True, False, True)
            paddle.static.io.save_vars_pir(
                str(prefix.parent), main_program=program, filename=f"{prefix.name}.pdiparams"
            )


def lower_model(model: onnx.ModelProto, inputs: list[InputSpec]) -> Lowered:
    """The program that computes a model's graph.

    Args:
        model: The model from `polyexport.lowering.protobuf.read`, with functions inlined.
        inputs: Name, type and shape of forward's inputs; one that the graph does not read is accepted and ignored.

    Raises:
        UnsupportedOp: the graph has an operator, or a use of one, that is not supported.
    """
    paddle.enable_static()
    weights, program, scope = Weights(), Program(), paddle.static.Scope()
    names = [output.name for output in model.graph.output]
    with paddle.static.program_guard(program, Program()):
        given = {spec.name: paddle.static.data(spec.name, spec.shape, spec.dtype) for spec in inputs}
        found = Lowering(backend(weights), OPS, model).outputs(given)
        tensors = {name: _tensor(name, each) for name, each in zip(names, found, strict=True)}
        outputs = inference.distinct(tensors, program)
        inference.guard(program)
    for name, array in weights.arrays.items():
        scope.var(name).get_tensor().set(array, paddle.CPUPlace())
    return Lowered(program, scope, given, outputs)


def _tensor(name: str, content: Any) -> Tensor:
    if not isinstance(content, Value):
        raise NotImplementedError(f"the output {name!r} is a sequence, and Paddle's programs return only tensors")
    return content.tensor
