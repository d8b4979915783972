"""Einsum decomposed, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from polyexport.tracing.decompositions.einsum import einsum

SIZES = {"b": 2, "t": 3, "d": 4, "n": 5, "h": 6, "k": 7, "w": 1}


def operands(equation: str) -> list[torch.Tensor]:
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return [torch.rand([SIZES[axis] for axis in term.replace("...", "bt")]) for term in terms]


@pytest.mark.parametrize(
    "equation",
    [
        "bthd,bkhd->bhtk",
        "btd,dn->btdn",
        "btd,btn,btd->btdn",
        "bdn,bn->bd",
        "bthd,hdk->btk",
        "btd->bd",
        "btd->dtb",
        "bd,bd->b",
        "bd,bd->",
        "b,d->bd",
        "bhtd,tkd->bhtk",
        "bthn,kdhn->btkdn",
        "...d,dk->...k",
        "...d,...d->...",
        "bt...,td->bd...",
        "bd,dk",
        "...d,dk",
        "bt,bt",
        "bdn,bd,bn->b",
        " b t d , d n -> b n t ",
        "nwd,nkd->nwk",
    ],
)
def test_einsum_in_parts_is_einsum(equation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(equation)
    expected = torch.einsum(equation, *tensors)
    monkeypatch.delattr(torch, "einsum")
    torch.testing.assert_close(einsum(equation, *tensors), expected)
    torch.testing.assert_close(einsum(equation, tensors), expected)


def test_equations_that_need_no_decomposition_are_unchanged() -> None:
    square, row = torch.rand(3, 3), torch.rand(1, 3)
    assert torch.equal(einsum("ii->i", square), square.diagonal())
    assert torch.equal(einsum("bd,bd->bd", square, row), square * row)
    assert torch.equal(einsum(square, [0, 1], [1, 0]), square.T)
