"""Operators of a program that write to memory: what shares that memory, and programs without them.

A program of `torch.export` has the operators that the module calls, those in place too: `mask[:, 2:] = 1` writes to a
view, and what reads `mask` afterward sees it. Who replaces a tensor by another one that equals it at one point of such
a program, by a copy or by rounded integers, loses what is written later.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node


def with_writes(graph: Graph) -> Collection[Node]:
    """The nodes whose memory an operator in place writes to: its argument, what that is a view of, and their views."""
    together = _sharing(graph)
    return {each for node in graph.nodes for written in _written(node) for each in together[written]}


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without operators in place, unless nothing sees what they write but through their results.

    So it is with `ReLU(inplace=True)`. Else batch norms become another operator too, which quantizers do not fold into
    convolutions.
    """
    together = _sharing(program.graph)
    if not any(_is_seen(node, together[written]) for node in program.graph.nodes for written in _written(node)):
        return program
    made: torch.export.ExportedProgram = program.run_decompositions({})
    return made


def _is_seen(writer: Node, sharing: Collection[Node]) -> bool:
    """Whether one of the nodes that share memory with what is written was there before, and is read afterward."""
    return any(node < writer and any(writer < user for user in node.users) for node in sharing)


def _sharing(graph: Graph) -> dict[Node, set[Node]]:
    """The nodes that share memory with each node."""
    together: dict[Node, set[Node]] = {node: {node} for node in graph.nodes}
    for node in graph.nodes:
        for each in _viewed(node):
            together[each] |= together[node]
            for member in together[node]:
                together[member] = together[each]
    return together


def _viewed(node: Node) -> Iterator[Node]:
    """The arguments whose memory an operator's result may be."""
    if node.target is operator.getitem:
        yield node.all_input_nodes[0]
    for each, alias in _aliases(node):
        if alias is not None:
            yield each


def _written(node: Node) -> Iterator[Node]:
    """The arguments whose elements an operator changes."""
    import torch

    if node.target is not torch.ops.aten.detach_.default:
        for each, alias in _aliases(node):
            if alias is not None and alias.is_write:
                yield each


def _aliases(node: Node) -> Iterator[tuple[Node, Any]]:
    """Each argument of an operator that is a node, with what its schema says of the memory."""
    import torch

    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for each in given if isinstance(given, list | tuple) else [given]:
            if isinstance(each, torch.fx.Node):
                yield each, argument.alias_info
