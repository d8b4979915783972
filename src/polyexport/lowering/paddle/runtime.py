"""A program as Paddle's inference runtime computes it rightly: with copies where it would go wrong (Paddle 3.2.2).

The runtime runs float32 with oneDNN where that has a kernel, and plain kernels besides. Three things go wrong there:

* An operator writes over its input where nobody reads that afterwards. From a oneDNN kernel to a plain one a tensor
  goes by a step that copies nothing and counts for a tensor of its own: `y + floor(y)` adds `floor(y)` twice.
* An operator is fused to the one before whatever their type, but plain kernels know nothing of that: `(a + b) * 3` is
  `a + b` in int64, and a transposed tensor of integers that is reshaped does not load.
* A reshape that is fused to a transpose keeps the transpose's shape, by which a product behind it is judged.

A copy is the maximum of a tensor with itself: neither in oneDNN, nor written over its input, nor fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import paddle

from polyexport.lowering.paddle.target import is_float
from polyexport.lowering.value import Tensor

_ONEDNN = frozenset(
    {
        *("abs", "add", "cast", "clip", "divide", "elu", "flatten", "leaky_relu", "multiply", "relu", "reshape"),
        *("scale", "sigmoid", "softmax", "sqrt", "squeeze", "subtract", "tanh", "transpose", "unsqueeze"),
    }
)
"""Operators that may write over their input and have a oneDNN kernel, which the step does not come before."""

_GIVEN = frozenset({"builtin.parameter", "pd_op.data", "pd_op.full", "pd_op.assign_value_"})
"""What a program starts from, which the runtime never overwrites."""

_FUSING = frozenset({"add", "divide", "matmul", "multiply", "subtract", "transpose"})
"""Operators to which the runtime fuses what is behind them."""

_FUSED = frozenset({"abs", "clip", "relu", "reshape", "scale", "sqrt", "unsqueeze"})
"""Operators that it fuses to those."""


def secure(program: Any) -> None:
    """Put copies into a program that is about to be saved."""
    paddle.base.libpaddle.pir.apply_cse_pass(program)  # the runtime's own: what is the same is read together after it
    with paddle.static.program_guard(program):
        for op in list(_operators(program.global_block())):
            for place, value in enumerate(op.operands_source()):
                if (_overwrites(op) and is_float(value) and _is_shared(value)) or _is_fused_wrongly(value, op, place):
                    paddle.base.libpaddle.pir.set_insertion_point(op)
                    op.operand(place).set_source(_copied(value))


def _operators(block: Any) -> Iterator[Any]:
    for op in block.ops:
        yield op
        for inner in op.blocks():
            yield from _operators(inner)


def _copied(value: Tensor) -> Tensor:
    return paddle.logical_or(value, value) if value.dtype == paddle.bool else paddle.maximum(value, value)


def _name(op: Any) -> str:
    return str(op.name()).removeprefix("pd_op.")


def _overwrites(op: Any) -> bool:
    """Whether the runtime knows a variant of a plain kernel that writes over its input."""
    return _name(op) not in _ONEDNN and hasattr(paddle._C_ops, f"{_name(op)}_")


def _is_shared(value: Any) -> bool:
    """Whether another operator reads it, under another name even: the runtime takes assignments away."""
    while (op := value.get_defining_op()) is not None:
        if op.name() in _GIVEN:
            return False
        if not value.has_one_use():
            return True
        if op.name() != "pd_op.assign":
            return False
        value = op.operand_source(0)
    return not value.has_one_use()


def _is_fused_wrongly(value: Any, op: Any, place: int) -> bool:
    if place or _name(op) not in _FUSED or (before := value.get_defining_op()) is None or _name(before) not in _FUSING:
        return False
    if value.dtype != paddle.float32:
        return True
    # two last axes joined, as attention joins its heads, do no harm
    heads = len(value.shape) == 4 and list(op.result(0).shape[:-1]) == list(value.shape[:2])
    return _name(before) == "transpose" and _name(op) == "reshape" and not heads
