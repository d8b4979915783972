"""Attention masks that exclude nothing are removed from programs; those that might exclude something stay."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from polyexport.tracing.constant_masks import remove_constant_masks
from polyexport.tracing.exported_program import export_program

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


def program_of(module: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    """The program with a dynamic batch, after the removal; it agrees with the module on another batch too."""
    module.eval()
    program = export_program(module, inputs, [[0] for _ in inputs])
    remove_constant_masks(program)
    torch.export.save(program, io.BytesIO())  # its signature is checked
    run = program.module()
    for given in (inputs, [torch.cat([each, each.flip(0)]) for each in inputs]):
        torch.testing.assert_close(run(*given), module(*given))
    return program


def masks(program: torch.export.ExportedProgram) -> list[object]:
    nodes = program.graph.find_nodes(op="call_function", target=ATTENTION)
    return [node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask") for node in nodes]


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class First(nn.Module):
    """The first output of a model of transformers, for an input and its padding mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(x, *([] if mask is None else [mask]))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_encoder_without_padding_has_no_mask(attention: str) -> None:
    vit = ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4, attn_implementation=attention))
    program = program_of(First(vit), torch.rand(2, 3, 8, 8))
    assert masks(program) == [None, None] * (attention == "sdpa")
    assert not program.graph.find_nodes(op="call_function", target=aten.arange.default), "nor what made it"


def test_a_padding_mask_stays() -> None:
    bert = BertModel(BertConfig(**SIZES, vocab_size=10))
    program = program_of(First(bert), torch.randint(10, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    assert len(masks(program)) == 2
    assert None not in masks(program)


class Masked(nn.Module):
    """Attention with a mask of positions, by `mask(q, k)` of column and row."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        mask = self.mask(position[:, None], position[None])
        return functional.scaled_dot_product_attention(x, x, x, mask.expand(x.shape[0], x.shape[1], x.shape[1]))


EMPTY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at least zero": lambda q, k: (q >= 0).expand(-1, k.shape[1]),
    "sums": lambda q, k: (q + 1 > 0) & (k + 2 - 1 != 0),
    "an end": lambda q, k: (q < 6) & (k <= 5),
    "one of them": lambda q, k: (q > k) | (q >= 0),
    "not": lambda q, k: ~(q < 0),
    "added": lambda q, k: torch.where(q >= 0, 0.0, float("-inf")),
    "a tensor added": lambda q, k: torch.where(q >= 0, torch.tensor(0.0), -3e38),
    "cast": lambda q, k: (q + k + 1).bool(),
    "differences": lambda q, k: q - k > -6,
}
FULL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda q, k: q >= k,
    "a window": lambda q, k: q - k < 5,
    "the first key": lambda q, k: k > 0,
    "cast": lambda q, k: (q + k).bool() | (k == 0),
    "one value": lambda q, k: (q != 3) | (k == 0),
    "added": lambda q, k: torch.where(q >= k, 0.0, float("-inf")),
    "a bias": lambda q, k: (q - k).float(),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_mask_of_positions_that_is_always_true_is_removed(name: str) -> None:
    assert masks(program_of(Masked(EMPTY[name]), torch.rand(2, 6, 4))) == [None]


@pytest.mark.parametrize("name", FULL)
def test_a_mask_of_positions_that_may_be_false_stays(name: str) -> None:
    assert None not in masks(program_of(Masked(FULL[name]), torch.rand(2, 6, 4)))


OTHERWISE_IN_ITS_DTYPE: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda x: x + torch.where(x > 0, 0.0, float("nan")),
    "a tensor of NaN": lambda x: x + torch.where(x > 0, torch.zeros_like(x), torch.tensor(float("nan"))),
    "a narrow cast": lambda x: torch.where(torch.arange(300).to(torch.int8)[200:204] >= 0, x, -x),
    "an unsigned difference": lambda x: torch.where(torch.zeros(4, dtype=torch.uint8) - 1 < 0, x, -x),
    "an overflow": lambda x: torch.where(torch.full((4,), 2**31 - 1, dtype=torch.int32) + 1 > 0, x, -x),
    "a sum of booleans": lambda x: torch.where(torch.ones(4).bool() + torch.ones(4).bool() == 1, x, -x),
    "float16": lambda x: torch.where(torch.full((4,), 2049.0, dtype=torch.float16) > 2048, x, -x),
    "beside float16": lambda x: torch.where(torch.tensor([2048.0]).half() < torch.full((4,), 2049), x, -x),
    "a fraction": lambda x: torch.where(torch.full((4,), 0.1).double() == 0.1, x, -x),
    "infinity": lambda x: torch.where(torch.full((4,), float("inf")).long() > 0, x, -x),
}


@pytest.mark.parametrize("name", OTHERWISE_IN_ITS_DTYPE)
def test_numbers_are_what_their_dtype_makes_of_them(name: str) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OTHERWISE_IN_ITS_DTYPE[name](x) * 2

    program = program_of(Chosen(), torch.ones(2, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(program.module()(x), Chosen()(x), equal_nan=True)


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        here = torch.arange(x.shape[1]) >= 0
        zeros = torch.zeros(x.shape[1])
        scores = x.masked_fill(~here, float("-inf")) + zeros
        wide = torch.where(here, x, zeros) + torch.zeros(3, 1, x.shape[1])  # the sum has another shape
        return scores.softmax(-1), wide * 2, x + zeros, torch.where(here, x[:1], x)


def test_sums_and_selections_without_effect_are_removed_where_the_shape_stays() -> None:
    program = program_of(Selecting(), torch.rand(2, 4))
    targets = [node.target for node in program.graph.nodes]
    assert aten.masked_fill.Scalar not in targets
    assert targets.count(aten.add.Tensor) == 2, "the wide one, and the one that is an output"
    assert targets.count(aten.where.self) == 1, "of another shape"


class Written(nn.Module):
    """Attention beside a constant mask, and sums with zeros, that operators in place write to."""

    def forward(self, x: Tensor) -> Tensor:
        added = torch.zeros(4, 4)
        added[:, 2:].chunk(2, 1)[1].fill_(float("-inf"))
        allowed = torch.ones(4, 4, dtype=torch.bool)
        allowed.view(16)[3:6].logical_not_()
        ones = torch.zeros(4)
        seen = ones.unsqueeze(0)
        ones += 1
        kept = x.clone()
        before = kept + torch.zeros(4)
        kept *= 2
        (grid,) = torch.meshgrid(torch.zeros(4), indexing="ij")
        broadcast = torch.zeros(4)
        torch.broadcast_tensors(broadcast, grid)[0].fill_(3)
        answers = [functional.scaled_dot_product_attention(x, x, x, attn_mask=mask) for mask in (added, allowed)]
        return answers[0] + answers[1] + (x + seen) + before + broadcast


def test_what_operators_in_place_write_to_is_not_constant() -> None:
    program = program_of(Written(), torch.randn(2, 1, 4, 4))
    assert None not in masks(program)
