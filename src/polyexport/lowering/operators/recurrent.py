"""LSTM, GRU and RNN: the framework's own operator, or a loop over time for each direction, in any framework."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyexport.lowering.backend import Backend, Size, State, Tensor, is_known
from polyexport.lowering.operators.index import reverse_within
from polyexport.lowering.operators.math import FUNCTIONS
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value

Step = Callable[[Tensor, State], State]
Function = Callable[[Tensor], Tensor]
Ahead = Callable[[Tensor], Tensor]
"""Computes something for all steps at once."""

Cell = Callable[["_Layer", int], tuple[Ahead, Step]]
"""Of a layer and a direction: what is done for all steps at once, and the step."""

UNROLLED = 128
"""Sequences of known length up to this are unrolled, which every runtime supports and runs faster.

TFLite has no loop over sequences with a dynamic batch. Unrolled, 128 steps of two layers in both directions take 3 s to
lower, and TFLite's and TensorFlow.js' converters 8 and 10.
"""

_ACTIVATIONS = {name.lower(): function for name, function in FUNCTIONS.items()}
"""ONNX writes the names of activation functions in any case."""


def _activation(ops: Backend, name: str, given: Mapping[str, list[float]]) -> Function:
    """The function of a name, with its alpha and beta, if it has them, taken from the front of the lists given."""
    function = _ACTIVATIONS[name.lower()]
    parameters = inspect.signature(function).parameters
    taken = {each: numbers.pop(0) for each, numbers in given.items() if each in parameters and numbers}
    return functools.partial(function, ops, **taken)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Inputs and attributes that the three layers share, by ONNX's names."""

    ops: Backend
    x: Value
    r: Value
    lengths: Value | None
    states: Sequence[Value | None]
    functions: Sequence[str]
    activation_alpha: list[float] | None = None
    activation_beta: list[float] | None = None
    activations: list[str] | None = None
    clip: float | None = None
    direction: str = "forward"
    hidden_size: int | None = None
    layout: int = 0

    @property
    def width(self) -> int:
        """The size of the state."""
        return self.hidden_size or int((self.r.shape or ())[-1])  # type: ignore[arg-type]  # static

    def chosen(self, index: int) -> list[Function]:
        """One direction's activation functions; ONNX lists parameters only for those that have them, in order."""
        count = len(self.functions)
        given = self.activations or list(self.functions) * 2
        names = given[index * count : (index + 1) * count] or self.functions
        shares = {"alpha": self.activation_alpha, "beta": self.activation_beta}
        parameters = {name: self._share(values, index) for name, values in shares.items()}
        return [_activation(self.ops, name, parameters) for name in names]

    def _share(self, values: Sequence[float] | None, index: int) -> list[float]:
        if not values or self.direction != "bidirectional" or len(values) < 2:
            return list(values or ())
        half = len(values) // 2
        return list(values[index * half : (index + 1) * half])

    def clipped(self, x: Tensor) -> Tensor:
        """Within the layer's limit, if it has one."""
        return x if self.clip is None else self.ops.clip(x, -self.clip, self.clip)

    def split(self, x: Tensor, count: int) -> Sequence[Tensor]:
        """The gates `(batch, width)` of a tensor that has them concatenated."""
        return self.ops.split(x, [self.width] * count, 1)

    def run(self, cell: Cell) -> tuple[Tensor, ...]:
        """Run each direction, step by step.

        Returns:
            `(time, directions, batch, width)` and for each state `(directions, batch, width)`, or with `layout` 1
            `(batch, time, directions, width)` and `(batch, directions, width)`.
        """
        ops, data, lengths, batch = self.ops, self._rows, self._counts, self._batch
        outputs, ends = [], []
        for index in range(2 if self.direction == "bidirectional" else 1):
            backward = self.direction == "reverse" or index == 1
            ahead, step = cell(self, index)
            rows = ahead(_turned(ops, data, lengths) if backward else data)
            output, state = _scanned(
                ops, rows, [self._first(each, index, batch) for each in self.states], step, lengths
            )
            outputs.append(_turned(ops, output, lengths) if backward else output)
            ends.append(state)
        axis = 1 if self.layout else 0
        made = ops.transpose(ops.stack(outputs, 0), (2, 1, 0, 3) if self.layout else (1, 0, 2, 3))
        return made, *(ops.stack(each, axis) for each in zip(*ends, strict=True))

    def by_own_operator(self, kind: str, w: Value, b: Value | None) -> tuple[Tensor, ...] | None:
        """What `run` returns, by the framework's own operator if it has one that computes the same."""
        ops, lengths, count = self.ops, self._counts, len(self.functions)
        names = [name.lower() for name in self.activations or self.functions]
        if self.clip is not None or names[:count] != names[-count:]:
            return None
        backward, directions = self.direction == "reverse", 2 if self.direction == "bidirectional" else 1
        states = [
            ops.stack([self._first(each, index, self._batch) for index in range(directions)], 0) for each in self.states
        ]
        data = _turned(ops, self._rows, lengths) if backward else self._rows
        found = ops.recurrent((kind, *names[:count]), data, states, (w, self.r, b), lengths)
        if found is None:
            return None
        output, ends = found
        output = _turned(ops, output, lengths) if backward else output
        time, batch, _ = ops.sizes(Value(ops, output))
        made = ops.transpose(
            ops.reshape(output, [time, batch, directions, self.width]), (1, 0, 2, 3) if self.layout else (0, 2, 1, 3)
        )
        return made, *(ops.transpose(each, (1, 0, 2)) if self.layout else each for each in ends)

    @property
    def _rows(self) -> Tensor:
        """The input, time first."""
        return self.x.permuted((1, 0, 2)).tensor if self.layout else self.x.tensor

    @property
    def _batch(self) -> Size:
        return self.ops.sizes(self.x)[0 if self.layout else 1]

    @property
    def _counts(self) -> Tensor | None:
        """The sequences' lengths in the type of indices."""
        return None if self.lengths is None else self.ops.cast(self.lengths.tensor, self.ops.index)

    def _first(self, value: Value | None, index: int, batch: Size) -> Tensor:
        """One direction's first state `(batch, width)`, zeros where it is not given."""
        if value is None:
            return self.ops.full([batch, self.width], 0, self.x.dtype)
        tensor = value.tensor[:, index] if self.layout else value.tensor[index]
        return self.ops.set_shape(tensor, [batch if is_known(batch) else None, self.width])


def _turned(ops: Backend, x: Tensor, lengths: Tensor | None) -> Tensor:
    """A sequence `(time, batch, width)` reversed, each within its length if lengths are given."""
    return ops.flip(x, [0]) if lengths is None else reverse_within(ops, x, lengths, 0, 1)


def _scanned(ops: Backend, x: Tensor, state: State, step: Step, lengths: Tensor | None) -> tuple[Tensor, State]:
    """The first state after each step along the first axis, and the last states.

    After its length a sequence keeps its state, and its output is zero.
    """

    def masked(i: Any, row: Tensor, old: State) -> tuple[Tensor, State]:
        new = step(row, old)
        if lengths is None:
            return new[0], new
        alive = ops.unsqueeze(lengths > i, [1])
        kept = [ops.where(alive, each, before) for each, before in zip(new, old, strict=True)]
        return ops.where(alive, new[0], 0), kept

    count = (ops.shape(x) or (None,))[0]
    if count is None or count > UNROLLED:
        return ops.steps(x, state, masked)
    outputs = []
    for i in range(count):
        output, state = masked(i, x[i], state)
        outputs.append(output)
    return ops.stack(outputs, 0), state


def _part(value: Value | None, index: int, transposed: bool = False) -> Any:
    """One direction's part of a weight; a constant one is sliced now."""
    if value is None:
        return None
    if value.known is not None:
        part = value.known[index]
        return value.backend.constant(part.T if transposed else part)
    part = value.tensor[index]
    return value.backend.transpose(part, (1, 0)) if transposed else part


def _ahead(weight: Tensor, bias: Tensor | None) -> Ahead:
    """The inputs' contribution to the gates, for all steps in one product."""
    return lambda x: x @ weight if bias is None else x @ weight + bias


@SHARED.op("LSTM", since=7)
def lstm(
    ops: Backend,
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lengths: Value | None = None,
    initial_h: Value | None = None,
    initial_c: Value | None = None,
    p: Value | None = None,
    *,
    input_forget: int = 0,
    **attributes: Any,
) -> tuple[Tensor, ...]:
    """Gates are in the order input, output, forget, cell."""

    def cell(layer: _Layer, index: int) -> tuple[Ahead, Step]:
        width = layer.width
        f, g, h = layer.chosen(index)
        recurrent, bias, peep = _part(r, index, True), _part(b, index), _part(p, index)
        both = None if bias is None else bias[: 4 * width] + bias[4 * width :]

        def step(row: Tensor, state: State) -> State:
            hidden, cell = state
            i, o, forget, c = layer.split(row + hidden @ recurrent, 4)
            if peep is not None:
                i, forget = i + peep[:width] * cell, forget + peep[2 * width :] * cell
            i = f(layer.clipped(i))
            forget = 1 - i if input_forget else f(layer.clipped(forget))
            cell = forget * cell + i * g(layer.clipped(c))
            o = o if peep is None else o + peep[width : 2 * width] * cell
            return [f(layer.clipped(o)) * h(cell), cell]

        return _ahead(_part(w, index, True), both), step

    states, functions = [initial_h, initial_c], ("Sigmoid", "Tanh", "Tanh")
    layer = _Layer(ops, x, r, lengths, states, functions, **attributes)
    own = None if p is not None or input_forget else layer.by_own_operator("lstm", w, b)
    return own or layer.run(cell)


@SHARED.op("GRU", since=7)
def gru(
    ops: Backend,
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lengths: Value | None = None,
    initial_h: Value | None = None,
    *,
    linear_before_reset: int = 0,
    **attributes: Any,
) -> tuple[Tensor, ...]:
    """Gates are in the order update, reset, hidden."""

    def cell(layer: _Layer, index: int) -> tuple[Ahead, Step]:
        width = layer.width
        f, g = layer.chosen(index)
        recurrent, bias = _part(r, index, True), _part(b, index)
        gates, candidate = recurrent[:, : 2 * width], recurrent[:, 2 * width :]
        given, own = (None, None) if bias is None else (bias[: 3 * width], bias[3 * width :])

        def plus(x: Tensor, start: int, end: int) -> Tensor:
            return x if own is None else x + own[start:end]

        def step(row: Tensor, state: State) -> State:
            (hidden,) = state
            z, reset = layer.split(row[:, : 2 * width] + plus(hidden @ gates, 0, 2 * width), 2)
            z, reset = f(layer.clipped(z)), f(layer.clipped(reset))
            if linear_before_reset:
                proposed = reset * plus(hidden @ candidate, 2 * width, 3 * width)
            else:
                proposed = plus((reset * hidden) @ candidate, 2 * width, 3 * width)
            proposed = g(layer.clipped(row[:, 2 * width :] + proposed))
            return [(1 - z) * proposed + z * hidden]

        return _ahead(_part(w, index, True), given), step

    layer = _Layer(ops, x, r, lengths, [initial_h], ("Sigmoid", "Tanh"), **attributes)
    return (layer.by_own_operator("gru", w, b) if linear_before_reset else None) or layer.run(cell)


@SHARED.op("RNN", since=7)
def rnn(
    ops: Backend,
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lengths: Value | None = None,
    initial_h: Value | None = None,
    **attributes: Any,
) -> tuple[Tensor, ...]:
    """The plain recurrent layer."""

    def cell(layer: _Layer, index: int) -> tuple[Ahead, Step]:
        (f,) = layer.chosen(index)
        recurrent, bias = _part(r, index, True), _part(b, index)
        both = None if bias is None else bias[: layer.width] + bias[layer.width :]

        def step(row: Tensor, state: State) -> State:
            return [f(layer.clipped(row + state[0] @ recurrent))]

        return _ahead(_part(w, index, True), both), step

    layer = _Layer(ops, x, r, lengths, [initial_h], ("Tanh",), **attributes)
    return layer.by_own_operator("rnn", w, b) or layer.run(cell)
