"""Attention of `torch.nn` is traced with few axes, and computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polyexport.tracing.decompositions import decomposed


class Attention(nn.Module):
    """Queries, keys and values of inputs by their numbers."""

    def __init__(self, inputs: tuple[int, int, int], bias: bool) -> None:
        super().__init__()
        self.inputs, self.attention = inputs, nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.attention(*(tensors[index] for index in self.inputs))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [(0, 0, 0), (0, 1, 1), (0, 1, 2), (0, 0, 1), (0, 1, 0)])
def test_projections_are_separate_and_the_same(inputs: tuple[int, int, int], bias: bool) -> None:
    module, tensors = Attention(inputs, bias).eval(), tuple(torch.randn(3, 5, 8) for _ in range(3))
    with torch.no_grad(), decomposed():
        program = torch.export.export(module, tensors)
        traced = program.module()(*tensors)
    torch.testing.assert_close(traced, module(*tensors))
    assert max(node.meta["val"].dim() for node in program.graph.nodes if hasattr(node.meta.get("val"), "dim")) == 4
