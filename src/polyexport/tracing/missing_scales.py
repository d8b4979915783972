"""Scales that training with fake quantization left out, for runtimes whose integer layers have one at either end.

Where the quantizer is for a processor that adds in float32, as x86's, the output of a layer has no scale of its own:
that of the next layer's input, and the last layer's output is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.spec import ExportSpec, calibration
from polyexport.tracing.fake_quantization import moving, quantized_module

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node


def module_with_all_scales(source: Path, spec: ExportSpec, *, calibrated: bool) -> GraphModule:
    """The module of a `.pt2` whose layers with integer weights have quantized inputs and outputs.

    Args:
        source: The program, with the fake quantization that it was trained with.
        spec: Its signature, with batches to calibrate with.
        calibrated: Whether scales that training left out are taken from ranges of these batches.

    Raises:
        RuntimeError: scales are missing, and they are not to be calibrated.
    """
    module = quantized_module(source)
    missing = [point for point in _points(module) if not _with_scale_of_reader(module, point)]
    if missing and not calibrated:
        names = ", ".join(point.name for point in missing)
        raise RuntimeError(
            f"training left {len(missing)} of the tensors that layers read and return without a scale: {names}"
        )
    if missing:
        for point, (least, most) in _ranges(module, missing, spec).items():
            _quantize(module, point, _steps(least, most))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _points(module: GraphModule) -> list[Node]:
    """The tensors in float32 that layers with integer weights read or return, activations included."""
    import torch

    ops, aten = torch.ops.quantized_decomposed, torch.ops.aten
    stored = {ops.dequantize_per_tensor.default, ops.dequantize_per_channel.default}
    fused = {aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default}
    found: dict[Node, None] = {}
    for node in module.graph.nodes:
        is_layer = str(node.target).startswith(("aten.conv", "aten.linear.")) and node.args[1].target in stored
        if not is_layer:
            continue
        if node.args[0].target is not ops.dequantize_per_tensor.default:
            found[node.args[0]] = None
        users = list(node.users)
        end = users[0] if len(users) == 1 and users[0].target in fused else node
        if [user.target for user in end.users] != [ops.quantize_per_tensor.default]:
            found[end] = None
    return list(found)


def _with_scale_of_reader(module: GraphModule, point: Node) -> bool:
    """Quantize a tensor as what reads it was in training, if anything was."""
    if (about := _of_reader(point)) is not None:
        _quantize(module, point, about)
    return about is not None


def _of_reader(node: Node) -> tuple[Any, ...] | None:
    """The quantization of a tensor behind operators that commute with rounding: moves of elements, and maxima."""
    import torch

    aten, quantize = torch.ops.aten, torch.ops.quantized_decomposed.quantize_per_tensor.default
    passing = {*moving(), aten.max_pool1d.default, aten.max_pool2d.default}
    for user in node.users:
        if user.target is quantize:
            return tuple(user.args[1:])
    later = (_of_reader(user) for user in node.users if user.target in passing)
    return next((about for about in later if about is not None), None)


def _ranges(module: GraphModule, points: Iterable[Node], spec: ExportSpec) -> dict[Node, tuple[float, float]]:
    """The least and the greatest element of each tensor over all batches."""
    import torch

    found = dict.fromkeys(points, (math.inf, -math.inf))

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n in found:
                least, most = found[n]
                found[n] = min(least, float(value.min())), max(most, float(value.max()))
            return value

    watching = Watching(module)
    with torch.no_grad():
        for arrays in calibration(spec):
            watching.run(*(torch.from_numpy(arrays[name]) for name in spec.input_names))
    return found


def _steps(least: float, most: float) -> tuple[float, int, int, int, torch.dtype]:
    """Scale, zero point and limits of int8 for a range, which 0 is in."""
    import torch

    least, most = min(least, 0.0), max(most, 0.0)
    scale = max((most - least) / 255, float(np.finfo(np.float32).eps))
    return scale, max(-128, min(127, round(-128 - least / scale))), -128, 127, torch.int8


def _quantize(module: GraphModule, point: Node, about: tuple[Any, ...]) -> None:
    """Insert `quantize` and `dequantize` between a tensor and everything that reads it."""
    import torch

    ops, graph = torch.ops.quantized_decomposed, module.graph
    with graph.inserting_after(point):
        steps = graph.call_function(ops.quantize_per_tensor.default, (point, *about))
    with graph.inserting_after(steps):
        back = graph.call_function(ops.dequantize_per_tensor.default, (steps, *about))
    point.replace_all_uses_with(back, delete_user_cb=lambda user: user is not steps)
    for again in [user for user in back.users if user.target is steps.target and user.args[1:] == about]:
        again.replace_all_uses_with(steps)
        graph.erase_node(again)
