"""Elementary functions, and the arithmetic that Paddle has in a way of its own."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from polyexport.lowering.backend import Tensor, is_float as is_float_type
from polyexport.lowering.paddle.backend import OPS
from polyexport.lowering.paddle.primitives import cast, uniform
from polyexport.lowering.paddle.weights import numpy_dtype
from polyexport.lowering.table import Int
from polyexport.lowering.value import Value


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor's elements are real or complex, and no integers."""
    return is_float_type(numpy_dtype(tensor.dtype))


OPS.functions(
    Acos=paddle.acos,
    Acosh=paddle.acosh,
    Asin=paddle.asin,
    Asinh=paddle.asinh,
    Atan=paddle.atan,
    Atanh=paddle.atanh,
    Cos=paddle.cos,
    Cosh=paddle.cosh,
    Erf=paddle.erf,
    IsNaN=paddle.isnan,
    Neg=paddle.neg,
    Not=paddle.logical_not,
    Reciprocal=paddle.reciprocal,
    Sign=paddle.sign,
    Sin=paddle.sin,
    Sinh=paddle.sinh,
    Tan=paddle.tan,
    BitwiseNot=paddle.bitwise_not,
    Mish=F.mish,
)


OPS.elementwise("Equal")(lambda a, b: paddle.equal(a, b))


@OPS.elementwise("Div")
def divide(a: Tensor, b: Tensor) -> Tensor:
    """True division of floats; integers are cut towards zero."""
    if not is_float(a):
        return _quotient(a, b)
    missing = len(a.shape) - len(b.shape)
    sizes = zip(a.shape[max(missing, 0) :], b.shape, strict=False)
    fits = missing >= 0 and all(theirs == 1 or theirs == own >= 0 for own, theirs in sizes)
    # oneDNN, which the inference runtime divides by, swaps the two where the first is the smaller one
    return paddle.divide(a if fits else a + paddle.zeros_like(b), b)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Of integers: Paddle's kernel cuts towards minus infinity, and its true division has floats as its result."""
    down = paddle.floor_divide(a, b)
    cut = paddle.logical_and(down * b != a, paddle.logical_xor(a < 0, b < 0))
    return down + paddle.cast(cut, a.dtype)


@OPS.elementwise("Mod")
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the divisor, or with `fmod` that of the dividend."""
    if not fmod:
        return paddle.mod(a, b)
    if is_float(a):
        size = paddle.mod(paddle.abs(a), paddle.abs(b))
        return paddle.where(a < 0, -size, size)
    return a - _quotient(a, b) * b


@OPS.elementwise("BitShift")
def shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Bits move up or down; those that fall out are lost."""
    return paddle.bitwise_left_shift(a, b) if direction == "LEFT" else paddle.bitwise_right_shift(a, b)


@OPS.elementwise("IsInf")
def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Either sign can be left out."""
    found = paddle.isinf(x)
    if detect_negative and detect_positive:
        return found
    wanted = x < 0 if detect_negative else x > 0
    nothing = paddle.zeros_like(found)
    return paddle.logical_and(found, wanted if detect_negative or detect_positive else nothing)


OPS.elementwise("Gelu")(lambda x, *, approximate="none": F.gelu(x, approximate=approximate == "tanh"))


@OPS.op("CumSum")
def cumulative_sum(x: Value, axis: Int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Along one axis, from either end."""
    tensor = paddle.flip(x.tensor, [axis]) if reverse else x.tensor
    total = cast(paddle.cumsum(tensor, axis), x.dtype)
    total = total - tensor if exclusive else total
    return paddle.flip(total, [axis]) if reverse else total


OPS.op("Det")(lambda x: paddle.linalg.det(x.tensor))


@OPS.op("Multinomial")
def multinomial(x: Value, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes by their log probabilities: where, in their sum so far, a number drawn falls."""
    chances = paddle.cumsum(F.softmax(cast(x.tensor, "float32"), -1), -1)
    drawn = uniform([x.backend.sizes(x)[0], sample_size, 1], 0.0, 1.0, seed, x.backend.type_of(1))
    below = paddle.unsqueeze(chances[:, :-1], 1) <= drawn  # the last class takes what rounding leaves
    return paddle.sum(cast(below, x.backend.type_of(dtype)), -1)
