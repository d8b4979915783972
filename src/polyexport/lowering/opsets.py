"""Converts older forms of operators to the newest, so that each operator has one function.

Attributes that became inputs are converted to constant inputs; a second input with an `axis` attribute gets trailing
axes of size 1; attributes that have no effect anymore are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyexport.lowering.value import Value

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

_BECAME_INPUTS: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "Clip": (11, {"min": 1, "max": 2}),
    "DFT": (20, {"axis": 2}),
    "Pad": (11, {"pads": 1, "value": 2}),
    "ReduceSum": (13, {"axes": 1}),
    "Slice": (10, {"starts": 1, "ends": 2, "axes": 3}),
    "Split": (13, {"split": 1}),
    "Squeeze": (13, {"axes": 1}),
    "TopK": (10, {"k": 1}),
    "Unsqueeze": (13, {"axes": 1}),
    "Upsample": (9, {"scales": 1}),
    **{f"Reduce{name}": (18, {"axes": 1}) for name in _REDUCTIONS},
}
"""For each operator, the opset since which attributes are inputs, and the positions of those."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"DFT": {"axis": 1}}
"""Operators for which a missing attribute differs from a missing input."""

_OF_THE_DATA = {"min", "max", "value"}
"""Attributes that become inputs of the first input's type."""

_AT_AN_AXIS = {"Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor"}
"""Operators whose second input was aligned by an `axis` before opset 7."""


def current(
    op: str, version: int, inputs: list[Any], attributes: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """Inputs and attributes of a node in the newest opset's form."""
    given = {name: content for name, content in attributes.items() if name not in ("consumed_inputs", "is_test")}
    inputs = list(inputs)
    until, positions = _BECAME_INPUTS.get(op, (0, {}))
    if version < until:
        given = {**_DEFAULTS.get(op, {}), **given}
        for name in [name for name in positions if name in given]:
            _put(inputs, positions[name], _constant(name, given.pop(name), inputs[0]))
    if version < 7 and op in _AT_AN_AXIS:
        axis, broadcast = given.pop("axis", None), given.pop("broadcast", 0)
        inputs[1] = _at_axis(inputs[0], inputs[1], axis) if broadcast and axis is not None else inputs[1]
    if version < 7 and op == "PRelu" and inputs[1].rank == 1:
        inputs[1] = _at_axis(inputs[0], inputs[1], 1)
    return inputs, given


def _put(inputs: list[Any], position: int, value: Value) -> None:
    inputs.extend([None] * (position + 1 - len(inputs)))
    inputs[position] = value


def _constant(name: str, content: Any, x: Value) -> Value:
    dtype = x.dtype if name in _OF_THE_DATA else np.float32 if name == "scales" else np.int64
    return Value(x.backend, known=np.asarray(content, dtype))


def _at_axis(x: Value, other: Value, axis: int) -> Value:
    """The second input with trailing axes of size 1, as many as the first one has after the aligned axes."""
    rank, own = x.rank or 0, other.rank or 0
    behind = range(own, rank - axis % max(rank, 1))
    if other.known is not None:
        return Value(other.backend, known=other.known.reshape(other.known.shape + (1,) * len(behind)))
    return Value(other.backend, other.backend.unsqueeze(other.tensor, behind)) if behind else other
