"""Attention as ExecuTorch gets it: of matrix products and a softmax where it has no mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyexport.formats.executorch import _decompose_attention
from polyexport.tracing.exported_program import export_program

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
attention = functional.scaled_dot_product_attention


class Attending(nn.Module):
    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.attend(x, y)
        return made.transpose(1, 2).reshape(made.shape[0], -1)


UNMASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "self": lambda x, y: attention(x, x, x),
    "cross": lambda x, y: attention(x, y, y),
    "scaled": lambda x, y: attention(x, y, y, scale=0.5),
    "wider values": lambda x, y: attention(x, y, torch.cat([y, y], -1)),
    "three axes": lambda x, y: attention(x[:, 0], y[:, 0], y[:, 0]),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked": lambda x, y: attention(x, y, y, x[..., :1] > y[..., 0][:, :, None]),  # with rows without any key
    "causal": lambda x, y: attention(x, x, x, is_causal=True),
    "shared keys": lambda x, y: attention(x, y[:, :1], y[:, :1], enable_gqa=True),
}


def decomposed(attend: Callable[[Tensor, Tensor], Tensor]) -> torch.fx.GraphModule:
    """Traced, decomposed and traced again, as the format does; it agrees with PyTorch on another batch."""
    module, inputs = Attending(attend), (torch.rand(2, 3, 5, 4), torch.rand(2, 3, 7, 4))
    program = export_program(module, inputs, [[0], [0]]).module()
    _decompose_attention(program)
    again = export_program(program, inputs, [[0], [0]])
    more = [torch.rand(4, *each.shape[1:]) for each in inputs]
    torch.testing.assert_close(again.module()(*more), module(*more))
    return again.graph_module


@pytest.mark.parametrize("name", UNMASKED)
def test_attention_without_a_mask_is_products_and_a_softmax(name: str) -> None:
    targets = {node.target for node in decomposed(UNMASKED[name]).graph.nodes}
    assert ATTENTION not in targets
    assert torch.ops.aten.bmm.default in targets


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_stays_pytorchs(name: str) -> None:
    assert ATTENTION in {node.target for node in decomposed(OTHERS[name]).graph.nodes}


def test_masked_attention_by_position_is_decomposed_further() -> None:
    """What PyTorch's kernel is decomposed into has another layout than it, of which a view was traced."""

    class ByPosition(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return attention(heads, heads, heads, mask).transpose(1, 2).reshape(*x.shape).view(-1, 8)

    module, inputs = ByPosition(), (torch.rand(2, 5, 8), torch.rand(2, 1, 5, 5) > 0.3)
    program = export_program(module, inputs, [[0], [0]]).module()
    _decompose_attention(program)
    again = export_program(program, inputs, [[0], [0]]).run_decompositions()
    assert ATTENTION not in {node.target for node in again.graph.nodes}
    torch.testing.assert_close(again.module()(*inputs), module(*inputs))
