"""LSTM, GRU and RNN: a loop over time for each direction.

Short sequences of known length are unrolled, which every runtime runs and runs faster; others are a `while_loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from polyexport.lowering.tensorflow.target import OPS, sizes_of, told
from polyexport.lowering.value import Tensor, Value

State = list[Tensor]
Step = Callable[[Tensor, State], State]

_UNROLLED = 32
"""Steps up to which a sequence is unrolled."""


def _activation(name: str, alpha: float | None, beta: float | None) -> Callable[[Tensor], Tensor]:
    def or_(value: float | None, default: float) -> float:
        return default if value is None else value

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": tf.nn.relu,
        "tanh": tf.tanh,
        "sigmoid": tf.sigmoid,
        "softsign": tf.nn.softsign,
        "softplus": tf.math.softplus,
        "affine": lambda x: or_(alpha, 1.0) * x + or_(beta, 0.0),
        "leakyrelu": lambda x: tf.nn.leaky_relu(x, or_(alpha, 0.01)),
        "thresholdedrelu": lambda x: tf.where(x > or_(alpha, 1.0), x, tf.zeros_like(x)),
        "scaledtanh": lambda x: or_(alpha, 1.0) * tf.tanh(or_(beta, 1.0) * x),
        "hardsigmoid": lambda x: tf.clip_by_value(or_(alpha, 0.2) * x + or_(beta, 0.5), 0, 1),
        "elu": lambda x: tf.where(x < 0, or_(alpha, 1.0) * tf.math.expm1(x), x),
    }
    return found[name.lower()]


def _activations(names: Sequence[str], alphas: list[float], betas: list[float]) -> list[Callable[[Tensor], Tensor]]:
    """Functions for one direction; ONNX lists parameters only for the functions that have them, in order."""
    alphas, betas = list(alphas), list(betas)
    with_alpha = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
    with_beta = {"affine", "scaledtanh", "hardsigmoid"}
    return [
        _activation(
            name,
            alphas.pop(0) if alphas and name.lower() in with_alpha else None,
            betas.pop(0) if betas and name.lower() in with_beta else None,
        )
        for name in names
    ]


def _clipped(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else tf.clip_by_value(x, -limit, limit)


def _scan(x: Tensor, state: State, step: Step, lengths: Tensor | None) -> tuple[Tensor, State]:
    """Run `step` along the first axis; the first state after each step, and the last states.

    Beyond its length a sequence keeps its state, and its output is zero.
    """

    def masked(i: Any, row: Tensor, old: State) -> tuple[Tensor, State]:
        new = step(row, old)
        if lengths is None:
            return new[0], new
        alive = (i < lengths)[:, None]
        kept = [tf.where(alive, each, before) for each, before in zip(new, old, strict=True)]
        return tf.where(alive, new[0], tf.zeros_like(new[0])), kept

    count = x.shape[0]
    if count is not None and count <= _UNROLLED:
        outputs = []
        for i in range(count):
            output, state = masked(i, x[i], state)
            outputs.append(output)
        return tf.stack(outputs), state

    def body(i: Tensor, outputs: tf.TensorArray, *states: Tensor) -> tuple[Any, ...]:
        output, new = masked(i, x[i], list(states))
        return i + 1, outputs.write(i, output), *new

    total = tf.shape(x)[0]
    outputs = tf.TensorArray(x.dtype, total, element_shape=[None, state[0].shape[-1]])
    widths = [tf.TensorShape([None, each.shape[-1]]) for each in state]
    shapes = [tf.TensorShape([]), tf.TensorShape(None), *widths]
    start = [tf.constant(0), outputs, *state]
    _, outputs, *state = tf.while_loop(lambda i, *_: i < total, body, start, shape_invariants=shapes)
    return outputs.stack(), state


def _directions(
    x: Value, lengths: Value | None, states: list[Value | None], width: int, direction: str, layout: int,
    make: Callable[[int], tuple[Callable[[Tensor], Tensor], Step]],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip  # the data on one line, the functions on the next
    """Each direction by itself; `make` gives what is done for all steps at once, and the step.

    Returns:
        `(time, directions, batch, width)` and for each state `(directions, batch, width)`, or with `layout` 1
        `(batch, time, directions, width)` and `(batch, directions, width)`.
    """
    data = x.permuted((1, 0, 2)).tensor if layout else x.tensor
    batch = sizes_of(x)[0 if layout else 1]
    long = None if lengths is None else tf.cast(lengths.tensor, tf.int32)
    outputs, ends = [], []
    for index in range(2 if direction == "bidirectional" else 1):
        backward = direction == "reverse" or index == 1
        initial = [_initial(each, index, batch, width, data.dtype, layout) for each in states]
        ahead, step = make(index)
        rows = ahead(_turned(data, long) if backward else data)
        output, state = _scan(rows, initial, step, long)
        outputs.append(_turned(output, long) if backward else output)
        ends.append(state)
    axis = 1 if layout else 0
    made = tf.transpose(tf.stack(outputs), [2, 1, 0, 3] if layout else [1, 0, 2, 3])
    return made, [tf.stack(each, axis) for each in zip(*ends, strict=True)]


def _turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    return tf.reverse(x, [0]) if lengths is None else tf.reverse_sequence(x, lengths, seq_axis=0, batch_axis=1)


def _initial(value: Value | None, index: int, batch: Any, width: int, dtype: Any, layout: int) -> Tensor:
    if value is None:
        return tf.zeros([batch, width], dtype)
    return told(value.tensor[:, index] if layout else value.tensor[index], [None, width])


def _part(value: Value | None, index: int, transposed: bool = False) -> Any:
    """One direction's share of a weight; of a known one it is cut now."""
    if value is None:
        return None
    if value.known is not None:
        part = value.known[index]
        return value.framework.constant(part.T if transposed else part)
    part = value.tensor[index]
    return tf.transpose(part) if transposed else part


def _ahead(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The inputs' share of the gates, for all steps in one product."""

    def apply(x: Tensor) -> Tensor:
        made = tf.matmul(x, weight) if bias is None else tf.matmul(x, weight) + bias
        made.set_shape([x.shape[0], x.shape[1], weight.shape[-1]])
        return made

    return apply


def _share(names: list[str] | None, default: list[str], index: int) -> list[str]:
    """One direction's activation functions."""
    count = len(default)
    return (names or default * 2)[index * count : (index + 1) * count] or default


def _parameters(values: list[float] | None, index: int, direction: str) -> list[float]:
    """One direction's parameters of its activation functions."""
    if not values or direction != "bidirectional":
        return values or []
    half = len(values) // 2
    return values[index * half : (index + 1) * half] if half else values


@OPS.op("LSTM", since=7)
def lstm(
    x: Value, w: Value, r: Value, b: Value | None = None, lengths: Value | None = None, initial_h: Value | None = None,
    initial_c: Value | None = None, p: Value | None = None,
    *, activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, input_forget: int = 0, layout: int = 0,
) -> Any:  # fmt: skip  # the inputs on two lines, the attributes on three
    """Gates lie in the order input, output, forget, cell."""
    width = hidden_size or int((r.shape or ())[-1])  # type: ignore[arg-type]  # static

    def make(index: int) -> tuple[Callable[[Tensor], Tensor], Step]:
        names = _share(activations, ["Sigmoid", "Tanh", "Tanh"], index)
        alphas, betas = (_parameters(each, index, direction) for each in (activation_alpha, activation_beta))
        f, g, h = _activations(names, alphas, betas)
        recurrent, bias, peep = _part(r, index, True), _part(b, index), _part(p, index)
        both = None if bias is None else bias[: 4 * width] + bias[4 * width :]

        def step(row: Tensor, state: State) -> State:
            hidden, cell = state
            i, o, forget, c = tf.split(row + tf.matmul(hidden, recurrent), 4, -1)
            if peep is not None:
                i, forget = i + peep[:width] * cell, forget + peep[2 * width :] * cell
            i = f(_clipped(i, clip))
            forget = 1 - i if input_forget else f(_clipped(forget, clip))
            cell = forget * cell + i * g(_clipped(c, clip))
            o = o if peep is None else o + peep[width : 2 * width] * cell
            return [f(_clipped(o, clip)) * h(cell), cell]

        return _ahead(_part(w, index, True), both), step

    made, (hidden, cell) = _directions(x, lengths, [initial_h, initial_c], width, direction, layout, make)
    return made, hidden, cell


@OPS.op("GRU", since=7)
def gru(
    x: Value, w: Value, r: Value, b: Value | None = None, lengths: Value | None = None, initial_h: Value | None = None,
    *, activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, linear_before_reset: int = 0, layout: int = 0,
) -> Any:  # fmt: skip  # the inputs on one line, the attributes on three
    """Gates lie in the order update, reset, hidden."""
    width = hidden_size or int((r.shape or ())[-1])  # type: ignore[arg-type]  # static

    def make(index: int) -> tuple[Callable[[Tensor], Tensor], Step]:
        names = _share(activations, ["Sigmoid", "Tanh"], index)
        alphas, betas = (_parameters(each, index, direction) for each in (activation_alpha, activation_beta))
        f, g = _activations(names, alphas, betas)
        recurrent, bias = _part(r, index, True), _part(b, index)
        gates, candidate = recurrent[:, : 2 * width], recurrent[:, 2 * width :]
        given = None if bias is None else bias[: 3 * width]
        own = tf.zeros([3 * width], recurrent.dtype) if bias is None else bias[3 * width :]

        def step(row: Tensor, state: State) -> State:
            (hidden,) = state
            z, reset = tf.split(row[:, : 2 * width] + tf.matmul(hidden, gates) + own[: 2 * width], 2, -1)
            z, reset = f(_clipped(z, clip)), f(_clipped(reset, clip))
            if linear_before_reset:
                proposed = reset * (tf.matmul(hidden, candidate) + own[2 * width :])
            else:
                proposed = tf.matmul(reset * hidden, candidate) + own[2 * width :]
            proposed = g(_clipped(row[:, 2 * width :] + proposed, clip))
            return [(1 - z) * proposed + z * hidden]

        return _ahead(_part(w, index, True), given), step

    made, (hidden,) = _directions(x, lengths, [initial_h], width, direction, layout, make)
    return made, hidden


@OPS.op("RNN", since=7)
def rnn(
    x: Value, w: Value, r: Value, b: Value | None = None, lengths: Value | None = None, initial_h: Value | None = None,
    *, activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, layout: int = 0,
) -> Any:  # fmt: skip  # the inputs on one line, the attributes on three
    """The plain recurrent layer."""
    width = hidden_size or int((r.shape or ())[-1])  # type: ignore[arg-type]  # static

    def make(index: int) -> tuple[Callable[[Tensor], Tensor], Step]:
        alphas, betas = (_parameters(each, index, direction) for each in (activation_alpha, activation_beta))
        (f,) = _activations(_share(activations, ["Tanh"], index), alphas, betas)
        recurrent, bias = _part(r, index, True), _part(b, index)
        both = None if bias is None else bias[:width] + bias[width:]

        def step(row: Tensor, state: State) -> State:
            return [f(_clipped(row + tf.matmul(state[0], recurrent), clip))]

        return _ahead(_part(w, index, True), both), step

    made, (hidden,) = _directions(x, lengths, [initial_h], width, direction, layout, make)
    return made, hidden
