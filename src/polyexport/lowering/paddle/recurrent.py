"""Recurrent layers by Paddle's own operator, whose kernel runs all steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

from polyexport.lowering.backend import State, Tensor
from polyexport.lowering.paddle.primitives import assigned, cast
from polyexport.lowering.value import Value

_MODES: Mapping[tuple[str, ...], tuple[str, tuple[int, ...]]] = {
    ("lstm", "sigmoid", "tanh", "tanh"): ("LSTM", (0, 2, 3, 1)),
    ("gru", "sigmoid", "tanh"): ("GRU", (1, 0, 2)),
    ("rnn", "tanh"): ("RNN_TANH", (0,)),
    ("rnn", "relu"): ("RNN_RELU", (0,)),
}
"""The operator's mode for each kind of layer, and the index among ONNX's gates of each of its own."""


def recurrent(
    kind: tuple[str, ...],
    x: Tensor,
    states: State,
    weights: tuple[Value, Value, Value | None],
    lengths: Tensor | None,
) -> tuple[Tensor, State] | None:
    """As `Backend` describes it; of real numbers that Paddle's kernel has."""
    if kind not in _MODES or x.dtype not in (paddle.float32, paddle.float64):
        return None
    (mode, order), (w, r, b) = _MODES[kind], weights
    known = [size for size in (*(r.shape or ()), *(w.shape or ())[2:]) if size is not None]
    if len(known) < 4:
        return None
    directions, rows, width, size = known
    gates = np.concatenate([np.arange(width) + gate * width for gate in order])
    biases = b or Value(r.backend, known=np.zeros((directions, 2 * rows), r.dtype))
    both = range(directions)
    products = [_rows(each, index, gates) for index in both for each in (w, r)]
    added = [_rows(biases, index, start + gates) for index in both for start in (0, rows)]
    counts = None if lengths is None else cast(lengths, "int32")
    unused = paddle.full([1], 0, "uint8")  # dropout's state
    made, _, ends, *_ = paddle._C_ops.rnn(
        x, states, [*products, *added], counts, unused, 0.0, directions == 2, size, width, 1, mode, 0, True
    )
    return made, list(ends)


def _rows(value: Value, direction: int, rows: np.ndarray) -> Tensor:
    """Some rows of one direction's weight, in their order."""
    if value.known is not None:
        return value.backend.constant(np.ascontiguousarray(value.known[direction][rows]))
    return paddle.index_select(value.tensor[direction], assigned(rows), 0)
