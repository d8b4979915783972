"""Workarounds for passes of Paddle Inference that break programs which Paddle's executor runs correctly.

On CPUs the runtime uses oneDNN by default, and two of its passes are wrong:

* An operator may overwrite its input if no later one reads it. A tensor passed from oneDNN to an operator without a
  oneDNN kernel gets another name but no copy, and the pass compares names: in `y = x * 3; z = floor(y) + y` the last y
  is floor(y) already.
* Operators that oneDNN can fuse are fused for any type. oneDNN has kernels for float32; for other types only the first
  operator is run, or none: for integers `(a - b) * 2` is `a - b`.

A copy by `tile`, which oneDNN lacks, which no operator overwrites and no pass removes, prevents both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import paddle
from paddle.static import Program

from polyexport.lowering.backend import Tensor

_OVERWRITING = {
    *("abs", "add", "add_n", "cast", "clip", "divide", "elu", "exp", "multiply", "relu", "reshape", "round", "scale"),
    *("sigmoid", "softmax", "sqrt", "subtract", "tanh", "transpose"),
}
"""Operators that may overwrite their input and that oneDNN has kernels for, so that the pass knows what they read."""

_FUSED = {
    *_OVERWRITING,
    *("concat", "conv2d", "conv2d_transpose", "conv3d", "conv3d_transpose", "depthwise_conv2d", "gelu", "hardsigmoid"),
    *("hardswish", "leaky_relu", "matmul", "mish", "relu6", "silu", "softplus", "squeeze", "swish", "unsqueeze"),
}
"""Operators that a pass may fuse with the one before or after."""


def guard(program: Program) -> None:
    """Copy tensors that an operator would overwrite or be fused with wrongly."""
    pir = paddle.base.libpaddle.pir
    for op in list(_operations(program.global_block())):
        for index, tensor in enumerate(op.operands_source()):
            if _is_copied(tensor) and _is_in_danger(tensor, op):
                pir.set_insertion_point(op)
                op.operand(index).set_source(paddle.tile(tensor, [1] * len(tensor.shape)))
    pir.set_insertion_point_to_block_end(program.global_block())


def distinct(outputs: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    """The outputs as tensors of their own.

    A pass of the runtime computes duplicates only once, and if two outputs become one, a name is lost: an output that
    may equal an earlier one is copied once more than that.
    """
    keys, seen = _keys(program), Counter[int]()
    found = {}
    for name, tensor in outputs.items():
        key = keys[tensor]
        seen[key] += 1
        for _ in range(seen[key]):
            tensor = paddle.assign(tensor)
        found[name] = tensor
    return found


def _keys(program: Program) -> Any:
    """A number for each tensor, equal for duplicates, and for a few others."""
    from paddle.autograd.backward_utils import ValueDict

    keys = ValueDict()
    for number, op in enumerate(program.global_block().ops):
        inputs = sorted(keys[tensor] for tensor in op.operands_source() if tensor.initialized())
        itself = number if list(op.blocks()) else "" if inputs else repr(op.attrs())
        for index, tensor in enumerate(op.results()):
            keys[tensor] = hash((op.name(), itself, index, *inputs))
    return keys


def _operations(block: Any) -> Iterator[Any]:
    for op in block.ops:
        yield op
        for inner in op.blocks():
            yield from _operations(inner)


def _is_copied(tensor: Tensor) -> bool:
    """Whether `tile` supports the tensor."""
    types = (paddle.bool, paddle.int32, paddle.int64, paddle.float32, paddle.float64)
    return bool(tensor.initialized()) and tensor.is_dense_tensor_type() and tensor.dtype in types and tensor.ndim < 8


def _name(op: Any) -> str:
    return "" if op is None else str(op.name()).removeprefix("pd_op.").removesuffix("_")


def _is_in_danger(tensor: Tensor, op: Any) -> bool:
    """Whether an operator needs a copy of a tensor: oneDNN computes in float32, and casts from there."""
    name, source = _name(op), _name(tensor.get_defining_op())
    if tensor.dtype != paddle.float32 and name in _FUSED and source in _FUSED:
        return True
    if source == "transpose" and name == "reshape":  # fused, it keeps a shape that later operators are checked against
        heads = tensor.ndim == 4 and list(op.result(0).shape[:-1]) == list(tensor.shape[:2])
        return not heads or any(reader.name() == "builtin.combine" for reader in op.result(0).all_used_ops())
    overwrites = name not in _OVERWRITING and hasattr(paddle._C_ops, f"{name}_")
    return overwrites and not tensor.has_one_use() and (tensor.dtype == paddle.float32 or source == "cast")


def read(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], program: Program) -> list[Tensor]:
    """The inputs that an output depends on; Paddle cannot save a program with others."""
    from paddle.autograd.backward_utils import ValueSet, get_real_op_inputs, get_real_op_outputs, some_in_set

    needed = ValueSet(outputs.values())
    for op in reversed(program.global_block().ops):
        if some_in_set(get_real_op_outputs(op), needed):
            for tensor in get_real_op_inputs(op):
                needed.add(tensor)
    return [tensor for tensor in inputs.values() if tensor in needed]
