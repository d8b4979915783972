"""Recurrent layers, step by step: `x` is `(S, N, I)`, a state `(N, H)`.

Nothing is computed where Apple's documents disagree: `clip` bounds the new cell values of an LSTM in the reference of
MIL, but the input of each activation in NeuralNetwork.proto; a GRU's reset gate is applied before or after the product
with the weights. The converter writes neither. `scaled_tanh` has no documented formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyexport.errors import CannotRun

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]
"""Takes one time step of `x` and the state, of which the first is the output, and returns the next state."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise CannotRun(f"the MIL evaluator does not support a recurrent layer with {name}")
    return _ACTIVATIONS[name]


def _run(x: Tensor, state: State, step: Step, *, backwards: bool) -> tuple[Tensor, State]:
    """All outputs in the order of time, and the last state."""
    outputs = []
    for each in x.flip(0) if backwards else x:
        state = step(each, state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _shown(outputs: Tensor, last: Tensor, output_sequence: Tensor | bool) -> Tensor:
    return outputs if output_sequence else last.unsqueeze(0)


def _biased(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, ...]:
    activate = _activation(activation)

    def step(each: Tensor, state: State) -> State:
        return (activate(_biased(each, weight_ih, bias) + state[0] @ weight_hh.T),)

    outputs, (last,) = _run(x, (initial_h,), step, backwards=direction == "reverse")
    return _shown(outputs, last, output_sequence), last


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gates in the order input, forget, output, cell; both directions lie side by side in the states."""
    if peephole is not None or peephole_back is not None:
        raise CannotRun("the MIL evaluator does not support an lstm with peepholes")
    if clip is not None:
        raise CannotRun("the MIL evaluator does not support an lstm with clip")
    gate, cell, out = (_activation(name) for name in (recurrent_activation, cell_activation, activation))

    def stepper(ih: Tensor, hh: Tensor, own: Tensor | None) -> Step:
        def step(each: Tensor, state: State) -> State:
            h, c = state
            to_input, to_forget, to_output, to_cell = (_biased(each, ih, own) + h @ hh.T).chunk(4, -1)
            c = gate(to_forget) * c + gate(to_input) * cell(to_cell)
            return gate(to_output) * out(c), c

        return step

    ways = [(stepper(weight_ih, weight_hh, bias), direction == "reverse")]
    if weight_ih_back is not None and weight_hh_back is not None and direction == "bidirectional":
        ways.append((stepper(weight_ih_back, weight_hh_back, bias_back), True))
    starts = zip(initial_h.chunk(len(ways), -1), initial_c.chunk(len(ways), -1), strict=True)
    done = [_run(x, start, step, backwards=back) for start, (step, back) in zip(starts, ways, strict=True)]
    outputs = torch.cat([each for each, _ in done], -1)
    last, memory = (torch.cat([state[index] for _, state in done], -1) for index in (0, 1))
    return _shown(outputs, last, output_sequence), last, memory


OPS = {each.__name__: each for each in (lstm, rnn)}
