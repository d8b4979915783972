"""What Paddle Inference would break of a program that Paddle's executor runs rightly, mended before it is saved.

oneDNN, which the runtime's defaults compute by on a CPU, hands a tensor on without a copy where its layout is a plain
one. The pass that lets operators overwrite their input looks at the copy's name alone: an operator without a kernel of
oneDNN's overwrites what a later one still reads. In `y = x * 3; z = floor(y) + y` the last y is floor(y) already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import paddle
from paddle.static import Program

from polyexport.lowering.value import Tensor

_BY_ONEDNN = {
    "abs", "add", "add_n", "cast", "clip", "divide", "exp", "multiply", "relu", "reshape", "scale", "sigmoid",
    "softmax", "sqrt", "subtract", "tanh", "transpose",
}  # fmt: skip  # words, not lines
"""Operators that may overwrite their input, and that oneDNN has kernels for: these the pass does know."""


def unshared(program: Program) -> None:
    """Give an operator that may overwrite its input one of its own, where another reads that too."""
    pir = paddle.base.libpaddle.pir
    for op in list(_operations(program.global_block())):
        name = op.name().removeprefix("pd_op.").removesuffix("_")
        if name in _BY_ONEDNN or not hasattr(paddle._C_ops, f"{name}_"):
            continue
        for place, tensor in enumerate(op.operands_source()):
            if _is_of_onednn(tensor) and not tensor.has_one_use():
                pir.set_insertion_point(op)
                op.operand(place).set_source(paddle.tile(tensor, [1] * len(tensor.shape)))
    pir.set_insertion_point_to_block_end(program.global_block())


def _operations(block: Any) -> Iterator[Any]:
    for op in block.ops:
        yield op
        for inner in op.blocks():
            yield from _operations(inner)


def _is_of_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN may have made it: it computes in float32, and casts from there."""
    if not tensor.initialized() or not tensor.is_dense_tensor_type():
        return False
    source = tensor.get_defining_op()
    return tensor.dtype == paddle.float32 or (source is not None and source.name() == "pd_op.cast")


def read(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], program: Program) -> list[Tensor]:
    """The inputs that an output depends on; Paddle saves no program with another one."""
    from paddle.autograd.backward_utils import ValueSet, get_real_op_inputs, get_real_op_outputs, some_in_set

    needed = ValueSet(outputs.values())
    for op in reversed(program.global_block().ops):
        if some_in_set(get_real_op_outputs(op), needed):
            for tensor in get_real_op_inputs(op):
                needed.add(tensor)
    return [tensor for tensor in inputs.values() if tensor in needed]
