"""If, Loop, Scan and the sequences that they and PyTorch's exporters pass around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering import sequences
from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.target import OPS, sizes_of, static
from polyexport.lowering.value import Tensor, Value


@OPS.op("If")
def if_(condition: Value, *, then_branch: Any, else_branch: Any, node: Node) -> Any:
    """A condition that is known chooses now; else both branches go into the graph."""
    if condition.known is not None:
        return tuple(node.run(then_branch if bool(condition.known.ravel()[0]) else else_branch, []))
    flag = tf.reshape(condition.tensor, [])
    made = tf.cond(flag, lambda: _tensors(node, then_branch, []), lambda: _tensors(node, else_branch, []))
    return tuple(made)


def _tensors(node: Node, graph: Any, inputs: Sequence[Any]) -> list[Tensor]:
    found = node.run(graph, inputs)
    if not all(isinstance(each, Value) for each in found):
        raise node.unsupported("a sequence leaves a branch that only the run chooses")
    return [each.tensor for each in found]


@OPS.op("Loop")
def loop(count: Value | None, condition: Value | None, *carried: Any, body: Any, node: Node) -> Any:
    """A loop whose number of turns is known and that carries sequences is unrolled; others are a `while_loop`."""
    turns = static(count)
    going = condition is None or (condition.known is not None and bool(condition.known.ravel()[0]))
    if any(not isinstance(each, Value) for each in carried):
        if turns is None or not going:
            raise node.unsupported("it carries a sequence, and the number of turns is not known before the run")
        return _unrolled(turns[0], list(carried), body, node)
    limit = tf.constant(np.iinfo(np.int64).max) if count is None else tf.reshape(tf.cast(count.tensor, tf.int64), [])
    first = tf.constant(True) if condition is None else tf.reshape(condition.tensor, [])
    return _while(limit, first, [each.tensor for each in carried], body, node)


def _unrolled(turns: int, carried: list[Any], body: Any, node: Node) -> tuple[Any, ...]:
    scanned: list[list[Tensor]] = []
    for turn in range(turns):
        flag, *found = node.run(body, [node.value(np.array(turn)), node.value(np.array(True)), *carried])
        if flag.known is None or not bool(flag.known):
            raise node.unsupported("it carries a sequence, and its condition is not known before the run")
        carried = found[: len(carried)]
        scanned.append([each.tensor for each in found[len(carried) :]])
    return (*carried, *(tf.stack(each) for each in zip(*scanned, strict=True)))


def _while(limit: Tensor, first: Tensor, carried: list[Tensor], body: Any, node: Node) -> tuple[Any, ...]:
    kinds = _scans(limit, first, carried, body, node)

    def step(turn: Tensor, _: Tensor, states: list[Tensor], scans: list[Any]) -> tuple[Any, ...]:
        inputs = [node.value(each) for each in (turn, tf.constant(True), *states)]
        flag, *found = _tensors(node, body, inputs)
        new, outputs = found[: len(states)], found[len(states) :]
        places = tf.cast(turn, tf.int32)
        written = [scan.write(places, each) for scan, each in zip(scans, outputs, strict=True)]
        return turn + 1, tf.reshape(flag, []), new, written

    def invariants(loose: bool) -> Any:
        shapes = [
            tf.TensorShape([None] * each.shape.rank) if loose and each.shape.rank else each.shape for each in carried
        ]
        return tf.TensorShape([]), tf.TensorShape([]), shapes, [tf.TensorShape(None)] * len(kinds)

    def run(loose: bool) -> Any:
        # without clear_after_read=False a scan that is read twice would be gone
        scans = [
            tf.TensorArray(dtype, 0, dynamic_size=True, element_shape=shape, infer_shape=False)
            for dtype, shape in kinds
        ]
        start = (tf.constant(0, tf.int64), first, list(carried), scans)
        return tf.while_loop(
            lambda turn, flag, *_: tf.logical_and(turn < limit, flag), step, start, shape_invariants=invariants(loose)
        )

    try:
        _, _, states, scans = run(loose=False)
    except ValueError:  # a state changes its shape from turn to turn
        _, _, states, scans = run(loose=True)
    return (*states, *(scan.stack() for scan in scans))


def _scans(limit: Tensor, first: Tensor, carried: list[Tensor], body: Any, node: Node) -> list[tuple[Any, Any]]:
    """Type and shape of what each turn adds to the scan outputs, by lowering the body once beside the graph."""
    if len(body.output) == 1 + len(carried):
        return []

    def trial(turn: Tensor, *states: Tensor) -> list[Tensor]:
        return _tensors(node, body, [node.value(each) for each in (turn, tf.constant(True), *states)])

    loose = [tf.TensorSpec([None] * (each.shape.rank or 0), each.dtype) for each in carried]
    traced = tf.function(trial, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int64), *loose)
    return [(each.dtype, each.shape) for each in traced.outputs[1 + len(carried) :]]


@OPS.op("Scan", since=9)
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

    def step(state: tuple[list[Tensor], list[Tensor]], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = _tensors(node, body, [node.value(each) for each in (*state[0], *row)])
        return found[: len(states)], found[len(states) :]

    count = len(body.output) - len(states)
    total = sizes_of(scanned[0])[axes[0] % (scanned[0].rank or 1)]
    final, outputs = _walked(step, states, rows, total, count)
    out_axes, out_turned = scan_output_axes or [0] * count, scan_output_directions or [0] * count
    led = [_placed(each, axis, flag) for each, axis, flag in zip(outputs, out_axes, out_turned, strict=True)]
    return (*final, *led)


def _walked(
    step: Any, states: list[Tensor], rows: list[Tensor], total: Any, count: int
) -> tuple[list[Tensor], list[Tensor]]:
    types = [each.dtype for each in step((states, []), [row[0] for row in rows])[1]]
    arrays = [tf.TensorArray(dtype, total) for dtype in types]

    def body(i: Tensor, carried: list[Tensor], written: list[Any]) -> tuple[Any, ...]:
        new, outputs = step((carried, []), [row[i] for row in rows])
        return i + 1, new, [array.write(i, each) for array, each in zip(written, outputs, strict=True)]

    start = (tf.constant(0), states, arrays)
    loose = [tf.TensorShape([None] * each.shape.rank) for each in states]
    shapes = (tf.TensorShape([]), loose, [tf.TensorShape(None)] * len(arrays))
    _, final, arrays = tf.while_loop(lambda i, *_: i < total, body, start, shape_invariants=shapes)
    for each, before in zip(final, states, strict=True):
        each.set_shape(before.shape)
    return final, [array.stack() for array in arrays]


def _led(tensor: Tensor, axis: int, turned: int) -> Tensor:
    led = tf.experimental.numpy.moveaxis(tensor, axis, 0)
    return tf.reverse(led, [0]) if turned else led


def _placed(tensor: Tensor, axis: int, turned: int) -> Tensor:
    return tf.experimental.numpy.moveaxis(tf.reverse(tensor, [0]) if turned else tensor, 0, axis)


# --- sequences --------------------------------------------------------------------------------------------------------


sequences.declare(OPS.op)


@OPS.op("SequenceAt")
def sequence_at(sequence: list[Value], position: Value, *, node: Node) -> Any:
    """A position that only the run knows needs tensors of one shape."""
    if position.known is not None:
        return sequence[int(position.known)]
    place = tf.reshape(position.tensor, [])
    place = tf.where(place < 0, place + len(sequence), place)
    return tf.stack([each.tensor for each in sequence])[place]


@OPS.op("SplitToSequence")
def split_to_sequence(
    x: Value, sizes: Value | None = None, *, axis: int = 0, keepdims: int = 1, node: Node
) -> list[Value]:
    """Into pieces of one size, of the sizes given, or of 1."""
    total, where = sizes_of(x)[axis % (x.rank or 1)], x.placed(axis)
    if not isinstance(total, int):
        raise node.unsupported("how many tensors it makes is not known before the run")
    given = [1] if sizes is None else static(sizes)
    if given is None:
        raise node.unsupported("its sizes are not known before the run")
    if sizes is None or sizes.rank == 0:
        given = [min(given[0], total - start) for start in range(0, total, given[0])]
    parts = tf.split(x.stored, given, where)
    if sizes is None and not keepdims:
        return (
            [node.value(tf.squeeze(part, where)) for part in parts]
            if x.order is None
            else [node.value(tf.squeeze(node.value(part, x.order).tensor, axis)) for part in parts]
        )
    return [node.value(part, x.order) for part in parts]


@OPS.op("ConcatFromSequence")
def concat_from_sequence(sequence: list[Value], *, axis: int, new_axis: int = 0) -> Tensor:
    """Joined along an axis, a new one if asked for."""
    join = tf.stack if new_axis else tf.concat
    return join([each.tensor for each in sequence], axis)
