"""Operators that work element by element."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.target import OPS, cast, dtype_of, is_float
from polyexport.lowering.value import Tensor, Value


def _unary(function: Any) -> Any:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


for _name, _function in {
    "Abs": paddle.abs, "Acos": paddle.acos, "Acosh": paddle.acosh, "Asin": paddle.asin, "Asinh": paddle.asinh,
    "Atan": paddle.atan, "Atanh": paddle.atanh, "Ceil": paddle.ceil, "Cos": paddle.cos, "Cosh": paddle.cosh,
    "Erf": paddle.erf, "Exp": paddle.exp, "Floor": paddle.floor, "IsNaN": paddle.isnan, "Log": paddle.log,
    "Neg": paddle.neg, "Not": paddle.logical_not, "Reciprocal": paddle.reciprocal,
    "Sigmoid": F.sigmoid, "Sign": paddle.sign, "Sin": paddle.sin, "Sinh": paddle.sinh,
    "Softsign": F.softsign, "Sqrt": paddle.sqrt, "Tan": paddle.tan, "Tanh": paddle.tanh,
    "BitwiseNot": paddle.bitwise_not, "Mish": F.mish,
    "Relu": lambda x: F.relu(x) if is_float(x) else paddle.clip(x, min=0),
}.items():  # fmt: skip  # a table, read as one
    OPS.elementwise(_name)(_unary(_function))


@OPS.elementwise("Round", since=11)
def round_(x: Tensor) -> Tensor:
    """Halves to even numbers, which Paddle's own kernel rounds away from zero."""
    low = paddle.floor(x)
    rest = x - low
    odd = low - 2 * paddle.floor(low / 2)
    up = paddle.logical_or(rest > 0.5, paddle.logical_and(rest == 0.5, odd == 1))
    return paddle.where(up, low + 1, low)


@OPS.elementwise("Softplus")
def softplus(x: Tensor) -> Tensor:
    """Without the threshold from which Paddle's is a line."""
    return paddle.maximum(x, paddle.zeros_like(x)) + paddle.log1p(paddle.exp(-paddle.abs(x)))


def _binary(function: Any) -> Any:
    def apply(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
        return function(a, b)

    return apply


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum; as a difference where a pass of the inference runtime would make it part of the product before it.

    oneDNN's matrix products and convolutions can end in an addition, but what they add may not be wider than they are,
    and narrower only as a bias is: a vector as long as their last axis.
    """
    narrow, wide = sorted((list(a.shape), list(b.shape)), key=len)
    is_bias = len(narrow) == 1 < len(wide) and narrow[0] == wide[-1] > 1
    if a.dtype != paddle.float32 or is_bias or (narrow == wide and len(wide) > 1):
        return paddle.add(a, b)
    return a - (-b) if list(a.shape) == wide else b - (-a)


_ARITHMETIC = {"Add": add, "Sub": paddle.subtract, "Mul": paddle.multiply}

for _name, _function in {
    **_ARITHMETIC, "And": paddle.logical_and, "Or": paddle.logical_or, "Xor": paddle.logical_xor,
    "Less": paddle.less_than, "LessOrEqual": paddle.less_equal, "Greater": paddle.greater_than,
    "GreaterOrEqual": paddle.greater_equal, "Equal": paddle.equal, "BitwiseAnd": paddle.bitwise_and,
    "BitwiseOr": paddle.bitwise_or, "BitwiseXor": paddle.bitwise_xor,
}.items():  # fmt: skip  # a table, read as one
    OPS.elementwise(_name, since=7)(_binary(_function))


def _legacy(function: Any) -> Any:
    """Before opset 7 the second tensor lay at an axis of the first, not at its end."""

    def apply(
        a: Value, b: Value, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Any = None
    ) -> Tensor:
        right = b.tensor
        if axis is not None and broadcast:
            missing = (a.rank or 0) - axis % (a.rank or 1) - (b.rank or 0)
            right = paddle.unsqueeze(right, [-1] * missing) if missing else right
        return function(a.tensor, right)

    return apply


@OPS.elementwise("Div", since=7)
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


@OPS.elementwise("Mod", since=10)
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the divisor, or with `fmod` that of the dividend."""
    if not fmod:
        return paddle.mod(a, b)
    if is_float(a):
        size = paddle.mod(paddle.abs(a), paddle.abs(b))
        return paddle.where(a < 0, -size, size)
    return a - _quotient(a, b) * b


@OPS.elementwise("Pow", since=7)
def power(a: Tensor, b: Tensor) -> Tensor:
    """Of the base's type, whatever the exponent's."""
    if a.dtype == b.dtype:
        return paddle.pow(a, b)
    if is_float(a) and not is_float(b):
        return paddle.pow(a, paddle.cast(b, a.dtype))
    wide = "float64" if not is_float(b) or "float64" in str(a.dtype) + str(b.dtype) else b.dtype
    return paddle.cast(paddle.pow(paddle.cast(a, wide), paddle.cast(b, wide)), a.dtype)


for _name, _function in {**_ARITHMETIC, "Div": divide, "Pow": power}.items():
    OPS.op(_name)(_legacy(_function))


@OPS.elementwise("BitShift", since=11)
def shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Bits move up or down; those that fall out are lost."""
    return paddle.bitwise_left_shift(a, b) if direction == "LEFT" else paddle.bitwise_right_shift(a, b)


def _variadic(combine: Any, finish: Any = None) -> Any:
    def apply(*tensors: Tensor) -> Tensor:
        result = functools.reduce(combine, tensors)
        return finish(result, len(tensors)) if finish else result

    return apply


OPS.elementwise("Max")(_variadic(paddle.maximum))
OPS.elementwise("Min")(_variadic(paddle.minimum))
OPS.elementwise("Sum")(_variadic(add))
OPS.elementwise("Mean")(_variadic(add, lambda total, count: total / count))


@OPS.elementwise("Where", since=9)
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """All three broadcast against each other."""
    return paddle.where(condition, x, y)


@OPS.elementwise("IsInf", since=10)
def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Either sign can be left out."""
    found = paddle.isinf(x)
    if detect_negative and detect_positive:
        return found
    wanted = x < 0 if detect_negative else x > 0
    nothing = paddle.zeros_like(found)
    return paddle.logical_and(found, wanted if detect_negative or detect_positive else nothing)


@OPS.elementwise("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """`alpha * x` below zero."""
    return F.leaky_relu(x, alpha)


@OPS.elementwise("PRelu", since=7)
def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    """`slope * x` below zero."""
    return paddle.where(x < 0, slope * x, x)


@OPS.op("PRelu")
def parametric_relu_channels(x: Value, slope: Value, *, consumed_inputs: Any = None) -> Tensor:
    """Before opset 7: one slope per channel."""
    return parametric_relu(x.tensor, paddle.reshape(slope.tensor, [-1] + [1] * ((x.rank or 2) - 2)))


@OPS.elementwise("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`alpha * (exp(x) - 1)` below zero."""
    return F.elu(x, alpha)


@OPS.elementwise("Celu", since=12)
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`alpha * (exp(x / alpha) - 1)` below zero."""
    return paddle.where(x < 0, alpha * paddle.expm1(x / alpha), x)


@OPS.elementwise("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """`gamma * elu(x)`."""
    return gamma * paddle.where(x > 0, x, alpha * paddle.expm1(x))


@OPS.elementwise("Gelu", since=20)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """By the error function, or by tanh."""
    return F.gelu(x, approximate=approximate == "tanh")


@OPS.elementwise("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """A line, clipped to 0 and 1."""
    return paddle.clip(alpha * x + beta, 0, 1)


@OPS.elementwise("HardSwish", since=14)
def hard_swish(x: Tensor) -> Tensor:
    """`x` times the hard sigmoid of slope 1/6."""
    return x * paddle.clip(x / 6 + 0.5, 0, 1)


@OPS.elementwise("Swish", since=24)
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x * sigmoid(alpha * x)`."""
    return x * F.sigmoid(alpha * x)


@OPS.elementwise("Shrink", since=9)
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Towards zero by `bias`; zero within `lambd`."""
    low, high = paddle.full([], -lambd, x.dtype), paddle.full([], lambd, x.dtype)
    offset = paddle.full([], bias, x.dtype)
    return paddle.where(x < low, x + offset, paddle.where(x > high, x - offset, paddle.zeros_like(x)))


@OPS.elementwise("ThresholdedRelu", since=10)
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Zero up to `alpha`."""
    return paddle.where(x > alpha, x, paddle.zeros_like(x))


@OPS.op("Clip", since=11)
def clip(x: Value, low: Value | None = None, high: Value | None = None) -> Tensor:
    """Either bound may be missing; where they cross, the upper one wins."""
    tensor = x.tensor
    if low is not None:
        tensor = paddle.maximum(tensor, low.tensor)
    return tensor if high is None else paddle.minimum(tensor, high.tensor)


@OPS.elementwise("Clip", since=6)
def clip_between(x: Tensor, *, min: float | None = None, max: float | None = None) -> Tensor:
    """With the bounds as attributes."""
    return paddle.clip(x, min, max)


@OPS.op("Cast", since=6, narrow=True)
def cast_(x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """Floats are cut towards zero on their way to integers."""
    return cast(x, dtype_of(to))


@OPS.op("CastLike", since=15, narrow=True)
def cast_like(x: Value, other: Value, *, saturate: int = 1, round_mode: str = "up") -> Value:
    """To the type of another tensor."""
    return cast(x, other.dtype)


@OPS.op("Dropout", narrow=True)
def dropout(x: Value, ratio: Value | None = None, training: Value | None = None, *, seed: int = 0, node: Node) -> Any:
    """Nothing, since a model is exported for inference.

    Raises:
        UnsupportedOp: it is left in training mode.
    """
    if training is not None and (training.known is None or bool(training.known)):
        share = 0.5 if ratio is None else ratio.known
        if share is None or float(share) > 0:
            raise node.unsupported("it drops at random, since it is in training mode")
    return (x, paddle.ones_like(x.tensor, "bool")) if node.wants(1) else x


@OPS.op("Identity", "StopGradient", narrow=True)
def identity(x: Any) -> Any:
    """The value itself; a sequence too."""
    return x


@OPS.op("BatchNormalization", since=9)
def batch_normalization(
    x: Value, scale: Value, bias: Value, mean: Value, variance: Value,
    *, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0, spatial: int = 1, node: Node,
) -> Any:  # fmt: skip  # the inputs on one line, the attributes on the next
    """One factor and one offset per channel; in training mode by the batch's own statistics."""
    axes = [-1] + [1] * ((x.rank or 2) - 2)
    if training_mode:
        return _trained(x, scale, bias, mean, variance, epsilon, momentum)
    if all(each.known is not None for each in (scale, bias, mean, variance)):
        deviation = np.sqrt(variance.known.astype(np.float64) + epsilon)  # type: ignore[union-attr]  # the line above
        factor = scale.known / deviation
        offset = bias.known - mean.known * factor
        times, plus = (node.value(part.astype(x.dtype).reshape(axes)).tensor for part in (factor, offset))
    else:
        factor = scale.tensor / paddle.sqrt(variance.tensor + epsilon)
        offset = bias.tensor - mean.tensor * factor
        times, plus = (paddle.reshape(paddle.cast(part, x.tensor.dtype), axes) for part in (factor, offset))
    return x.tensor * times + plus


@OPS.op("BatchNormalization")
def batch_normalization_tested(
    *inputs: Value, epsilon: float = 1e-5, momentum: float = 0.9, is_test: int = 0, spatial: int = 1,
    consumed_inputs: Any = None, node: Node,
) -> Any:  # fmt: skip  # the attributes on one line and a half
    """Before opset 9, as exported for inference; its further outputs are for training only."""
    return batch_normalization(*inputs, epsilon=epsilon, momentum=momentum, node=node)


def _trained(x: Value, scale: Value, bias: Value, mean: Value, variance: Value, epsilon: float, momentum: float) -> Any:
    data, axes = x.tensor, [-1] + [1] * ((x.rank or 2) - 2)
    others = [axis for axis in range(x.rank or 2) if axis != 1]
    now, spread = paddle.mean(data, others), paddle.var(data, others, unbiased=False)
    normal = (data - paddle.reshape(now, axes)) / paddle.sqrt(paddle.reshape(spread, axes) + epsilon)
    running = [old.tensor * momentum + new * (1 - momentum) for old, new in ((mean, now), (variance, spread))]
    return (normal * paddle.reshape(scale.tensor, axes) + paddle.reshape(bias.tensor, axes), *running)
