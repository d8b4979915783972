"""Fake quantization in a traced module, as operations that backends compile to integer arithmetic.

Fake quantization of torch.ao is traced as rounding in float32 (see `polyexport.capture.unwrap`), which is correct in
every format. Here such a rounding becomes `quantize` and `dequantize` with the trained scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.spec import ExportSpec, example
from polyexport.tracing.constants import buffer, constants, fold
from polyexport.tracing.exported_program import export_program, load_program

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True, slots=True)
class Rounding:
    """`(clamp(round(x / scale) + zero, low, high) - zero) * scale`, all of it in float32.

    Attributes:
        x: The node that is rounded.
        last: The node of the result.
        scale: One number, or an array with the rank of `x` that has the size 1 on all axes but the channels'.
        zero: Of the same shape.
        low: The lowest integer.
        high: The highest integer.
    """

    x: Node
    last: Node
    scale: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int


def with_trained_scales(source: Path, spec: ExportSpec) -> torch.export.ExportedProgram:
    """The program of a `.pt2`, with `quantize` and `dequantize` in place of its fake quantization.

    Raises:
        RuntimeError: it has no fake quantization of torch.ao.
    """
    import torch

    inputs = tuple(map(torch.from_numpy, example(spec).values()))
    return export_program(quantized_module(source), inputs, [tensor.dynamic for tensor in spec.inputs])


def quantized_module(source: Path) -> GraphModule:
    """The module of a `.pt2`, with `quantize` and `dequantize` in place of its fake quantization.

    Raises:
        RuntimeError: it has no fake quantization of torch.ao.
    """
    module = load_program(source).module()
    if not with_integers(module):
        raise RuntimeError(
            "the model was trained with fake quantization other than torch.ao's, whose scales are unknown"
        )
    return module


def with_integers(module: GraphModule) -> bool:
    """Replace each rounding by `quantize` and `dequantize` in int8; constants are stored as integers.

    Unsigned integers are shifted to begin at -128. Nodes that depend only on constants become constants.
    Returns whether there was any; changes `module` in place.
    """
    values = constants(module)
    found = [rounding for node in module.graph.nodes if (rounding := _rounding(node, values))]
    for rounding in found:
        weight = values.get(rounding.x)
        with module.graph.inserting_before(rounding.last):
            new = _quantized(module, rounding) if weight is None else _stored(module, rounding, weight)
        rounding.last.replace_all_uses_with(new)
    if found:
        fold(module, values)
        module.graph.eliminate_dead_code()
        _carry_on(module.graph)
        module.recompile()
    return bool(found)


def quantize_in_graph(module: GraphModule) -> None:
    """Store weights as float32 with `quantize` before their `dequantize`, for converters that make integers themselves.

    They are multiples of their scale, so nothing is rounded. Of two quantizations in a row such converters keep the
    first; here the one with the narrower range is kept, so that what is clipped stays the same. Changes `module` in
    place.
    """
    import torch

    ops = torch.ops.quantized_decomposed
    _once(module.graph)
    quantize: dict[Any, Any] = {
        ops.dequantize_per_tensor.default: ops.quantize_per_tensor.default,
        ops.dequantize_per_channel.default: ops.quantize_per_channel.default,
    }
    values = constants(module)
    for node in [each for each in values if each.target in quantize]:
        about = node.args[1:]
        with module.graph.inserting_before(node):
            steps = module.graph.call_function(quantize[node.target], (buffer(module, values[node]), *about))
        node.args = (steps, *about)
    module.graph.eliminate_dead_code()
    module.recompile()


def _once(graph: Graph) -> None:
    """Keep one quantization of two in a row."""
    import torch

    ops = torch.ops.quantized_decomposed
    for second in graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default):
        between: Any = second.args[0]
        if between.target is not ops.dequantize_per_tensor.default or [*between.users] != [second]:
            continue
        first = between.args[0]
        if first.target is ops.quantize_per_tensor.default and [*first.users] == [between]:
            about = min(first.args[1:], second.args[1:], key=lambda about: about[0])  # all of them have 256 steps
            second.args = (first.args[0], *about)
            for reader in tuple(second.users):
                reader.args = (second, *about)
    graph.eliminate_dead_code()


def _carry_on(graph: Graph) -> None:
    """Repeat the quantization after nodes that only move elements, since layers need integers right before them.

    Not if each reader has a quantization of its own: of two in a row some converters lose the second.
    """
    import torch

    ops, moves = torch.ops.quantized_decomposed, moving()
    for node in tuple(graph.nodes):
        if all(user.target is ops.quantize_per_tensor.default for user in node.users):
            continue
        if node.target in moves and node.args[0].target is ops.dequantize_per_tensor.default:
            about = node.args[0].args[1:]
            with graph.inserting_after(node):
                steps = graph.call_function(ops.quantize_per_tensor.default, (node, *about))
            with graph.inserting_after(steps):
                back = graph.call_function(ops.dequantize_per_tensor.default, (steps, *about))
            node.replace_all_uses_with(back, delete_user_cb=steps.__ne__)


def moving() -> set[Any]:
    """Operators that only move elements."""
    import torch

    aten = torch.ops.aten
    shapes = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.permute.default}
    return shapes | {aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default}


def _rounding(last: Node, values: dict[Node, Any]) -> Rounding | None:
    import torch

    aten = torch.ops.aten
    path, node = [], last
    for target in (aten.mul.Tensor, aten.sub.Tensor, aten.clamp.default, aten.add.Tensor, aten.round.default):
        if node.target is not target:
            return None
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]  # an operation's first argument is a node
    product, difference, clamp, total, _ = path
    if node.target is not aten.mul.Tensor or not {product.args[1], difference.args[1], total.args[1]} <= values.keys():
        return None
    scale, zero = values[product.args[1]], values[difference.args[1]]  # type: ignore[index]  # they are nodes
    return Rounding(node.args[0], last, scale, zero, int(clamp.args[1]), int(clamp.args[2]))  # type: ignore[arg-type]


def _shift(rounding: Rounding) -> int:
    return 128 if rounding.low >= 0 else 0


def _quantized(module: GraphModule, rounding: Rounding) -> Node:
    """The nodes that quantize a computed tensor; backends support only one scale for it."""
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operations

    ops, graph = torch.ops.quantized_decomposed, module.graph
    about = (float(rounding.scale), int(rounding.zero) - _shift(rounding), -128, 127, torch.int8)
    steps = graph.call_function(ops.quantize_per_tensor.default, (rounding.x, *about))
    return graph.call_function(ops.dequantize_per_tensor.default, (steps, *about))


def _stored(module: GraphModule, rounding: Rounding, weight: torch.Tensor) -> Node:
    """The node that dequantizes a constant, which is stored in int8."""
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operations

    ops, graph, scale = torch.ops.quantized_decomposed, module.graph, rounding.scale
    steps = torch.clamp(torch.round(weight * (1 / scale)) + rounding.zero, rounding.low, rounding.high)
    integers = buffer(module, (steps - _shift(rounding)).to(torch.int8))
    zero = (rounding.zero - _shift(rounding)).to(torch.int64)
    if scale.numel() == 1:
        one = (float(scale), int(zero), -128, 127, torch.int8)
        return graph.call_function(ops.dequantize_per_tensor.default, (integers, *one))
    axis = max(range(scale.dim()), key=lambda axis: scale.shape[axis])
    each = (buffer(module, scale.flatten()), buffer(module, zero.flatten()), axis, -128, 127, torch.int8)
    return graph.call_function(ops.dequantize_per_channel.default, (integers, *each))
