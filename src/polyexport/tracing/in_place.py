"""Operators of a program that write to memory: what shares that memory, and programs without them.

A program of `torch.export` has the operators that the module calls, those in place too: `mask[:, 2:] = 1` writes to a
view, and what reads `mask` afterward sees it. Who replaces a tensor by another one that equals it at one point of such
a program, by a copy or by rounded integers, loses what is written later.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from polyexport.tracing.dropouts import dropouts

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
    convolutions. A tensor that a slice was written to is a concatenation, which every runtime has; of PyTorch's own
    operator for it, exporters make one that scatters elements by their indices.
    """
    together = _sharing(program.graph)
    if not any(_is_seen(node, together[written]) for node in program.graph.nodes for written in _written(node)):
        return program
    import torch

    aten = torch.ops.aten
    table: dict[Any, Any] = {aten.slice_scatter.default: _with_slice, aten.select_scatter.default: _with_index}
    undeclared = {node.target for node in program.graph.nodes if _packet(node) in _undeclared()}
    defaults = torch.export.default_decompositions() if undeclared else {}
    table |= {each: how for each, how in defaults.items() if each in undeclared}  # else functions without memory
    made: torch.export.ExportedProgram = program.run_decompositions(table)
    return made


_PIECES = 64
"""How many elements at most a slice with a step has: each is a part of the concatenation."""


def _with_slice(
    x: torch.Tensor, part: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    """`x` with `part` in place of a slice, whose end is known by its size."""
    import torch

    size, count, start = x.shape[dim], part.shape[dim], start or 0
    if not all(isinstance(each, int) for each in (size, count, start)) or (step > 1 and count > _PIECES):
        return NotImplemented  # type: ignore[no-any-return]  # so that the operator stays
    start = min(max(start + size, 0) if start < 0 else start, size)
    part = part.to(x.dtype)
    written = [part] if step == 1 else [part.narrow(dim, index, 1) for index in range(count)]
    parts, done = [x.narrow(dim, 0, start)], start
    for each in written:
        done += each.shape[dim]
        stays = min(step - 1, size - done)
        parts += [each, x.narrow(dim, done, stays)]
        done += stays
    parts.append(x.narrow(dim, done, size - done))
    return torch.cat([each for each in parts if each.shape[dim] != 0] or [part], dim)


def _with_index(x: torch.Tensor, part: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """`x` with `part` in place of what is at an index."""
    return _with_slice(x, part.unsqueeze(dim), dim, index)


def _is_seen(writer: Node, sharing: Collection[Node]) -> bool:
    """Whether one of the nodes that share memory with what is written was there before, and is read afterward."""
    return any(node < writer and any(writer < user for user in node.users) for node in sharing)


def _sharing(graph: Graph) -> dict[Node, set[Node]]:
    """The nodes that share memory with each node."""
    together: dict[Node, set[Node]] = {node: {node} for node in graph.nodes}
    undeclared = _undeclared()
    for node in graph.nodes:
        for each in _viewed(node, undeclared):
            together[each] |= together[node]
            for member in together[node]:
                together[member] = together[each]
    return together


def _undeclared() -> Collection[Any]:
    """Operators that may return an argument, or a view of it, of which their schemas say nothing."""
    import torch

    aten = torch.ops.aten
    return {
        *dropouts(),  # in eval mode
        *(aten.atleast_1d, aten.atleast_2d, aten.atleast_3d, aten.meshgrid, aten.cartesian_prod),
        *(aten.broadcast_tensors, aten.sum_to_size, aten.conj_physical, aten.lift),
        *(aten.unsafe_chunk, aten.unsafe_split, aten.unsafe_split_with_sizes),
    }


def _packet(node: Node) -> Any:
    """An operator without its overload."""
    return getattr(node.target, "overloadpacket", None)


def _viewed(node: Node, undeclared: Collection[Any]) -> Iterator[Node]:
    """The arguments whose memory an operator's result may be."""
    if node.target is operator.getitem:
        yield node.all_input_nodes[0]
    if _packet(node) in undeclared:
        yield from node.all_input_nodes
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
