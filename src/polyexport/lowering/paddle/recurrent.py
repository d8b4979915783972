"""The loop over time of LSTM, GRU and RNN: unrolled where it is short and of known length, else a `while_loop`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F

from polyexport.lowering.paddle.target import OPS, sizes_of, told
from polyexport.lowering.recurrent import UNROLLED, Loops, State, Step, declare
from polyexport.lowering.value import Tensor


def _activation(name: str, alpha: Any, beta: Any) -> Callable[[Tensor], Tensor]:
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "tanh": paddle.tanh,
        "sigmoid": F.sigmoid,
        "softsign": F.softsign,
        "softplus": F.softplus,
        "affine": lambda x: alpha * x + beta,
        "leakyrelu": lambda x: F.leaky_relu(x, alpha),
        "thresholdedrelu": lambda x: paddle.where(x > alpha, x, paddle.zeros_like(x)),
        "scaledtanh": lambda x: alpha * paddle.tanh(beta * x),
        "hardsigmoid": lambda x: paddle.clip(alpha * x + beta, 0.0, 1.0),
        "elu": lambda x: F.elu(x, alpha),
    }
    return found[name]


def _scan(x: Tensor, state: State, step: Step, lengths: Tensor | None) -> tuple[Tensor, State]:
    def masked(i: Any, row: Tensor, old: State) -> tuple[Tensor, State]:
        new = step(row, old)
        if lengths is None:
            return new[0], new
        alive = paddle.unsqueeze(lengths > i, 1)
        kept = [paddle.where(alive, each, before) for each, before in zip(new, old, strict=True)]
        return paddle.where(alive, new[0], paddle.zeros_like(new[0])), kept

    count = int(x.shape[0])
    if 0 <= count <= UNROLLED:
        outputs = []
        for i in range(count):
            output, state = masked(i, x[i], state)
            outputs.append(output)
        return paddle.stack(outputs), state

    def body(i: Tensor, made: Tensor, *states: Tensor) -> list[Tensor]:
        output, new = masked(i, paddle.index_select(x, paddle.reshape(i, [1]), 0)[0], list(states))
        made = paddle.concat([made, paddle.unsqueeze(output, 0)])
        sizes = [(-1, *states[0].shape), *(each.shape for each in states)]
        return [
            i + 1,
            *(told(each, [None if n < 0 else n for n in size]) for each, size in zip([made, *new], sizes, strict=True)),
        ]

    total = paddle.cast(paddle.shape(x)[0], "int64")
    nothing = paddle.zeros([0, *paddle.shape(state[0])], x.dtype)
    start = [paddle.zeros([], "int64"), told(nothing, [None, *(None if n < 0 else n for n in state[0].shape)]), *state]
    _, made, *state = paddle.static.nn.while_loop(lambda i, *_: i < total, body, start)
    return made, state


def _flip(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return paddle.flip(x, [0])
    total = paddle.cast(paddle.shape(x)[0], "int64")
    place = paddle.unsqueeze(paddle.arange(0, total, 1, dtype="int64"), 1)
    source = paddle.where(place < lengths, lengths - 1 - place, place)  # (time, batch)
    return paddle.take_along_axis(x, paddle.unsqueeze(source, 2) + paddle.zeros_like(x, "int64"), 0)


def _state(given: Tensor | None, batch: Any, width: int, dtype: Any) -> Tensor:
    if given is None:
        return paddle.zeros([batch, width], dtype)
    return told(given, [None if given.shape[0] < 0 else given.shape[0], width])


declare(
    OPS,
    Loops(
        activation=_activation,
        clip=lambda x, limit: paddle.clip(x, -limit, limit),
        split=lambda x, count: paddle.split(x, count, axis=-1),
        stack=lambda tensors, axis: paddle.stack(list(tensors), axis),
        flip=_flip,
        scan=_scan,
        state=_state,
        lengths=lambda value: paddle.cast(value.tensor, "int64"),
        sizes=sizes_of,
    ),
)
