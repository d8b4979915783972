"""The loop over time of LSTM, GRU and RNN: unrolled where it is short and of known length, else a `while_loop`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from polyexport.lowering.recurrent import UNROLLED, Loops, State, Step, declare
from polyexport.lowering.tensorflow.index import reversed_within
from polyexport.lowering.tensorflow.target import OPS, sizes_of, told
from polyexport.lowering.value import Tensor


def _activation(name: str, alpha: Any, beta: Any) -> Callable[[Tensor], Tensor]:
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": tf.nn.relu,
        "tanh": tf.tanh,
        "sigmoid": tf.sigmoid,
        "softsign": tf.nn.softsign,
        "softplus": tf.math.softplus,
        "affine": lambda x: alpha * x + beta,
        "leakyrelu": lambda x: tf.nn.leaky_relu(x, alpha),
        "thresholdedrelu": lambda x: tf.where(x > alpha, x, tf.zeros_like(x)),
        "scaledtanh": lambda x: alpha * tf.tanh(beta * x),
        "hardsigmoid": lambda x: tf.clip_by_value(alpha * x + beta, 0, 1),
        "elu": lambda x: tf.where(x < 0, alpha * tf.math.expm1(x), x),
    }
    return found[name]


def _scan(x: Tensor, state: State, step: Step, lengths: Tensor | None) -> tuple[Tensor, State]:
    def masked(i: Any, row: Tensor, old: State) -> tuple[Tensor, State]:
        new = step(row, old)
        if lengths is None:
            return new[0], new
        alive = (i < lengths)[:, None]
        kept = [tf.where(alive, each, before) for each, before in zip(new, old, strict=True)]
        return tf.where(alive, new[0], tf.zeros_like(new[0])), kept

    count = x.shape[0]
    if count is not None and count <= UNROLLED:
        outputs = []
        for i in range(count):
            output, state = masked(i, x[i], state)
            outputs.append(output)
        return tf.stack(outputs), state

    def body(i: Tensor, outputs: tf.TensorArray, *states: Tensor) -> tuple[Any, ...]:
        output, new = masked(i, x[i], list(states))
        return i + 1, outputs.write(i, output), *new

    total = tf.shape(x)[0]
    batch = x.shape[1]  # TFLite wants it known, where it is
    outputs = tf.TensorArray(x.dtype, total, element_shape=[batch, state[0].shape[-1]])
    widths = [tf.TensorShape([batch, each.shape[-1]]) for each in state]
    shapes = [tf.TensorShape([]), tf.TensorShape(None), *widths]
    start = [tf.constant(0), outputs, *state]
    _, outputs, *state = tf.while_loop(lambda i, *_: i < total, body, start, shape_invariants=shapes)
    return outputs.stack(), state


def _flip(x: Tensor, lengths: Tensor | None) -> Tensor:
    return tf.reverse(x, [0]) if lengths is None else reversed_within(x, lengths, 0, 1)


def _state(given: Tensor | None, batch: Any, width: int, dtype: Any) -> Tensor:
    if given is None:
        return tf.zeros([batch, width], dtype)
    return told(given, [batch if isinstance(batch, int) else None, width])


declare(
    OPS,
    Loops(
        activation=_activation,
        clip=lambda x, limit: tf.clip_by_value(x, -limit, limit),
        split=lambda x, count: tf.split(x, count, -1),
        stack=lambda tensors, axis: tf.stack(tensors, axis),
        flip=_flip,
        scan=_scan,
        state=_state,
        lengths=lambda value: tf.cast(value.tensor, tf.int32),
        sizes=sizes_of,
    ),
)
