"""Operators that multiply matrices."""

from __future__ import annotations

import tensorflow as tf

from polyexport.lowering.tensorflow.target import OPS
from polyexport.lowering.value import Tensor, Value

_SHORT = (tf.int8, tf.uint8, tf.int16, tf.uint16, tf.uint32, tf.uint64)


@OPS.op("MatMul")
def matmul(a: Value, b: Value) -> Tensor:
    """As numpy's: vectors lose the axis that they were given."""
    return multiplied(a.tensor, b.tensor)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of tensors of any rank, one included."""
    if a.dtype in _SHORT:
        return tf.cast(multiplied(tf.cast(a, tf.int64), tf.cast(b, tf.int64)), a.dtype)
    left = a[None, :] if a.shape.rank == 1 else a
    right = b[:, None] if b.shape.rank == 1 else b
    product = tf.matmul(left, right)
    if b.shape.rank == 1:
        product = tf.squeeze(product, -1)
    return tf.squeeze(product, -1 if b.shape.rank == 1 else -2) if a.shape.rank == 1 else product


@OPS.op("Gemm")
def gemm(
    a: Value, b: Value, c: Value | None = None,
    *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
    broadcast: int = 0,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """`alpha * a b + beta * c`, either matrix transposed first."""
    left, right = (x.permuted((1, 0)) if flag else x for x, flag in ((a, transA), (b, transB)))
    product = multiplied(left.tensor, right.tensor)
    if alpha != 1:
        product = (
            tf.cast(tf.cast(product, tf.float32) * alpha, product.dtype)
            if product.dtype.is_integer
            else product * alpha
        )
    if c is None:
        return product
    bias = c.tensor if beta == 1 else c.tensor * tf.cast(beta, tf.as_dtype(c.dtype))
    # TensorFlow fuses a bias of shape (1, n) into a kernel that then refuses it
    return product + (tf.reshape(bias, [-1]) if c.rank == 2 and (c.shape or ())[0] == 1 else bias)


@OPS.op("Einsum", since=12)
def einsum(*operands: Value, equation: str) -> Tensor:
    """Capital letters, spaces and an output that is left out included."""
    return tf.einsum(_letters(equation), *(operand.tensor for operand in operands))


def _letters(equation: str) -> str:
    """With the output written out, as TensorFlow wants it."""
    equation = equation.replace(" ", "")
    if "->" in equation:
        return equation
    letters = [each for each in equation if each.isalpha()]
    once = sorted(each for each in set(letters) if letters.count(each) == 1)
    return f"{equation}->{'...' if '...' in equation else ''}{''.join(once)}"


@OPS.op("MatMulInteger", since=10)
def matmul_integer(a: Value, b: Value, a_zero: Value | None = None, b_zero: Value | None = None) -> Tensor:
    """In 32 bits, each side less its zero point."""
    left, right = tf.cast(a.tensor, tf.int32), tf.cast(b.tensor, tf.int32)
    if a_zero is not None:
        zero = tf.cast(a_zero.tensor, tf.int32)
        left -= zero[:, None] if zero.shape.rank == 1 and zero.shape[0] != 1 else zero
    if b_zero is not None:
        right -= tf.cast(b_zero.tensor, tf.int32)
    return multiplied(left, right)
