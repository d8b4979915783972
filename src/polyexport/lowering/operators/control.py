"""If, Loop, Scan, and the sequences and optionals that they and PyTorch's exporters pass around.

A sequence is a Python list while the graph is built, so its length must be known before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, State, Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED, Int
from polyexport.lowering.value import Value


@SHARED.op("If", narrow=True)
def if_(ops: Backend, condition: Value, *, then_branch: Any, else_branch: Any, node: Node) -> Any:
    """A constant condition chooses now; else both branches go into the graph."""
    if condition.known is not None:
        return tuple(node.run(then_branch if bool(condition.known.ravel()[0]) else else_branch, []))
    flag = ops.reshape(condition.tensor, [])
    return tuple(ops.cond(flag, lambda: _tensors(node, then_branch, []), lambda: _tensors(node, else_branch, [])))


def _tensors(node: Node, graph: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = node.run(graph, [node.value(each) for each in inputs])
    if not all(isinstance(each, Value) for each in found):
        raise node.unsupported("a branch whose condition is not known before the run returns a sequence")
    return [each.tensor for each in found]


@SHARED.op("Loop", narrow=True)
def loop(
    ops: Backend, count: Value | None, condition: Value | None, *carried: Any, body: Any, node: Node
) -> tuple[Any, ...]:
    """A loop that carries sequences and has a known number of iterations is unrolled; others run as a loop."""
    if any(not isinstance(each, Value) for each in carried):
        going = condition is None or (condition.known is not None and bool(condition.known.ravel()[0]))
        if count is None or count.known is None or not going:
            raise node.unsupported("it carries a sequence, and its number of iterations is not known before the run")
        return _unrolled(ops, int(count.known.item()), list(carried), body, node)
    most = np.array(np.iinfo(np.int64).max)
    limit = ops.constant(most) if count is None else ops.reshape(ops.cast(count.tensor, most.dtype), [])
    first = ops.constant(np.array(True)) if condition is None else ops.reshape(condition.tensor, [])

    def step(turn: Tensor, states: State) -> list[Tensor]:
        return _tensors(node, body, [turn, ops.constant(np.array(True)), *states])

    scans = len(body.output) - 1 - len(carried)
    states, outputs = ops.loop(limit, first, [each.tensor for each in carried], step, scans)
    return (*states, *outputs)


def _unrolled(ops: Backend, turns: int, carried: list[Any], body: Any, node: Node) -> tuple[Any, ...]:
    scanned: list[list[Tensor]] = []
    for turn in range(turns):
        flag, *found = node.run(body, [node.value(np.array(turn)), node.value(np.array(True)), *carried])
        if flag.known is None or not bool(flag.known):
            raise node.unsupported("it carries a sequence, and its condition is not known before the run")
        carried = found[: len(carried)]
        scanned.append([each.tensor for each in found[len(carried) :]])
    return (*carried, *(ops.stack(each, 0) for each in zip(*scanned, strict=True)))


@SHARED.op("Scan", since=9, narrow=True)
def scan(
    ops: Backend,
    *values: Value,
    body: Any,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
    node: Node,
) -> tuple[Any, ...]:
    """Scan along an axis of each scanned input; states keep their shape."""
    states = [each.tensor for each in values[: len(values) - num_scan_inputs]]
    scanned, count = values[len(states) :], len(body.output) - len(states)
    axes, turned = scan_input_axes or [0] * num_scan_inputs, scan_input_directions or [0] * num_scan_inputs
    rows = [_led(ops, each, axis, flag) for each, axis, flag in zip(scanned, axes, turned, strict=True)]

    def step(turn: Tensor, carried: State) -> list[Tensor]:
        return _tensors(node, body, [*carried, *(row[turn] for row in rows)])

    total = ops.scalar(ops.sizes(scanned[0])[axes[0]], np.int64)
    final, outputs = ops.loop(total, None, states, step, count)
    out_axes, out_turned = scan_output_axes or [0] * count, scan_output_directions or [0] * count
    placed = [_placed(ops, each, axis, flag) for each, axis, flag in zip(outputs, out_axes, out_turned, strict=True)]
    return (*final, *placed)


def _led(ops: Backend, x: Value, axis: int, turned: int) -> Tensor:
    """The tensor with an axis moved to the front, reversed if it is scanned backward."""
    rank = x.rank or 1
    led = x.permuted([axis % rank, *(i for i in range(rank) if i != axis % rank)]).tensor
    return ops.flip(led, [0]) if turned else led


def _placed(ops: Backend, tensor: Tensor, axis: int, turned: int) -> Tensor:
    """The tensor with its first axis at another position."""
    rank = len(ops.shape(tensor) or ())
    order = list(range(1, rank))
    order.insert(axis % rank, 0)
    tensor = ops.flip(tensor, [0]) if turned else tensor
    return tensor if order == sorted(order) else ops.transpose(tensor, order)


# --- sequences --------------------------------------------------------------------------------------------------------


_PASSED_ON: dict[str, Callable[..., Any]] = {
    "Identity": lambda value: value,
    "Optional": lambda value=None, *, type=None: value,
    "OptionalGetElement": lambda value: value,
    "OptionalHasElement": lambda value=None: np.array(value is not None),
    "SequenceConstruct": lambda *values: list(values),
    "SequenceEmpty": lambda *, dtype=1: [],
    "SequenceLength": lambda sequence: np.array(len(sequence), np.int64),
    "StopGradient": lambda value: value,
}
"""Operators that compute nothing with the tensors; an empty optional is None."""

for _name, _function in _PASSED_ON.items():
    SHARED.op(_name, narrow=True)(_function)


@SHARED.op("SequenceInsert", narrow=True)
def sequence_insert(sequence: list[Value], value: Value, position: Int | None = None) -> list[Value]:
    """Before a position, or at the end."""
    index = len(sequence) if position is None else position
    index = index + len(sequence) if index < 0 else index
    return [*sequence[:index], value, *sequence[index:]]


@SHARED.op("SequenceErase", narrow=True)
def sequence_erase(sequence: list[Value], position: Int | None = None) -> list[Value]:
    """At a position, or the last."""
    index = (-1 if position is None else position) % len(sequence)
    return [*sequence[:index], *sequence[index + 1 :]]


@SHARED.op("SequenceAt", narrow=True)
def sequence_at(ops: Backend, sequence: list[Value], position: Value) -> Any:
    """A position that is not known before the run needs tensors of one shape."""
    if position.known is not None:
        return sequence[int(position.known)]
    index = ops.reshape(position.tensor, [])
    index = ops.where(index < 0, index + len(sequence), index)
    return ops.stack([each.tensor for each in sequence], 0)[index]


@SHARED.op("SequenceMap", narrow=True)
def sequence_map(*inputs: Any, body: Any, node: Node) -> tuple[list[Value], ...]:
    """A graph applied to each tensor of a sequence; other inputs are the same every time."""
    found = []
    for index in range(len(inputs[0])):
        found.append(node.run(body, [each[index] if isinstance(each, list) else each for each in inputs]))
    return tuple(list(each) for each in zip(*found, strict=True))
