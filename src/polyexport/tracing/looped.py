"""Computes recurrent layers by PyTorch's loop over a sequence, `scan`, for converters that have a loop operator.

Unrolled, each step is a copy of the layer's operators, and the time to convert a program grows with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from polyexport.tracing.recurrent import recurrent_layers

if TYPE_CHECKING:
    import torch

Step = Callable[[list["torch.Tensor"], "list[torch.Tensor]"], "tuple[list[torch.Tensor], torch.Tensor]"]
"""From the states and the inputs of a step to the next states and the output; those are `(batch, width)`."""


def looped(module: torch.fx.GraphModule, longer_than: int) -> torch.fx.GraphModule:
    """The module with a submodule in place of each recurrent layer over a longer sequence, or one of unknown length.

    Layers with projections stay as they are, and those whose weights are computed.
    """
    for each in recurrent_layers(module):
        constants = [_constant(module, weight) for weight in each.weights]
        if (isinstance(each.steps, int) and each.steps <= longer_than) or None in constants:
            continue
        layer = _Layer(each.node.target, each.settings, constants)
        if not layer.has_projections:
            each.replace(module, "looped", layer.module(), each.sequence, each.states)
    module.recompile()
    return module


def _constant(module: torch.fx.GraphModule, node: torch.fx.Node) -> torch.Tensor | None:
    """The tensor that a node reads from the module, if it does."""
    import torch

    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    return tensor.detach() if isinstance(tensor, torch.Tensor) else None


class _Layer:
    """A recurrent operator with its settings, as PyTorch's schema has them, and its weights."""

    def __init__(self, operator: Any, settings: Sequence[Any], weights: Sequence[Any]) -> None:
        self.name = operator._schema.name.removeprefix("aten::")
        has_biases, self.layers, _, _, bidirectional, self.batch_first = settings
        self.directions = 2 if bidirectional else 1
        count = len(weights) // (self.layers * self.directions)
        self.has_projections = count != (4 if has_biases else 2)
        self.weights = [weights[start : start + count] for start in range(0, len(weights), count)]

    def module(self) -> torch.nn.Module:
        """A module of the sequence and the initial states, `(layers · directions, batch, width)` each."""
        import torch
        from torch._higher_order_ops.scan import scan

        layer, is_lstm = self, self.name == "lstm"

        class Looped(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                made = [_CELLS[layer.name](*weights) for weights in layer.weights]
                self.cells = torch.nn.ModuleList(made)

            def forward(self, sequence: torch.Tensor, states: Any) -> tuple[torch.Tensor, ...]:
                x = sequence.transpose(0, 1) if layer.batch_first else sequence
                first = states if is_lstm else [states]
                ends = []
                for at in range(layer.layers):
                    outputs = []
                    for direction in range(layer.directions):
                        index = at * layer.directions + direction
                        cell: Any = self.cells[index]
                        rows = [each.flip(0) if direction else each for each in cell.ahead(x)]
                        end, made = scan(cell.step, [state[index].clone() for state in first], rows)
                        outputs.append(made.flip(0) if direction else made)
                        ends.append(end)
                    x = torch.cat(outputs, -1) if layer.directions > 1 else outputs[0]
                output = x.transpose(0, 1) if layer.batch_first else x
                return output, *(torch.stack(each) for each in zip(*ends, strict=True))

        return Looped()


def _lstm(*weights: torch.Tensor) -> torch.nn.Module:
    """PyTorch's gates are in the order input, forget, cell, output; here the cell is last, and the others are one."""
    import torch

    class Cell(torch.nn.Module):
        own_gates: torch.Tensor
        own_cell: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            parts = [torch.cat([w.chunk(4)[gate] for gate in (0, 1, 3, 2)]) for w in weights]
            self.width = width = weights[1].shape[1]
            bias = sum(parts[2:]) if parts[2:] else None
            self.gates, self.cell = (
                _linear(parts[0], bias, rows) for rows in (slice(3 * width), slice(3 * width, None))
            )
            # products of a state need them transposed; a copy, since a view is stored by its order in memory
            self.register_buffer("own_gates", parts[1][: 3 * width].t().contiguous())
            self.register_buffer("own_cell", parts[1][3 * width :].t().contiguous())

        def ahead(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.gates(x), self.cell(x)]

        def step(self, states: list[torch.Tensor], rows: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
            hidden, cell = states
            i, forget, o = (rows[0] + hidden @ self.own_gates).sigmoid().split(self.width, 1)
            cell = forget * cell + i * (rows[1] + hidden @ self.own_cell).tanh()
            hidden = o * cell.tanh()
            return [hidden, cell], hidden.clone()

    return Cell()


def _gru(*weights: torch.Tensor) -> torch.nn.Module:
    """PyTorch's gates are in the order reset, update, new; the reset is applied after the product."""
    import torch

    class Cell(torch.nn.Module):
        own_gates: torch.Tensor
        own_new: torch.Tensor
        own_bias: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            given, own, *biases = weights
            self.width = width = own.shape[1]
            both, last = slice(2 * width), slice(2 * width, None)
            bias = None if not biases else torch.cat([biases[0][both] + biases[1][both], biases[0][last]])
            self.gates, self.new = (_linear(given, bias, rows) for rows in (both, last))
            self.register_buffer("own_gates", own[both].t().contiguous())
            self.register_buffer("own_new", own[last].t().contiguous())
            self.register_buffer("own_bias", biases[1][last].clone() if biases else own.new_zeros(width))

        def ahead(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.gates(x), self.new(x)]

        def step(self, states: list[torch.Tensor], rows: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
            (hidden,) = states
            reset, update = (rows[0] + hidden @ self.own_gates).sigmoid().split(self.width, 1)
            new = (rows[1] + reset * (hidden @ self.own_new + self.own_bias)).tanh()
            hidden = new + update * (hidden - new)
            return [hidden], hidden.clone()

    return Cell()


def _rnn(activation: str) -> Callable[..., torch.nn.Module]:
    """The plain layer with `tanh` or `relu`."""

    def made(*weights: torch.Tensor) -> torch.nn.Module:
        import torch

        class Cell(torch.nn.Module):
            own: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                given, own, *biases = weights
                self.given = _linear(given, sum(biases) if biases else None, slice(None))
                self.register_buffer("own", own.t().contiguous())

            def ahead(self, x: torch.Tensor) -> list[torch.Tensor]:
                return [self.given(x)]

            def step(
                self, states: list[torch.Tensor], rows: list[torch.Tensor]
            ) -> tuple[list[torch.Tensor], torch.Tensor]:
                hidden = getattr(rows[0] + states[0] @ self.own, activation)()
                return [hidden], hidden.clone()

        return Cell()

    return made


def _linear(weight: torch.Tensor, bias: Any, rows: slice) -> torch.nn.Linear:
    """Some rows of a weight and a bias, which is for all steps at once, as a layer."""
    import torch

    part = weight[rows].clone()
    layer = torch.nn.Linear(part.shape[1], part.shape[0], bias=bias is not None, dtype=part.dtype)
    layer.weight = torch.nn.Parameter(part, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias[rows].clone(), requires_grad=False)
    return layer


_CELLS: dict[str, Callable[..., Any]] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn("tanh"), "rnn_relu": _rnn("relu")}
"""A module for each operator's name, of one direction's weights: what is done for all steps at once, and a step."""
