"""Computes recurrent layers step after step, for quantizers that know linear layers and nothing of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polyexport.tracing.recurrent import recurrent_layers

if TYPE_CHECKING:
    import torch

STEPS = 32
"""Longest sequence that is unrolled: each step is a copy of the layer's operators."""

SUFFIX = "unrolled"
"""What the name of a submodule ends with that computes a recurrent layer."""


def unrolled(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with a submodule in place of each recurrent layer over a sequence of known length up to `STEPS`.

    Traced again, the submodule is linear layers and element-wise operators. Its arguments are the sequence, the initial
    states, and the list of the layer's weights.
    """
    for each in recurrent_layers(module):
        if isinstance(each.steps, int) and each.steps <= STEPS:
            layer = _layer(each.node.target, each.settings)
            each.replace(module, SUFFIX, layer, each.sequence, each.states, each.weights)
    module.recompile()
    return module


def is_unrolled(node: torch.fx.Node) -> bool:
    """Whether a node of a program that was traced again is part of such a submodule."""
    return any(path.endswith(SUFFIX) for path, _ in node.meta.get("nn_module_stack", {}).values())


def _layer(operator: Any, settings: Sequence[Any]) -> torch.nn.Module:
    """A module of a recurrent operator with these settings: whether it has biases, its number of layers, and so on."""
    import torch
    from torch._decomp import decomposition_table

    compute = decomposition_table[operator]

    class Unrolled(torch.nn.Module):
        def forward(self, sequence: torch.Tensor, states: Any, weights: list[torch.Tensor]) -> Any:
            with torch.backends.mkldnn.flags(enabled=False):  # which has an operator for a whole LSTM
                return compute(sequence, states, weights, *settings)

    return Unrolled()
