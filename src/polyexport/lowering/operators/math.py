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
from polyexport.lowering.value import Value

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


def _primitive(name: str) -> Function:
    return lambda ops, x: getattr(ops, name)(x)


_PRIMITIVES = ("Abs", "Ceil", "Exp", "Floor", "Log", "Relu", "Round", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh")
"""Operators that a primitive of the same name computes."""

FUNCTIONS: dict[str, Function] = {
    **{name: _primitive(name.lower()) for name in _PRIMITIVES},
    "Add": lambda ops, a, b: ops.add(a, b),
    "Affine": lambda ops, x, *, alpha=1.0, beta=0.0: alpha * x + beta,
    "Celu": lambda ops, x, *, alpha=1.0: ops.where(x < 0, alpha * ops.expm1(x / alpha), x),
    "Elu": lambda ops, x, *, alpha=1.0: ops.elu(x, alpha),
    "HardSigmoid": lambda ops, x, *, alpha=0.2, beta=0.5: ops.clip(alpha * x + beta, 0, 1),
    "HardSwish": lambda ops, x: x * ops.clip(x / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda ops, x, *, alpha=0.01: ops.leaky_relu(x, alpha),
    "PRelu": lambda ops, x, slope: ops.where(x < 0, slope * x, x),
    "ScaledTanh": lambda ops, x, *, alpha=1.0, beta=1.0: alpha * ops.tanh(beta * x),
    "Selu": lambda ops, x, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875: (
        gamma * ops.where(x > 0, x, alpha * ops.expm1(x))
    ),
    "Swish": lambda ops, x, *, alpha=1.0: x * ops.sigmoid(alpha * x),
    "ThresholdedRelu": lambda ops, x, *, alpha=1.0: ops.where(x > alpha, x, 0),
    "Where": lambda ops, condition, x, y: ops.where(condition, x, y),
}
"""Operators that one line computes, with ONNX's attributes and their defaults."""

for _name, _function in FUNCTIONS.items():
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
