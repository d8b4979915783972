"""Reductions, cumulative operators and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from polyexport.lowering.backend import Backend, Tensor, is_float, is_known
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED, Ints
from polyexport.lowering.value import Value

Reduction = Callable[[Backend, Tensor, Sequence[int], bool], Tensor]


def _root(ops: Backend, x: Tensor) -> Tensor:
    dtype = ops.dtype(x)
    return ops.sqrt(x) if is_float(dtype) else ops.cast(ops.sqrt(ops.cast(x, np.dtype(np.float64))), dtype)


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": lambda ops, x, *how: ops.sum(x, *how),
    "ReduceMean": lambda ops, x, *how: ops.mean(x, *how),
    "ReduceProd": lambda ops, x, *how: ops.prod(x, *how),
    "ReduceMax": lambda ops, x, *how: ops.max(x, *how),
    "ReduceMin": lambda ops, x, *how: ops.min(x, *how),
    "ReduceL1": lambda ops, x, *how: ops.sum(ops.abs(x), *how),
    "ReduceL2": lambda ops, x, *how: _root(ops, ops.sum(x * x, *how)),
    "ReduceSumSquare": lambda ops, x, *how: ops.sum(x * x, *how),
    "ReduceLogSum": lambda ops, x, *how: ops.log(ops.sum(x, *how)),
    "ReduceLogSumExp": lambda ops, x, *how: ops.log_sum_exp(x, *how),
}


def _reduction(reduce: Reduction) -> Callable[..., Value]:
    def apply(
        ops: Backend,
        x: Value,
        axes: Ints | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
        node: Node,
    ) -> Value:
        if not axes and noop_with_empty_axes:
            return node.value(reduce(ops, ops.unsqueeze(x.tensor, [0]), [0], False))
        rank = x.rank or 0
        gone = sorted(axis % rank for axis in axes) if axes else list(range(rank))
        result = reduce(ops, x.stored, [x.placed(axis) for axis in gone], bool(keepdims))
        return node.value(result, x.order if keepdims else x.without(gone))

    return apply


for _name, _reduce in _REDUCTIONS.items():
    SHARED.op(_name)(_reduction(_reduce))


def _extreme(find: Callable[[Backend], Callable[[Tensor, int, bool], Tensor]]) -> Callable[..., Tensor]:
    """The first or last index of the extreme element."""

    def apply(ops: Backend, x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        axis = axis % (x.rank or 1)
        if not select_last_index:
            return find(ops)(x.tensor, axis, bool(keepdims))
        found = find(ops)(ops.flip(x.tensor, [axis]), axis, bool(keepdims))
        last = ops.sizes(x)[axis] - 1
        return (last if is_known(last) else ops.cast(last, np.dtype(np.int64))) - found

    return apply


SHARED.op("ArgMax")(_extreme(lambda ops: ops.argmax))
SHARED.op("ArgMin")(_extreme(lambda ops: ops.argmin))


def _hardmax(ops: Backend, x: Tensor, axis: int) -> Tensor:
    size = ops.sizes(Value(ops, x))[axis]
    return ops.cast(ops.one_hot(ops.argmax(x, axis, False), size, axis), ops.dtype(x))


Along = Callable[[Backend, Tensor, int], Tensor]


def _along(function: Along) -> Callable[..., Value]:
    def apply(ops: Backend, x: Value, *, axis: int = -1, node: Node) -> Value:
        return node.value(function(ops, x.stored, x.placed(axis)), x.order)

    return apply


def _flattened(function: Along) -> Callable[..., Tensor]:
    """Before opset 13 the axes from `axis` on count as one."""

    def apply(ops: Backend, x: Value, *, axis: int = 1) -> Tensor:
        axis = axis % (x.rank or 1)
        if axis == (x.rank or 1) - 1:
            return function(ops, x.tensor, axis)
        sizes = ops.sizes(x)
        return ops.reshape(function(ops, ops.reshape(x.tensor, [*sizes[:axis], -1]), axis), sizes)

    return apply


_ALONG: dict[str, Along] = {
    "Softmax": lambda ops, x, axis: ops.softmax(x, axis),
    "LogSoftmax": lambda ops, x, axis: ops.log_softmax(x, axis),
    "Hardmax": _hardmax,
}

for _name, _function in _ALONG.items():
    SHARED.op(_name, since=13)(_along(_function))
    SHARED.op(_name)(_flattened(_function))


@SHARED.op("LpNormalization")
def norm(ops: Backend, x: Value, *, axis: int = -1, p: int = 2) -> Tensor:
    """Along one axis, to length 1; zero vectors stay zero."""
    entries, axes = x.tensor, [axis % (x.rank or 1)]
    total = ops.sum(ops.abs(entries) if p == 1 else entries * entries, axes, True)
    length = total if p == 1 else ops.sqrt(total)
    return entries / ops.where(length == 0, ops.full([], 1, x.dtype), length)


# --- matrices ---------------------------------------------------------------------------------------------------------


@SHARED.op("MatMul")
def matmul(ops: Backend, a: Value, b: Value) -> Tensor:
    """As numpy's: a vector counts as a matrix of one row or column, whose axis the result lacks."""
    return ops.matmul(a.tensor, b.tensor)


@SHARED.op("Gemm")
def gemm(
    ops: Backend,
    a: Value,
    b: Value,
    c: Value | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    """`alpha * a b + beta * c`, either matrix transposed first."""
    left, right = (x.permuted((1, 0)) if flag else x for x, flag in ((a, transA), (b, transB)))
    product = _times(ops, ops.matmul(left.tensor, right.tensor), alpha)
    if c is None:
        return product
    bias = _times(ops, c.tensor, beta)
    # TensorFlow fuses a bias of shape (1, n) into a kernel that then refuses it
    return ops.add(product, ops.reshape(bias, [-1]) if c.rank == 2 and (c.shape or ())[0] == 1 else bias)


def _times(ops: Backend, tensor: Tensor, factor: float) -> Tensor:
    dtype = ops.dtype(tensor)
    if factor == 1:
        return tensor
    return tensor * factor if is_float(dtype) else ops.cast(ops.cast(tensor, np.dtype(np.float64)) * factor, dtype)


@SHARED.op("Einsum")
def einsum(ops: Backend, *operands: Value, equation: str) -> Tensor:
    """Including capital letters, spaces and an omitted output."""
    return ops.einsum(_with_output(equation.replace(" ", "")), [operand.tensor for operand in operands])


def _with_output(equation: str) -> str:
    if "->" in equation:
        return equation
    letters = [letter for letter in equation if letter.isalpha()]
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return f"{equation}->{'...' if '...' in equation else ''}{''.join(once)}"


@SHARED.op("MatMulInteger")
def matmul_integer(
    ops: Backend, a: Value, b: Value, a_zero: Value | None = None, b_zero: Value | None = None
) -> Tensor:
    """In 32 bits, each side less its zero point."""
    left, right = a.cast(np.dtype(np.int32)).tensor, b.cast(np.dtype(np.int32)).tensor
    if a_zero is not None:
        zero = a_zero.cast(np.dtype(np.int32)).tensor
        left = left - (ops.unsqueeze(zero, [1]) if a_zero.rank == 1 and a_zero.shape != (1,) else zero)
    if b_zero is not None:
        right = right - b_zero.cast(np.dtype(np.int32)).tensor
    return ops.matmul(left, right)
