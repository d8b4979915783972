"""What a traced module computes of its weights alone, stored instead."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node


def constants(module: GraphModule) -> dict[Node, Any]:
    """The values of nodes that depend on no input."""
    import torch
    from torch.fx.node import map_arg

    found: dict[Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                found[node] = attrgetter(str(node.target))(module)
            elif node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
                arguments, named = map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = node.target(*arguments, **named)
    return found


def fold(module: GraphModule, values: dict[Node, Any]) -> None:
    """Store nodes that depend only on constants and are read by others, such as a bias with a folded batch norm."""
    for node, value in values.items():
        if node.op == "call_function" and node.users.keys() - values.keys():
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(buffer(module, value))


def buffer(module: GraphModule, tensor: torch.Tensor) -> Node:
    """The node of a new buffer."""
    name = f"folded_{sum(1 for _ in module.buffers())}"
    module.register_buffer(name, tensor.detach().clone())
    return module.graph.get_attr(name)
