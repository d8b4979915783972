"""Programs of `torch.export`, as converters read them: without what most of them have nothing for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program of a `.pt2`, with adaptive max pools as maxima of slices, where nobody asks for their places."""
    import torch

    program = torch.export.load(path)
    aten = torch.ops.aten
    pools = {aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default}
    nodes = [node for node in program.graph.nodes if node.target in pools]
    if not nodes or any(user.args[1] and user.users for node in nodes for user in node.users):
        return program
    taken_apart: torch.export.ExportedProgram = program.run_decompositions(dict.fromkeys(pools, _adaptive_maxima))
    return taken_apart


def _adaptive_maxima(x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima of parts as even as they can be, one axis after the other, and no places."""
    import torch

    for axis, count in enumerate(sizes, x.dim() - len(sizes)):
        size = x.shape[axis]
        bounds = [(part * size // count, -(-(part + 1) * size // count)) for part in range(count)]
        parts = [x.narrow(axis, begin, end - begin).amax(axis, keepdim=True) for begin, end in bounds]
        x = torch.cat(parts, axis) if count > 1 else parts[0]
    return x, torch.zeros_like(x, dtype=torch.int64)
