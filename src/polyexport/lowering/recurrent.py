"""LSTM, GRU and RNN: a loop over time for each direction, whatever framework runs the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyexport.lowering.operators import Operators
from polyexport.lowering.value import Tensor, Value

State = list[Tensor]
Step = Callable[[Tensor, State], State]
Function = Callable[[Tensor], Tensor]
Ahead = Callable[[Tensor], Tensor]
"""What is done for all steps at once."""

UNROLLED = 32
"""Steps up to which a sequence of known length is unrolled, which every runtime runs and runs faster."""

_WITH_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
_WITH_BETA = {"affine", "scaledtanh", "hardsigmoid"}
_DEFAULTS = {
    "affine": (1.0, 0.0), "leakyrelu": (0.01, None), "thresholdedrelu": (1.0, None), "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5), "elu": (1.0, None),
}  # fmt: skip  # a table, read as one


@dataclass(frozen=True, slots=True)
class Loops:
    """What the layers need of a framework.

    Attributes:
        activation: A function by its name in small letters, its alpha and its beta.
        clip: A tensor, within -limit and limit.
        split: A tensor in n parts along its last axis.
        stack: Tensors along a new axis.
        flip: A sequence `(time, batch, width)` turned round, each within its length where lengths are given.
        scan: Runs a step along the first axis; the first state after each step, and the last states. Beyond its
            length a sequence keeps its state, and its output is zero.
        state: One direction's first state `(batch, width)`, of zeros where its tensor is None.
        lengths: The tensor of an input, as `flip` and `scan` take it.
        sizes: The sizes of a value's axes.
    """

    activation: Callable[[str, float | None, float | None], Function]
    clip: Callable[[Tensor, float], Tensor]
    split: Callable[[Tensor, int], Sequence[Tensor]]
    stack: Callable[[Sequence[Tensor], int], Tensor]
    flip: Callable[[Tensor, Tensor | None], Tensor]
    scan: Callable[[Tensor, State, Step, Tensor | None], tuple[Tensor, State]]
    state: Callable[[Tensor | None, Any, int, Any], Tensor]
    lengths: Callable[[Value], Tensor]
    sizes: Callable[[Value], list[Any]]


@dataclass(frozen=True, slots=True)
class _Layer:
    """The attributes that the three layers share."""

    loops: Loops
    width: int
    functions: Sequence[str]
    activations: Sequence[str] | None
    alphas: Sequence[float] | None
    betas: Sequence[float] | None
    limit: float | None
    direction: str
    layout: int

    def chosen(self, index: int) -> list[Function]:
        """One direction's activation functions; ONNX lists parameters only for those that have them, in order."""
        count = len(self.functions)
        given = self.activations or list(self.functions) * 2
        names = [name.lower() for name in given[index * count : (index + 1) * count] or self.functions]
        alphas, betas = self._share(self.alphas, index), self._share(self.betas, index)
        found = []
        for name in names:
            alpha, beta = _DEFAULTS.get(name, (None, None))
            alpha = alphas.pop(0) if alphas and name in _WITH_ALPHA else alpha
            beta = betas.pop(0) if betas and name in _WITH_BETA else beta
            found.append(self.loops.activation(name, alpha, beta))
        return found

    def _share(self, values: Sequence[float] | None, index: int) -> list[float]:
        if not values or self.direction != "bidirectional" or len(values) < 2:
            return list(values or ())
        half = len(values) // 2
        return list(values[index * half : (index + 1) * half])

    def clipped(self, x: Tensor) -> Tensor:
        """Within the layer's limit, if it has one."""
        return x if self.limit is None else self.loops.clip(x, self.limit)

    def run(
        self, x: Value, lengths: Value | None, states: Sequence[Value | None], make: Callable[[int], tuple[Ahead, Step]]
    ) -> tuple[Tensor, ...]:
        """Each direction by itself; `make` gives what is done for all steps at once, and the step.

        Returns:
            `(time, directions, batch, width)` and for each state `(directions, batch, width)`, or with `layout` 1
            `(batch, time, directions, width)` and `(batch, directions, width)`.
        """
        loops = self.loops
        data = x.permuted((1, 0, 2)).tensor if self.layout else x.tensor
        batch = loops.sizes(x)[0 if self.layout else 1]
        long = None if lengths is None else loops.lengths(lengths)
        outputs, ends = [], []
        for index in range(2 if self.direction == "bidirectional" else 1):
            backward = self.direction == "reverse" or index == 1
            initial = [loops.state(self._first(each, index), batch, self.width, data.dtype) for each in states]
            ahead, step = make(index)
            output, state = loops.scan(ahead(loops.flip(data, long) if backward else data), initial, step, long)
            outputs.append(loops.flip(output, long) if backward else output)
            ends.append(state)
        axis = 1 if self.layout else 0
        order = (2, 1, 0, 3) if self.layout else (1, 0, 2, 3)
        made = x.framework.transpose(loops.stack(outputs, 0), order)
        return made, *(loops.stack(each, axis) for each in zip(*ends, strict=True))

    def _first(self, value: Value | None, index: int) -> Tensor | None:
        if value is None:
            return None
        return value.tensor[:, index] if self.layout else value.tensor[index]


def _part(value: Value | None, index: int, transposed: bool = False) -> Any:
    """One direction's share of a weight; of a known one it is cut now."""
    if value is None:
        return None
    if value.known is not None:
        part = value.known[index]
        return value.framework.constant(part.T if transposed else part)
    part = value.tensor[index]
    return value.framework.transpose(part, (1, 0)) if transposed else part


def _ahead(weight: Tensor, bias: Tensor | None) -> Ahead:
    """The inputs' share of the gates, for all steps in one product."""
    return lambda x: x @ weight if bias is None else x @ weight + bias


def _width(hidden_size: int | None, r: Value) -> int:
    return hidden_size or int((r.shape or ())[-1])  # type: ignore[arg-type]  # static


def declare(operators: Operators, loops: Loops) -> None:
    """Write the three layers into a framework's table."""

    @operators.op("LSTM", since=7)
    def lstm(
        x: Value, w: Value, r: Value, b: Value | None = None, lengths: Value | None = None,
        initial_h: Value | None = None, initial_c: Value | None = None, p: Value | None = None,
        *, activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
        activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
        hidden_size: int | None = None, input_forget: int = 0, layout: int = 0,
    ) -> Any:  # fmt: skip  # the inputs on two lines, the attributes on three
        """Gates lie in the order input, output, forget, cell."""
        width = _width(hidden_size, r)
        layer = _Layer(
            loops, width, ("Sigmoid", "Tanh", "Tanh"), activations, activation_alpha, activation_beta, clip, direction,
            layout,
        )  # fmt: skip  # the attributes in their order

        def make(index: int) -> tuple[Ahead, Step]:
            f, g, h = layer.chosen(index)
            recurrent, bias, peep = _part(r, index, True), _part(b, index), _part(p, index)
            both = None if bias is None else bias[: 4 * width] + bias[4 * width :]

            def step(row: Tensor, state: State) -> State:
                hidden, cell = state
                i, o, forget, c = loops.split(row + hidden @ recurrent, 4)
                if peep is not None:
                    i, forget = i + peep[:width] * cell, forget + peep[2 * width :] * cell
                i = f(layer.clipped(i))
                forget = 1 - i if input_forget else f(layer.clipped(forget))
                cell = forget * cell + i * g(layer.clipped(c))
                o = o if peep is None else o + peep[width : 2 * width] * cell
                return [f(layer.clipped(o)) * h(cell), cell]

            return _ahead(_part(w, index, True), both), step

        return layer.run(x, lengths, [initial_h, initial_c], make)

    @operators.op("GRU", since=7)
    def gru(
        x: Value, w: Value, r: Value, b: Value | None = None, lengths: Value | None = None,
        initial_h: Value | None = None,
        *, activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
        activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
        hidden_size: int | None = None, linear_before_reset: int = 0, layout: int = 0,
    ) -> Any:  # fmt: skip  # the inputs on two lines, the attributes on three
        """Gates lie in the order update, reset, hidden."""
        width = _width(hidden_size, r)
        layer = _Layer(
            loops, width, ("Sigmoid", "Tanh"), activations, activation_alpha, activation_beta, clip, direction, layout
        )

        def make(index: int) -> tuple[Ahead, Step]:
            f, g = layer.chosen(index)
            recurrent, bias = _part(r, index, True), _part(b, index)
            gates, candidate = recurrent[:, : 2 * width], recurrent[:, 2 * width :]
            given, own = (None, None) if bias is None else (bias[: 3 * width], bias[3 * width :])

            def plus(x: Tensor, start: int, end: int) -> Tensor:
                return x if own is None else x + own[start:end]

            def step(row: Tensor, state: State) -> State:
                (hidden,) = state
                z, reset = loops.split(row[:, : 2 * width] + plus(hidden @ gates, 0, 2 * width), 2)
                z, reset = f(layer.clipped(z)), f(layer.clipped(reset))
                if linear_before_reset:
                    proposed = reset * plus(hidden @ candidate, 2 * width, 3 * width)
                else:
                    proposed = plus((reset * hidden) @ candidate, 2 * width, 3 * width)
                proposed = g(layer.clipped(row[:, 2 * width :] + proposed))
                return [(1 - z) * proposed + z * hidden]

            return _ahead(_part(w, index, True), given), step

        return layer.run(x, lengths, [initial_h], make)

    @operators.op("RNN", since=7)
    def rnn(
        x: Value, w: Value, r: Value, b: Value | None = None, lengths: Value | None = None,
        initial_h: Value | None = None,
        *, activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
        activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
        hidden_size: int | None = None, layout: int = 0,
    ) -> Any:  # fmt: skip  # the inputs on two lines, the attributes on three
        """The plain recurrent layer."""
        width = _width(hidden_size, r)
        layer = _Layer(loops, width, ("Tanh",), activations, activation_alpha, activation_beta, clip, direction, layout)

        def make(index: int) -> tuple[Ahead, Step]:
            (f,) = layer.chosen(index)
            recurrent, bias = _part(r, index, True), _part(b, index)
            both = None if bias is None else bias[:width] + bias[width:]

            def step(row: Tensor, state: State) -> State:
                return [f(layer.clipped(row + state[0] @ recurrent))]

            return _ahead(_part(w, index, True), both), step

        return layer.run(x, lengths, [initial_h], make)
