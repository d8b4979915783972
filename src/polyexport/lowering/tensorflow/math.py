"""Elementary functions, and the arithmetic that TensorFlow has in a way of its own."""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import Tensor
from polyexport.lowering.tensorflow.backend import OPS
from polyexport.lowering.tensorflow.primitives import floor_divided
from polyexport.lowering.value import Value


def _other_leg(x: Tensor) -> Tensor:
    """Of a right triangle with hypotenuse 1 and one leg `x`."""
    return tf.sqrt((1 - x) * (1 + x))


def _asinh(x: Tensor) -> Tensor:
    size = tf.abs(x)
    return tf.sign(x) * tf.math.log1p(size + size * size / (1 + tf.sqrt(size * size + 1)))


def _sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; TFLite's operator does not take int64."""
    return tf.clip_by_value(x, -1, 1) if x.dtype == tf.int64 else tf.sign(x)


_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _erf(x: Tensor) -> Tensor:
    """By a polynomial, within 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    if x.dtype != tf.float32:
        return tf.math.erf(x)
    size = tf.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    return tf.sign(x) * (1 - functools.reduce(lambda total, factor: (total + factor) * t, _ERF, 0.0) * tf.exp(-x * x))


# TFLite has none of these: the arcs by atan2, which it has; Tan, Sinh, Cosh and their inverses by what defines them
OPS.functions(
    Acos=lambda x: tf.atan2(_other_leg(x), x),
    Acosh=lambda x: tf.math.log(x + tf.sqrt((x - 1) * (x + 1))),
    Asin=lambda x: tf.atan2(x, _other_leg(x)),
    Asinh=_asinh,
    Atan=lambda x: tf.atan2(x, tf.ones_like(x)),
    Atanh=lambda x: (tf.math.log1p(x) - tf.math.log1p(-x)) / 2,
    Cosh=lambda x: (tf.exp(x) + tf.exp(-x)) / 2,
    Erf=_erf,
    Sinh=lambda x: (tf.math.expm1(x) - tf.math.expm1(-x)) / 2,
    Tan=lambda x: tf.sin(x) / tf.cos(x),
)

OPS.functions(
    Cos=tf.cos,
    IsNaN=tf.math.is_nan,
    Neg=tf.negative,
    Not=tf.logical_not,
    Reciprocal=tf.math.reciprocal,
    Sign=_sign,
    Sin=tf.sin,
    BitwiseNot=tf.bitwise.invert,
    Mish=lambda x: x * tf.tanh(tf.math.softplus(x)),
)


@OPS.elementwise("Equal")
def equal(a: Tensor, b: Tensor) -> Tensor:
    """An infinite constant is looked for as such: TFLite's converter makes the greatest float of it."""
    for x, other in ((a, b), (b, a)):
        constant = tf.get_static_value(other)
        if constant is not None and constant.dtype.kind == "f" and np.isinf(constant).any():
            above, below = x > x.dtype.max, x < x.dtype.min
            return tf.where(np.isinf(constant), tf.where(constant > 0, above, below), tf.equal(x, other))
    return tf.equal(a, b)


@OPS.elementwise("Div")
def divide(a: Tensor, b: Tensor) -> Tensor:
    """True division of floats; integers are truncated towards zero."""
    if a.dtype.is_floating or a.dtype.is_complex:
        return a / b
    quotient = floor_divided(a, b)  # not tf.truncatediv, which TensorFlow.js and TensorFlow Lite lack
    if a.dtype.is_unsigned:
        return quotient
    return quotient + tf.cast((quotient < 0) & (quotient * b != a), a.dtype)


@OPS.elementwise("Mod")
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the divisor, or with `fmod` that of the dividend."""
    if a.dtype in (tf.float16, tf.bfloat16):  # which TensorFlow has no kernel for
        return tf.cast(modulo(tf.cast(a, tf.float32), tf.cast(b, tf.float32), fmod=fmod), a.dtype)
    left = tf.math.floormod(a, b)
    # not tf.truncatemod, which TensorFlow.js and TensorFlow Lite lack
    return tf.where((left != 0) & ((a < 0) != (b < 0)), left - b, left) if fmod else left


@OPS.elementwise("BitShift")
def shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Bits move up or down; those that fall out are lost."""
    return tf.bitwise.left_shift(a, b) if direction == "LEFT" else tf.bitwise.right_shift(a, b)


@OPS.elementwise("IsInf")
def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Either sign can be left out."""
    # not tf.math.is_inf, see `equal`
    signs = ([x < x.dtype.min] if detect_negative else []) + ([x > x.dtype.max] if detect_positive else [])
    return functools.reduce(tf.logical_or, signs) if signs else tf.zeros_like(x, tf.bool)


@OPS.elementwise("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """By the error function, or by tanh."""
    if approximate == "tanh":
        return tf.nn.gelu(x, approximate=True)
    return 0.5 * x * (1 + tf.math.erf(x * np.sqrt(0.5).astype(x.dtype.as_numpy_dtype)))  # TensorFlow.js has no erfc


@OPS.op("BitCast")
def bitcast(x: Value, *, to: int) -> Tensor:
    """The same bits, counted as another type."""
    bits = tf.cast(x.tensor, tf.uint8) if x.dtype == np.bool_ else x.tensor
    dtype = tf.as_dtype(x.backend.type_of(to))
    return tf.cast(bits, tf.bool) if dtype == tf.bool else tf.bitcast(bits, dtype)


@OPS.op("CumSum")
def cumulative_sum(x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Along one axis, from either end."""
    return tf.cumsum(x.tensor, _from_start(x, axis), bool(exclusive), bool(reverse))


@OPS.op("CumProd")
def cumulative_product(x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Along one axis, from either end."""
    return tf.math.cumprod(x.tensor, _from_start(x, axis), bool(exclusive), bool(reverse))


def _from_start(x: Value, axis: Value) -> Tensor:
    """A known axis is counted from the first: TensorFlow.js takes a negative one for another."""
    return tf.cast(tf.reshape(axis.tensor, []), tf.int32) if axis.known is None else axis.known.item() % (x.rank or 1)


OPS.op("Det")(lambda x: tf.linalg.det(x.tensor))


@OPS.op("Multinomial")
def multinomial(x: Value, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes by their log probabilities."""
    drawn = tf.random.categorical(x.tensor, sample_size, seed=None if seed is None else int(seed))
    return tf.cast(drawn, tf.as_dtype(x.backend.type_of(dtype)))
