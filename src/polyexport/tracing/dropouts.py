"""Removes dropouts that are off from programs.

In eval mode a dropout returns its argument, and what is written to one is in the other. Its operator's schema says
nothing of that, so `run_decompositions` takes it for a copy, and the program computes something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dropouts() -> tuple[Any, ...]:
    """PyTorch's operators of dropout, each with all of its overloads."""
    import torch

    aten = torch.ops.aten
    return (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)


def remove_dropouts(program: torch.export.ExportedProgram) -> None:
    """Replace each dropout in eval mode by its argument, unless it is an output; in place."""
    graph = program.graph
    for operator in dropouts():
        for node in graph.find_nodes(op="call_function", target=operator.default):
            x, _, train = node.args
            is_output = any(user.op == "output" for user in node.users)  # whose name stands in the signature
            if not train and not is_output:
                node.replace_all_uses_with(x)
                graph.erase_node(node)
    program.graph_module.recompile()
