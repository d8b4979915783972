"""Operators that multiply matrices."""

from __future__ import annotations

import itertools

import paddle

from polyexport.lowering.paddle.math import add
from polyexport.lowering.paddle.target import OPS, is_float, told
from polyexport.lowering.value import Tensor, Value


@OPS.op("MatMul")
def matmul(a: Value, b: Value) -> Tensor:
    """As numpy's: vectors lose the axis that they were given."""
    return multiplied(a.tensor, b.tensor)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of tensors of any rank, one included; of integers in float64, which alone has a kernel."""
    if is_float(a):
        return _told_batch(paddle.matmul(a, b), a, b)
    return paddle.cast(multiplied(paddle.cast(a, "float64"), paddle.cast(b, "float64")), a.dtype)


def _told_batch(made: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The product with its leading axes told: of 1 and a size unknown before the run Paddle makes 1."""
    if min(len(a.shape), len(b.shape)) < 2:
        return made
    pairs = itertools.zip_longest(reversed(a.shape[:-2]), reversed(b.shape[:-2]), fillvalue=1)
    batch = [max(pair) if max(pair) > 1 else min(pair) for pair in pairs]
    sizes = [*reversed(batch), a.shape[-2], b.shape[-1]]
    return told(made, [None if size < 0 else size for size in sizes])


@OPS.op("Gemm")
def gemm(
    a: Value, b: Value, c: Value | None = None,
    *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
    broadcast: int = 0,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """`alpha * a b + beta * c`, either matrix transposed first."""
    left, right = (paddle.t(x.tensor) if flag else x.tensor for x, flag in ((a, transA), (b, transB)))
    product = _times(multiplied(left, right), alpha)
    return product if c is None else add(product, _times(c.tensor, beta))


def _times(tensor: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return tensor
    return tensor * factor if is_float(tensor) else paddle.cast(paddle.cast(tensor, "float64") * factor, tensor.dtype)


@OPS.op("Einsum", since=12)
def einsum(*operands: Value, equation: str) -> Tensor:
    """Capital letters, spaces and an output that is left out included."""
    return paddle.einsum(equation.replace(" ", ""), *(operand.tensor for operand in operands))


@OPS.op("MatMulInteger", since=10)
def matmul_integer(a: Value, b: Value, a_zero: Value | None = None, b_zero: Value | None = None) -> Tensor:
    """In 32 bits, each side less its zero point."""
    left, right = a.tensor, b.tensor
    if a_zero is not None:
        per_row = a_zero.rank == 1 and a_zero.shape != (1,)
        left = left - (paddle.unsqueeze(a_zero.tensor, 1) if per_row else a_zero.tensor)
    return multiplied(left, right if b_zero is None else right - b_zero.tensor)
