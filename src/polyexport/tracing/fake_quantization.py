"""Fake quantization in a traced module, as the operations that backends turn into integer arithmetic.

What trained with torch.ao's fake quantization is traced as rounding in float32 (see `polyexport.capture.unwrap`), which
is right everywhere. Here such a rounding becomes `quantize` and `dequantize` with the scales that were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.spec import ExportSpec, example
from polyexport.tracing.exported_program import export_program, load_program

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True, slots=True)
class Rounding:
    """`(clamp(round(x / scale) + zero, low, high) - zero) * scale`, all of it in float32.

    Attributes:
        x: What is rounded.
        last: The node that has the result.
        scale: One number, or as many axes as `x` with all of length one but that of the channels.
        zero: Of the same shape.
        low: The least step.
        high: The greatest step.
    """

    x: Node
    last: Node
    scale: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int


def with_trained_scales(source: Path, spec: ExportSpec) -> torch.export.ExportedProgram:
    """The program of a `.pt2`, with `quantize` and `dequantize` in the place of its fake quantization.

    Raises:
        RuntimeError: it has none that is known here.
    """
    import torch

    module = load_program(source).module()
    if not with_integers(module):
        raise RuntimeError(
            "the fake quantization that it was trained with is not as torch.ao's, and has no scales here"
        )
    inputs = tuple(map(torch.from_numpy, example(spec).values()))
    return export_program(module, inputs, [tensor.dynamic for tensor in spec.inputs])


def with_integers(module: GraphModule) -> bool:
    """Put `quantize` and `dequantize` in the place of each rounding, in int8; constants are stored as integers.

    Steps that do not begin below zero are counted from -128 on. What is computed of constants alone becomes one.
    Returns whether there was any; changes `module` in place.
    """
    constants = _constants(module)
    found = [rounding for node in module.graph.nodes if (rounding := _rounding(node, constants))]
    for rounding in found:
        weight = constants.get(rounding.x)
        with module.graph.inserting_before(rounding.last):
            new = _quantized(module, rounding) if weight is None else _stored(module, rounding, weight)
        rounding.last.replace_all_uses_with(new)
    if found:
        _fold(module, constants)
        _carry_on(module.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
    return bool(found)


def _fold(module: GraphModule, constants: dict[Node, Any]) -> None:
    """Store what is computed of constants alone and read by what is not, such as a bias with a batch norm in it."""
    for node, value in constants.items():
        if node.op == "call_function" and node.users.keys() - constants.keys():
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_buffer(module, value))


def _carry_on(graph: Graph) -> None:
    """Quantize again, to the same steps, behind what only moves elements: a layer wants integers right before it."""
    import torch

    ops, aten = torch.ops.quantized_decomposed, torch.ops.aten
    moving = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.permute.default}
    moving |= {aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default}
    for node in tuple(graph.nodes):
        if node.target in moving and node.args[0].target is ops.dequantize_per_tensor.default:
            about = node.args[0].args[1:]
            with graph.inserting_after(node):
                steps = graph.call_function(ops.quantize_per_tensor.default, (node, *about))
            with graph.inserting_after(steps):
                back = graph.call_function(ops.dequantize_per_tensor.default, (steps, *about))
            node.replace_all_uses_with(back, delete_user_cb=steps.__ne__)


def _buffer(module: GraphModule, tensor: torch.Tensor) -> Node:
    """A node of a new buffer."""
    name = f"folded_{sum(1 for _ in module.buffers())}"
    module.register_buffer(name, tensor.detach().clone())
    return module.graph.get_attr(name)


def _constants(module: GraphModule) -> dict[Node, Any]:
    """What the nodes are that depend on no input."""
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


def _rounding(last: Node, constants: dict[Node, Any]) -> Rounding | None:
    import torch

    aten = torch.ops.aten
    path, node = [], last
    for target in (aten.mul.Tensor, aten.sub.Tensor, aten.clamp.default, aten.add.Tensor, aten.round.default):
        if node.target is not target:
            return None
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]  # an operation's first argument is a node
    product, difference, clamp, total, _ = path
    if (
        node.target is not aten.mul.Tensor
        or not {product.args[1], difference.args[1], total.args[1]} <= constants.keys()
    ):
        return None
    scale, zero = constants[product.args[1]], constants[difference.args[1]]  # type: ignore[index]  # they are nodes
    return Rounding(node.args[0], last, scale, zero, int(clamp.args[1]), int(clamp.args[2]))  # type: ignore[arg-type]


def _shift(rounding: Rounding) -> int:
    return 128 if rounding.low >= 0 else 0


def _quantized(module: GraphModule, rounding: Rounding) -> Node:
    """The nodes that quantize a tensor that is computed; backends know one scale for it."""
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
    integers = _buffer(module, (steps - _shift(rounding)).to(torch.int8))
    zero = (rounding.zero - _shift(rounding)).to(torch.int64)
    if scale.numel() == 1:
        one = (float(scale), int(zero), -128, 127, torch.int8)
        return graph.call_function(ops.dequantize_per_tensor.default, (integers, *one))
    axis = max(range(scale.dim()), key=lambda axis: scale.shape[axis])
    each = (_buffer(module, scale.flatten()), _buffer(module, zero.flatten()), axis, -128, 127, torch.int8)
    return graph.call_function(ops.dequantize_per_channel.default, (integers, *each))
