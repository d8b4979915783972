"""Loops, as TensorFlow has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from polyexport.lowering.backend import State, Tensor


def loop(
    limit: Tensor, first: Tensor | None, states: State, step: Callable[[Tensor, State], list[Tensor]], scans: int
) -> tuple[State, list[Tensor]]:
    """By a `while_loop`, whose states keep their shapes unless a turn changes one."""
    kinds = _scanned(states, step, scans, int(first is not None))

    def body(turn: Tensor, flag: Tensor, states: State, arrays: list[Any]) -> tuple[Any, ...]:
        found = step(turn, states)
        flag, found = (flag, found) if first is None else (tf.reshape(found[0], []), found[1:])
        written = [
            array.write(tf.cast(turn, tf.int32), each) for array, each in zip(arrays, found[len(states) :], strict=True)
        ]
        return turn + 1, flag, found[: len(states)], written

    def run(loose: bool) -> Any:
        shapes = [
            tf.TensorShape([None] * each.shape.rank) if loose and each.shape.rank else each.shape for each in states
        ]
        # without clear_after_read=False a scan that is read twice would be gone
        size = 0 if first is not None else tf.cast(limit, tf.int32)
        arrays = [
            tf.TensorArray(dtype, size, dynamic_size=first is not None, element_shape=shape, infer_shape=False)
            for dtype, shape in kinds
        ]
        start = (tf.constant(0, tf.int64), tf.constant(True) if first is None else first, list(states), arrays)
        invariants = (tf.TensorShape([]), tf.TensorShape([]), shapes, [tf.TensorShape(None)] * scans)
        return tf.while_loop(
            lambda turn, flag, *_: tf.logical_and(turn < limit, flag) if first is not None else turn < limit,
            body,
            start,
            shape_invariants=invariants,
        )

    try:
        _, _, final, arrays = run(loose=False)
    except ValueError:  # a state changes its shape from turn to turn
        _, _, final, arrays = run(loose=True)
    return final, [array.stack() for array in arrays]


def _scanned(states: State, step: Callable[..., list[Tensor]], scans: int, flags: int) -> list[tuple[Any, Any]]:
    """Type and shape of what each turn adds to the scan outputs, by building the body once beside the graph."""
    if not scans:
        return []
    loose = [tf.TensorSpec([None] * (each.shape.rank or 0) if flags else each.shape, each.dtype) for each in states]
    trial = tf.function(lambda turn, *states: step(turn, list(states)), autograph=False)
    traced = trial.get_concrete_function(tf.TensorSpec([], tf.int64), *loose)
    return [(each.dtype, each.shape) for each in traced.outputs[flags + len(states) :]]


def steps(x: Tensor, states: State, step: Callable[[Any, Tensor, State], tuple[Tensor, State]]) -> tuple[Tensor, State]:
    """By a `while_loop` over the rows, whose states keep their shapes."""

    def body(i: Tensor, outputs: tf.TensorArray, *states: Tensor) -> tuple[Any, ...]:
        output, new = step(i, x[i], list(states))
        return i + 1, outputs.write(i, output), *new

    total, batch = tf.shape(x)[0], x.shape[1]  # TFLite wants the batch known, where it is
    outputs = tf.TensorArray(x.dtype, total, element_shape=[batch, states[0].shape[-1]])
    widths = [tf.TensorShape([batch, each.shape[-1]]) for each in states]
    shapes = [tf.TensorShape([]), tf.TensorShape(None), *widths]
    start = [tf.constant(0), outputs, *states]
    _, outputs, *final = tf.while_loop(lambda i, *_: i < total, body, start, shape_invariants=shapes)
    return outputs.stack(), list(final)
