"""If, Loop, Scan and the sequences that they and PyTorch's exporters pass around."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle

from polyexport.lowering import sequences
from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.shape import pieces
from polyexport.lowering.paddle.target import OPS, numpy_dtype, sizes_of, static, told
from polyexport.lowering.value import Tensor, Value


@OPS.op("If", narrow=True)
def if_(condition: Value, *, then_branch: Any, else_branch: Any, node: Node) -> Any:
    """A condition that is known chooses now; else both branches go into the graph."""
    if condition.known is not None:
        return tuple(node.run(then_branch if bool(condition.known.ravel()[0]) else else_branch, []))
    flag = paddle.reshape(condition.tensor, [])
    made = paddle.static.nn.cond(
        flag, *(functools.partial(_tensors, node, each, []) for each in (then_branch, else_branch))
    )
    return tuple(made) if isinstance(made, list | tuple) else made


def _tensors(node: Node, graph: Any, inputs: Sequence[Any]) -> list[Tensor]:
    found = node.run(graph, inputs)
    if not all(isinstance(each, Value) for each in found):
        raise node.unsupported("a sequence leaves a branch that only the run chooses")
    return [paddle.assign(each.tensor) for each in found]


@OPS.op("Loop", narrow=True)
def loop(count: Value | None, condition: Value | None, *carried: Any, body: Any, node: Node) -> Any:
    """A loop whose number of turns is known and that carries sequences is unrolled; others are a `while_loop`."""
    turns = static(count)
    going = condition is None or (condition.known is not None and bool(condition.known.ravel()[0]))
    if any(not isinstance(each, Value) for each in carried):
        if turns is None or not going:
            raise node.unsupported("it carries a sequence, and the number of turns is not known before the run")
        return _unrolled(turns[0], list(carried), body, node)
    limit = node.value(np.array(np.iinfo(np.int64).max)).tensor if count is None else paddle.reshape(count.tensor, [])
    first = _flag(True) if condition is None else paddle.reshape(condition.tensor, [])

    def step(turn: Tensor, states: list[Tensor]) -> list[Tensor]:
        return _tensors(node, body, [node.value(each) for each in (turn, _flag(True), *states)])

    states, scans = _while(limit, first, [each.tensor for each in carried], step, len(body.output) - 1 - len(carried))
    return (*states, *scans)


def _flag(content: bool) -> Tensor:
    return paddle.full([], content, "bool")


def _unrolled(turns: int, carried: list[Any], body: Any, node: Node) -> tuple[Any, ...]:
    scanned: list[list[Tensor]] = []
    for turn in range(turns):
        flag, *found = node.run(body, [node.value(np.array(turn)), node.value(np.array(True)), *carried])
        if flag.known is None or not bool(flag.known):
            raise node.unsupported("it carries a sequence, and its condition is not known before the run")
        carried = found[: len(carried)]
        scanned.append([each.tensor for each in found[len(carried) :]])
    return (*carried, *(paddle.stack(each) for each in zip(*scanned, strict=True)))


def _while(
    limit: Tensor, first: Tensor, states: list[Tensor], step: Callable[..., list[Tensor]], scans: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Turns while any are left and the flag, the first that a step gives, is set; the scan outputs are stacked."""
    arrays: list[Any] = []

    def going(turn: Tensor, flag: Tensor, *_: Tensor) -> Tensor:
        return paddle.logical_and(turn < limit, flag)

    def body(turn: Tensor, _: Tensor, *carried: Tensor) -> list[Tensor]:
        flag, *found = step(turn, list(carried))
        for array, each in zip(arrays, found[len(carried) :], strict=True):
            paddle.tensor.array_write(each, turn, array)
        return [turn + 1, paddle.reshape(flag, []), *found[: len(carried)]]

    arrays += [paddle.tensor.create_array(kind) for kind in _kinds(step, states, scans)]
    start = [paddle.zeros([], "int64"), paddle.assign(first), *(paddle.assign(each) for each in states)]
    _, _, *final = paddle.static.nn.while_loop(going, body, start)
    return final, [paddle.tensor.manipulation.tensor_array_to_tensor(array, 0, True)[0] for array in arrays]


def _kinds(step: Callable[..., list[Tensor]], states: list[Tensor], scans: int) -> list[str]:
    """The types of what each turn adds to the scan outputs, by building the body once beside the graph."""
    if not scans:
        return []
    with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        turn = paddle.zeros([], "int64")
        inputs = [paddle.static.data(f"state{i}", each.shape, each.dtype) for i, each in enumerate(states)]
        return [numpy_dtype(each.dtype).name for each in step(turn, inputs)[1 + len(states) :]]


@OPS.op("Scan", since=9, narrow=True)
def scan(
    *values: Value, body: Any, num_scan_inputs: int, scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None, scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None, node: Node,
) -> Any:  # fmt: skip  # three lines are enough
    """Along an axis of each scanned input, states carried on; states keep their shape."""
    states = [each.tensor for each in values[: len(values) - num_scan_inputs]]
    scanned = values[len(states) :]
    axes, turned = scan_input_axes or [0] * num_scan_inputs, scan_input_directions or [0] * num_scan_inputs
    rows = [_led(each.tensor, axis, flag) for each, axis, flag in zip(scanned, axes, turned, strict=True)]

    def step(turn: Tensor, carried: list[Tensor]) -> list[Tensor]:
        inputs = [*carried, *(row[turn] for row in rows)]
        return [_flag(True), *_tensors(node, body, [node.value(each) for each in inputs])]

    count = len(body.output) - len(states)
    total = sizes_of(scanned[0])[axes[0] % (scanned[0].rank or 1)]
    limit = paddle.full([], total, "int64") if isinstance(total, int) else total
    final, outputs = _while(limit, _flag(True), states, step, count)
    final = [told(each, [None if s < 0 else s for s in state.shape]) for each, state in zip(final, states, strict=True)]
    out_axes, out_turned = scan_output_axes or [0] * count, scan_output_directions or [0] * count
    led = [_placed(each, axis, flag) for each, axis, flag in zip(outputs, out_axes, out_turned, strict=True)]
    return (*final, *led)


def _led(tensor: Tensor, axis: int, turned: int) -> Tensor:
    led = paddle.moveaxis(tensor, axis, 0)
    return paddle.flip(led, [0]) if turned else led


def _placed(tensor: Tensor, axis: int, turned: int) -> Tensor:
    return paddle.moveaxis(paddle.flip(tensor, [0]) if turned else tensor, 0, axis)


# --- sequences --------------------------------------------------------------------------------------------------------

sequences.declare(functools.partial(OPS.op, narrow=True))


@OPS.op("SequenceAt", narrow=True)
def sequence_at(sequence: list[Value], position: Value) -> Any:
    """A position that only the run knows needs tensors of one shape."""
    if position.known is not None:
        return sequence[int(position.known)]
    place = paddle.reshape(position.tensor, [])
    place = paddle.where(place < 0, place + len(sequence), place)
    return paddle.stack([each.tensor for each in sequence])[place]


@OPS.op("SplitToSequence")
def split_to_sequence(
    x: Value, sizes: Value | None = None, *, axis: int = 0, keepdims: int = 1, node: Node
) -> list[Value]:
    """Into pieces of one size, of the sizes given, or of 1."""
    axis = axis % (x.rank or 1)
    total = sizes_of(x)[axis]
    if not isinstance(total, int):
        raise node.unsupported("how many tensors it makes is not known before the run")
    given = [1] if sizes is None else static(sizes)
    if given is None:
        raise node.unsupported("its sizes are not known before the run")
    if sizes is None or sizes.rank == 0:
        given = [min(given[0], total - start) for start in range(0, total, given[0])]
    parts = pieces(x.tensor, given, axis)
    if sizes is None and not keepdims:
        parts = [paddle.squeeze(part, axis) for part in parts]
    return [node.value(part) for part in parts]


@OPS.op("ConcatFromSequence", narrow=True)
def concat_from_sequence(sequence: list[Value], *, axis: int, new_axis: int = 0) -> Tensor:
    """Joined along an axis, a new one if asked for."""
    join = paddle.stack if new_axis else paddle.concat
    return join([each.tensor for each in sequence], axis)
