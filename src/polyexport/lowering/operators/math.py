"""Operators that work element by element; most elementary functions are in each framework's folder."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor, is_float
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value, align

for _name, _function in {
    "And": operator.and_,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "BitwiseXor": operator.xor,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Mul": operator.mul,
    "Or": operator.or_,
    "Sub": operator.sub,
    "Xor": operator.xor,
}.items():
    SHARED.elementwise(_name)(_function)


Function = Callable[..., Tensor]

_FUNCTIONS: dict[str, Function] = {
    "Abs": lambda ops, x: ops.abs(x),
    "Add": lambda ops, a, b: ops.add(a, b),
    "Celu": lambda ops, x, *, alpha=1.0: ops.where(x < 0, alpha * ops.expm1(x / alpha), x),
    "Ceil": lambda ops, x: ops.ceil(x),
    "Elu": lambda ops, x, *, alpha=1.0: ops.elu(x, alpha),
    "Equal": lambda ops, a, b: ops.equal(a, b),
    "Exp": lambda ops, x: ops.exp(x),
    "Floor": lambda ops, x: ops.floor(x),
    "HardSigmoid": lambda ops, x, *, alpha=0.2, beta=0.5: ops.clip(alpha * x + beta, 0, 1),
    "HardSwish": lambda ops, x: x * ops.clip(x / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda ops, x, *, alpha=0.01: ops.leaky_relu(x, alpha),
    "Log": lambda ops, x: ops.log(x),
    "PRelu": lambda ops, x, slope: ops.where(x < 0, slope * x, x),
    "Relu": lambda ops, x: ops.relu(x),
    "Round": lambda ops, x: ops.round(x),
    "Selu": lambda ops, x, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875: (
        gamma * ops.where(x > 0, x, alpha * ops.expm1(x))
    ),
    "Sigmoid": lambda ops, x: ops.sigmoid(x),
    "Softplus": lambda ops, x: ops.softplus(x),
    "Softsign": lambda ops, x: ops.softsign(x),
    "Sqrt": lambda ops, x: ops.sqrt(x),
    "Swish": lambda ops, x, *, alpha=1.0: x * ops.sigmoid(alpha * x),
    "Tanh": lambda ops, x: ops.tanh(x),
    "ThresholdedRelu": lambda ops, x, *, alpha=1.0: ops.where(x > alpha, x, 0),
    "Where": lambda ops, condition, x, y: ops.where(condition, x, y),
}
"""Operators that one line computes, with ONNX's attributes and their defaults."""

for _name, _function in _FUNCTIONS.items():
    SHARED.elementwise(_name)(_function)


@SHARED.elementwise("Pow")
def power(ops: Backend, a: Tensor, b: Tensor) -> Tensor:
    """The result has the base's type, whatever the exponent's."""
    base, exponent = ops.dtype(a), ops.dtype(b)
    if base == exponent:
        return a**b
    if is_float(base) and not is_float(exponent):
        return a ** ops.cast(b, base)
    double = np.dtype(np.float64)
    wide = double if double in (base, exponent) or not is_float(exponent) else exponent
    return ops.cast(ops.cast(a, wide) ** ops.cast(b, wide), base)


@SHARED.elementwise("Shrink")
def shrink(ops: Backend, x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Shifted toward zero by `bias`; zero within `lambd`."""
    low, high, offset = (ops.full([], number, ops.dtype(x)) for number in (-lambd, lambd, bias))
    return ops.where(x < low, x + offset, ops.where(x > high, x - offset, 0))


def _variadic(combine: Callable[[Backend, Tensor, Tensor], Tensor]) -> Function:
    return lambda ops, *tensors: functools.reduce(functools.partial(combine, ops), tensors)


SHARED.elementwise("Max")(_variadic(lambda ops, a, b: ops.maximum(a, b)))
SHARED.elementwise("Min")(_variadic(lambda ops, a, b: ops.minimum(a, b)))
SHARED.elementwise("Sum")(_variadic(lambda ops, a, b: ops.add(a, b)))
SHARED.elementwise("Mean")(lambda ops, *tensors: functools.reduce(ops.add, tensors) / len(tensors))


def _is(bound: Value | None, number: float) -> bool:
    return bound is not None and bound.known is not None and bool((bound.known == number).all())


@SHARED.op("Clip")
def clip(ops: Backend, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """Either bound may be missing; if they cross, the upper one wins.

    Between 0 and 6 it is an operator that runtimes fuse to a convolution.
    """
    if _is(low, 0.0) and _is(high, 6.0) and is_float(x.dtype):
        return Value(ops, ops.relu6(x.stored), x.order)
    tensor = x.stored
    if low is not None:
        tensor = ops.maximum(tensor, low.tensor)
    if high is not None:
        tensor = ops.minimum(tensor, high.tensor)
    return Value(ops, tensor, x.order)


@SHARED.op("Cast", since=6, narrow=True)
def cast(ops: Backend, x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """Floats are truncated toward zero when cast to integers."""
    return x.cast(ops.type_of(to))


@SHARED.op("CastLike", narrow=True)
def cast_like(x: Value, other: Value, *, saturate: int = 1, round_mode: str = "up") -> Value:
    """To the type of another tensor."""
    return x.cast(other.dtype)


@SHARED.op("Dropout", narrow=True)
def dropout(
    ops: Backend, x: Value, ratio: Any = None, training: Value | None = None, *, seed: int = 0, node: Node
) -> Any:
    """The input itself, since a model is exported for inference.

    Raises:
        UnsupportedOp: it is in training mode.
    """
    if training is not None and (training.known is None or bool(training.known)):
        share = 0.5 if ratio is None else ratio.known
        if share is None or float(share) > 0:
            raise node.unsupported("it drops elements at random, since it is in training mode")
    return (x, ops.full(ops.sizes(x), True, np.dtype(bool))) if node.wants(1) else x


@SHARED.op("Identity", "StopGradient", narrow=True)
def identity(x: Any) -> Any:
    """The value itself; a sequence too."""
    return x


@SHARED.op("BatchNormalization")
def batch_normalization(
    ops: Backend,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    variance: Value,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    node: Node,
) -> Any:
    """One factor and one offset per channel; in training mode by the batch's own statistics."""
    per_channel = [-1] + [1] * ((x.rank or 2) - 2)
    if training_mode:
        return _trained(ops, x, scale, bias, mean, variance, epsilon, momentum)
    if all(each.known is not None for each in (scale, bias, mean, variance)):
        deviation = np.sqrt(variance.known.astype(np.float64) + epsilon)  # type: ignore[union-attr]  # the line above
        factor = scale.known / deviation
        offset = bias.known - mean.known * factor
        parts = [node.value(part.astype(x.dtype).reshape(per_channel)) for part in (factor, offset)]
    else:
        factor = scale.tensor / ops.sqrt(variance.tensor + epsilon)
        offset = bias.tensor - mean.tensor * factor
        parts = [node.value(ops.reshape(ops.cast(part, x.dtype), per_channel)) for part in (factor, offset)]
    (tensor, times, plus), order = align([x, *parts])
    return node.value(tensor * times + plus, order)


def _trained(
    ops: Backend, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, epsilon: float, momentum: float
) -> Any:
    data, per_channel = x.tensor, [-1] + [1] * ((x.rank or 2) - 2)
    others = [axis for axis in range(x.rank or 2) if axis != 1]
    now = ops.mean(data, others, True)
    centered = data - now
    spread = ops.mean(centered * centered, others, True)
    normal = centered / ops.sqrt(spread + epsilon)
    running = [
        old.tensor * momentum + ops.reshape(new, [-1]) * (1 - momentum)
        for old, new in ((mean, now), (variance, spread))
    ]
    times, plus = (ops.reshape(each.tensor, per_channel) for each in (scale, bias))
    return (normal * times + plus, *running)
