"""The operators of sequences and optionals that are the same whatever the target.

A sequence is a Python list while the graph is built: how many tensors it has must be known before the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polyexport.lowering.graph import Node
from polyexport.lowering.operators import Function
from polyexport.lowering.value import Value, static


def declare(op: Callable[..., Callable[[Function], Function]]) -> None:
    """Write them into a target's table, by its own decorator."""
    for name, function in _TABLE.items():
        op(name)(function)


def sequence_empty(*, dtype: int = 1) -> list[Value]:
    """None yet."""
    return []


def sequence_construct(*values: Value) -> list[Value]:
    """As given."""
    return list(values)


def sequence_length(sequence: list[Value]) -> np.ndarray:
    """Known now."""
    return np.array(len(sequence), np.int64)


def _position(position: Value | None, default: int, node: Node) -> int:
    if position is None:
        return default
    known = static(position)
    if known is None:
        raise node.unsupported("its position is not known before the run")
    return known[0]


def sequence_insert(sequence: list[Value], value: Value, position: Value | None = None, *, node: Node) -> list[Value]:
    """Before a position, or at the end."""
    place = _position(position, len(sequence), node)
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], value, *sequence[place:]]


def sequence_erase(sequence: list[Value], position: Value | None = None, *, node: Node) -> list[Value]:
    """At a position, or the last."""
    place = _position(position, len(sequence) - 1, node) % len(sequence)
    return [*sequence[:place], *sequence[place + 1 :]]


def sequence_map(*inputs: Any, body: Any, node: Node) -> Any:
    """A graph on each tensor of a sequence; inputs that are no sequence are the same every time."""
    found = []
    for index in range(len(inputs[0])):
        found.append(node.run(body, [each[index] if isinstance(each, list) else each for each in inputs]))
    return tuple(list(each) for each in zip(*found, strict=True))


def optional(value: Any = None, *, type: Any = None) -> Any:
    """The value itself, or nothing."""
    return value


def optional_has_element(value: Any = None) -> np.ndarray:
    """Known now."""
    return np.array(value is not None)


def optional_get_element(value: Any) -> Any:
    """The value itself."""
    return value


_TABLE: dict[str, Function] = {
    "SequenceEmpty": sequence_empty, "SequenceConstruct": sequence_construct, "SequenceLength": sequence_length,
    "SequenceInsert": sequence_insert, "SequenceErase": sequence_erase, "SequenceMap": sequence_map,
    "Optional": optional, "OptionalHasElement": optional_has_element, "OptionalGetElement": optional_get_element,
}  # fmt: skip  # a table, read as one
