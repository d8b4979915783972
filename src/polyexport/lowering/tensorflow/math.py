"""Operators that work element by element."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.target import OPS, dtype_of
from polyexport.lowering.value import Tensor, Value, align


def _unary(function: Any) -> Any:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def _other_leg(x: Tensor) -> Tensor:
    """Of a right triangle with hypotenuse 1 and one leg `x`."""
    return tf.sqrt((1 - x) * (1 + x))


def _asinh(x: Tensor) -> Tensor:
    size = tf.abs(x)
    return tf.sign(x) * tf.math.log1p(size + size * size / (1 + tf.sqrt(size * size + 1)))


_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _erf(x: Tensor) -> Tensor:
    """By a polynomial, within 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    if x.dtype != tf.float32:
        return tf.math.erf(x)
    size = tf.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    return tf.sign(x) * (1 - functools.reduce(lambda total, factor: (total + factor) * t, _ERF, 0.0) * tf.exp(-x * x))


# TFLite has none of these: the arcs by atan2, which it has; Tan, Sinh, Cosh and their inverses by what defines them
for _name, _function in {
    "Acos": lambda x: tf.atan2(_other_leg(x), x),
    "Acosh": lambda x: tf.math.log(x + tf.sqrt((x - 1) * (x + 1))),
    "Asin": lambda x: tf.atan2(x, _other_leg(x)),
    "Asinh": _asinh,
    "Atan": lambda x: tf.atan2(x, tf.ones_like(x)),
    "Atanh": lambda x: (tf.math.log1p(x) - tf.math.log1p(-x)) / 2,
    "Cosh": lambda x: (tf.exp(x) + tf.exp(-x)) / 2,
    "Erf": _erf,
    "Sinh": lambda x: (tf.math.expm1(x) - tf.math.expm1(-x)) / 2,
    "Tan": lambda x: tf.sin(x) / tf.cos(x),
}.items():
    OPS.elementwise(_name)(_unary(_function))

for _name, _function in {
    "Abs": tf.abs, "Ceil": tf.math.ceil, "Cos": tf.cos, "Exp": tf.exp,
    "Floor": tf.floor, "IsNaN": tf.math.is_nan, "Log": tf.math.log, "Neg": tf.negative,
    "Not": tf.logical_not, "Reciprocal": tf.math.reciprocal, "Relu": tf.nn.relu, "Round": tf.round,
    "Sigmoid": tf.sigmoid, "Sign": tf.sign, "Sin": tf.sin, "Softplus": tf.math.softplus,
    "Softsign": tf.nn.softsign, "Sqrt": tf.sqrt, "Tanh": tf.tanh,
    "BitwiseNot": tf.bitwise.invert, "Mish": lambda x: x * tf.tanh(tf.math.softplus(x)),
}.items():  # fmt: skip  # a table, read as one
    OPS.elementwise(_name)(_unary(_function))


def _binary(function: Any) -> Any:
    def apply(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
        return function(a, b)

    return apply


for _name, _function in {
    "Add": tf.add, "Sub": tf.subtract, "Mul": tf.multiply, "And": tf.logical_and, "Or": tf.logical_or,
    "Xor": tf.math.logical_xor, "Less": tf.less, "LessOrEqual": tf.less_equal, "Greater": tf.greater,
    "GreaterOrEqual": tf.greater_equal, "Equal": tf.equal, "BitwiseAnd": tf.bitwise.bitwise_and,
    "BitwiseOr": tf.bitwise.bitwise_or, "BitwiseXor": tf.bitwise.bitwise_xor,
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
            right = right[(Ellipsis,) + (None,) * missing]
        return function(a.tensor, right)

    return apply


for _name, _function in {
    "Add": tf.add,
    "Sub": tf.subtract,
    "Mul": tf.multiply,
    "Div": tf.divide,
    "Pow": tf.pow,
}.items():
    OPS.op(_name)(_legacy(_function))


@OPS.elementwise("Div", since=7)
def divide(a: Tensor, b: Tensor) -> Tensor:
    """True division of floats; integers are cut towards zero."""
    if a.dtype.is_floating or a.dtype.is_complex:
        return a / b
    quotient = a // b  # not tf.truncatediv, which TensorFlow.js and TensorFlow Lite lack
    if a.dtype.is_unsigned:
        return quotient
    return quotient + tf.cast((quotient < 0) & (quotient * b != a), a.dtype)


@OPS.elementwise("Mod", since=10)
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the divisor, or with `fmod` that of the dividend."""
    if a.dtype in (tf.float16, tf.bfloat16):  # which TensorFlow has no kernel for
        return tf.cast(modulo(tf.cast(a, tf.float32), tf.cast(b, tf.float32), fmod=fmod), a.dtype)
    left = tf.math.floormod(a, b)
    # not tf.truncatemod, which TensorFlow.js and TensorFlow Lite lack
    return tf.where((left != 0) & ((a < 0) != (b < 0)), left - b, left) if fmod else left


@OPS.elementwise("Pow", since=7)
def power(a: Tensor, b: Tensor) -> Tensor:
    """Of the base's type, whatever the exponent's."""
    if a.dtype == b.dtype:
        return tf.pow(a, b)
    wide = tf.float64 if tf.float64 in (a.dtype, b.dtype) or not b.dtype.is_floating else b.dtype
    if a.dtype.is_floating and not b.dtype.is_floating:
        return tf.pow(a, tf.cast(b, a.dtype))
    return tf.cast(tf.pow(tf.cast(a, wide), tf.cast(b, wide)), a.dtype)


@OPS.elementwise("BitShift", since=11)
def shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Bits move up or down; those that fall out are lost."""
    return tf.bitwise.left_shift(a, b) if direction == "LEFT" else tf.bitwise.right_shift(a, b)


def _variadic(combine: Any, finish: Any = None) -> Any:
    def apply(*tensors: Tensor) -> Tensor:
        result = functools.reduce(combine, tensors)
        return finish(result, len(tensors)) if finish else result

    return apply


OPS.elementwise("Max")(_variadic(tf.maximum))
OPS.elementwise("Min")(_variadic(tf.minimum))
OPS.elementwise("Sum")(_variadic(tf.add))
OPS.elementwise("Mean")(_variadic(tf.add, lambda total, count: total / tf.constant(count, total.dtype)))


@OPS.elementwise("Where", since=9)
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """All three broadcast against each other."""
    return tf.where(condition, x, y)


@OPS.elementwise("IsInf", since=10)
def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Either sign can be left out."""
    signs = ([x == -np.inf] if detect_negative else []) + ([x == np.inf] if detect_positive else [])
    return functools.reduce(tf.logical_or, signs) if signs else tf.zeros_like(x, tf.bool)


@OPS.elementwise("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """`alpha * x` below zero."""
    return tf.nn.leaky_relu(x, alpha)


@OPS.elementwise("PRelu", since=7)
def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    """`slope * x` below zero."""
    return tf.where(x < 0, slope * x, x)


@OPS.op("PRelu")
def parametric_relu_channels(x: Value, slope: Value, *, consumed_inputs: Any = None) -> Tensor:
    """Before opset 7: one slope per channel."""
    return parametric_relu(x.tensor, tf.reshape(slope.tensor, [-1] + [1] * ((x.rank or 2) - 2)))


@OPS.elementwise("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`alpha * (exp(x) - 1)` below zero."""
    return tf.nn.elu(x) if alpha == 1 else tf.where(x < 0, alpha * tf.math.expm1(x), x)


@OPS.elementwise("Celu", since=12)
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`alpha * (exp(x / alpha) - 1)` below zero."""
    return tf.maximum(x, 0) + tf.minimum(alpha * tf.math.expm1(x / alpha), 0)


@OPS.elementwise("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """`gamma * elu(x)`."""
    return gamma * tf.where(x > 0, x, alpha * tf.math.expm1(x))


@OPS.elementwise("Gelu", since=20)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """By the error function, or by tanh."""
    if approximate == "tanh":
        return tf.nn.gelu(x, approximate=True)
    return 0.5 * x * (1 + tf.math.erf(x * np.sqrt(0.5).astype(x.dtype.as_numpy_dtype)))  # TensorFlow.js has no erfc


@OPS.elementwise("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """A line, clipped to 0 and 1."""
    return tf.clip_by_value(alpha * x + beta, 0, 1)


@OPS.elementwise("HardSwish", since=14)
def hard_swish(x: Tensor) -> Tensor:
    """`x` times the hard sigmoid of slope 1/6."""
    return x * tf.clip_by_value(x / 6 + 0.5, 0, 1)


@OPS.elementwise("Swish", since=24)
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x * sigmoid(alpha * x)`."""
    return x * tf.sigmoid(alpha * x)


@OPS.elementwise("Shrink", since=9)
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Towards zero by `bias`; zero within `lambd`."""
    bias, lambd = tf.cast(bias, x.dtype), tf.cast(lambd, x.dtype)
    return tf.where(x < -lambd, x + bias, tf.where(x > lambd, x - bias, tf.zeros_like(x)))


@OPS.elementwise("ThresholdedRelu", since=10)
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Zero up to `alpha`."""
    return tf.where(x > alpha, x, tf.zeros_like(x))


@OPS.op("Clip", since=11)
def clip(x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """Either bound may be missing; where they cross, the upper one wins."""
    tensor = x.stored
    if low is not None:
        tensor = tf.maximum(tensor, low.tensor)
    if high is not None:
        tensor = tf.minimum(tensor, high.tensor)
    return Value(x.framework, tensor, x.order)


@OPS.elementwise("Clip", since=6)
def clip_between(x: Tensor, *, min: float | None = None, max: float | None = None) -> Tensor:
    """With the bounds as attributes."""
    x = x if min is None else tf.maximum(x, tf.cast(min, x.dtype))
    return x if max is None else tf.minimum(x, tf.cast(max, x.dtype))


@OPS.elementwise("Cast", since=6)
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Floats are cut towards zero on their way to integers."""
    return tf.cast(x, dtype_of(to))


@OPS.op("CastLike", since=15)
def cast_like(x: Value, other: Value, *, saturate: int = 1, round_mode: str = "up") -> Value:
    """To the type of another tensor."""
    return Value(x.framework, tf.cast(x.stored, tf.as_dtype(other.dtype)), x.order)


@OPS.op("Dropout")
def dropout(x: Value, ratio: Value | None = None, training: Value | None = None, *, seed: int = 0, node: Node) -> Any:
    """Nothing, since a model is exported for inference.

    Raises:
        UnsupportedOp: it is left in training mode.
    """
    if training is not None and (training.known is None or bool(training.known)):
        share = 0.5 if ratio is None else ratio.known
        if share is None or float(share) > 0:
            raise node.unsupported("it drops at random, since it is in training mode")
    kept = tf.ones(tf.shape(x.tensor), tf.bool) if node.wants(1) else None
    return (x, kept) if node.wants(1) else x


@OPS.op("Identity", "StopGradient")
def identity(x: Any) -> Any:
    """The value itself; a sequence too."""
    return x


@OPS.op("BatchNormalization", since=9)
def batch_normalization(
    x: Value, scale: Value, bias: Value, mean: Value, variance: Value,
    *, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0, spatial: int = 1, node: Node,
) -> Any:  # fmt: skip  # the inputs on one line, the attributes on the next
    """One factor and one offset per channel; in training mode by the batch's own statistics."""
    if training_mode:
        return _trained(x, scale, bias, mean, variance, epsilon, momentum)
    axes = (Ellipsis,) + (None,) * ((x.rank or 2) - 2)
    if all(each.known is not None for each in (scale, bias, mean, variance)):
        deviation = np.sqrt(variance.known.astype(np.float64) + epsilon)  # type: ignore[union-attr]  # the line above
        factor = scale.known / deviation
        offset = bias.known - mean.known * factor
        parts = [node.value(part.astype(x.dtype)[axes]) for part in (factor, offset)]
    else:
        factor = scale.tensor / tf.sqrt(variance.tensor + epsilon)
        offset = bias.tensor - mean.tensor * factor
        parts = [node.value(tf.cast(part, tf.as_dtype(x.dtype))[axes]) for part in (factor, offset)]
    (tensor, times, plus), order = align([x, *parts])
    return node.value(tensor * times + plus, order)


@OPS.op("BatchNormalization")
def batch_normalization_tested(
    *inputs: Value, epsilon: float = 1e-5, momentum: float = 0.9, is_test: int = 0, spatial: int = 1,
    consumed_inputs: Any = None, node: Node,
) -> Any:  # fmt: skip  # the attributes on one line and a half
    """Before opset 9, as exported for inference; its further outputs are for training only."""
    return batch_normalization(*inputs, epsilon=epsilon, momentum=momentum, node=node)


@OPS.op("BitCast", since=26)
def bitcast(x: Value, *, to: int) -> Tensor:
    """The same bits, counted as another type."""
    bits = tf.cast(x.tensor, tf.uint8) if x.dtype == np.bool_ else x.tensor
    return tf.cast(bits, tf.bool) if dtype_of(to) == tf.bool else tf.bitcast(bits, dtype_of(to))


def _trained(x: Value, scale: Value, bias: Value, mean: Value, variance: Value, epsilon: float, momentum: float) -> Any:
    data = x.tensor
    others = [axis for axis in range(x.rank or 2) if axis != 1]
    axes = (Ellipsis,) + (None,) * ((x.rank or 2) - 2)
    now, spread = tf.nn.moments(data, others)
    normal = (data - now[axes]) / tf.sqrt(spread[axes] + epsilon)
    running = [old.tensor * momentum + new * (1 - momentum) for old, new in ((mean, now), (variance, spread))]
    return (normal * scale.tensor[axes] + bias.tensor[axes], *running)
