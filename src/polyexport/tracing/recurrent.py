"""Recurrent layers of a program, to be replaced by submodules that compute them by other operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A node of a recurrent operator, over a whole sequence.

    Attributes:
        node: The node.
        sequence: Its first argument.
        states: The initial states.
        weights: Those of all layers and directions.
        settings: The arguments after them; the last one is whether the batch is the first axis.
        steps: Length of the sequence, symbolic where that is dynamic.
    """

    node: torch.fx.Node
    sequence: torch.fx.Node
    states: Any
    weights: Any
    settings: tuple[Any, ...]
    steps: Any

    def replace(self, module: torch.fx.GraphModule, suffix: str, layer: torch.nn.Module, *arguments: Any) -> None:
        """Put the call of a submodule in place of the node, named after it and `suffix`: `lstm_unrolled`."""
        name = f"{self.node.name}_{suffix}"
        module.add_submodule(name, layer)
        with module.graph.inserting_before(self.node):
            self.node.replace_all_uses_with(module.graph.call_module(name, arguments))
        module.graph.erase_node(self.node)


def recurrent_layers(module: torch.fx.GraphModule) -> Iterator[Recurrent]:
    """The recurrent layers of a program's module, which may be replaced one by one."""
    import torch

    aten = torch.ops.aten
    for operator in (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input):
        for node in module.graph.find_nodes(op="call_function", target=operator):
            sequence, states, weights, *settings = node.args
            steps = sequence.meta["val"].shape[1 if settings[-1] else 0]
            yield Recurrent(node, sequence, states, weights, tuple(settings), steps)
