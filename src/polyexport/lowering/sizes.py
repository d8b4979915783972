"""Tracks the contents of shapes, element by element, through the operators that models compute shapes with.

A rule maps what is known of a node's inputs to what is known of its output: an object array of `int` and None.
A rule may raise any error of numpy if it does not apply; then nothing is known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from polyexport.lowering.value import Sizes, Value

Rule = Callable[..., Any]


def infer(op: str, inputs: list[Value | None], attributes: Mapping[str, Any]) -> Sizes | None:
    """What is known of the integers that a node computes; None if nothing is."""
    rule = _RULES.get(op)
    if rule is None:
        return None
    try:
        found = np.asarray(rule(*inputs, **attributes), dtype=object)
    except (TypeError, ValueError, IndexError, AttributeError):
        return None
    return found if found.ndim <= 1 and any(entry is not None for entry in found.ravel()) else None


def _slice(x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None) -> Any:
    step = 1 if steps is None else int(steps.known[0])  # type: ignore[index]  # None raises, which is the contract
    return x.sizes[int(starts.known[0]) : int(ends.known[0]) : step]  # type: ignore[index]  # the same


def _concat(*parts: Value, axis: int) -> Any:
    entries = [_objects([None] * part.shape[0]) if part.sizes is None else part.sizes for part in parts]  # type: ignore[index,operator]
    return np.concatenate([np.asarray(each, dtype=object) for each in entries])


def _arithmetic(apply: Callable[[int, int], int]) -> Rule:
    def both(left: int | None, right: int | None) -> int | None:
        return None if left is None or right is None else apply(int(left), int(right))

    return lambda left, right: np.frompyfunc(both, 2, 1)(left.sizes.astype(object), right.sizes.astype(object))


def _objects(entries: Any) -> Sizes:
    found = np.empty(len(entries), dtype=object)
    found[:] = entries
    return found


_RULES: Mapping[str, Rule] = {
    "Shape": lambda x, *, start=0, end=None: _objects(x.shape)[start:end],
    "Size": lambda x: math.prod(x.shape),
    "Gather": lambda x, indices, *, axis=0: np.take(x.sizes, indices.known, axis=axis),
    "Slice": _slice,
    "Concat": _concat,
    "Reshape": lambda x, shape, *, allowzero=0: x.sizes.reshape(shape.known),
    "Identity": lambda x: x.sizes,
    "Cast": lambda x, *, to, saturate=1, round_mode="up": x.sizes,
    "Unsqueeze": lambda x, axes: x.sizes.ravel(),
    "Squeeze": lambda x, axes=None: x.sizes.reshape(()),
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _arithmetic(lambda left, right: int(left / right)),  # ONNX's integer division truncates
}
