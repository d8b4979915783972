"""`torch.einsum` as matrix products, sums and permutations, for converters without Einsum.

No sizes are read, so that dynamic axes stay dynamic: axes are moved or added, never merged.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's function, and its replacement with the same signature."""
    import torch

    return {torch.einsum: einsum}


def einsum(equation: Any, *operands: Any) -> torch.Tensor:
    """`torch.einsum`, two operands at a time; equations with diagonals or broadcast axes of size 1 stay as they are."""
    import torch

    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    parsed = _parsed(equation, [tensor.dim() for tensor in tensors]) if isinstance(equation, str) else None
    if parsed is None or not _same_sizes(parsed[0], tensors):
        return torch.einsum(equation, *operands)
    terms, wanted = parsed
    found, axes = tensors[0], terms[0]
    for index in range(1, len(tensors)):
        kept = set(wanted).union(*terms[index + 1 :])
        found, axes = _product(found, axes, tensors[index], terms[index], kept)
    found, axes = _summed(found, axes, wanted)
    return found.permute([axes.index(axis) for axis in wanted])


def _parsed(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result, with `...` expanded; None for a diagonal."""
    left, arrow, wanted = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    counts = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    longest = max((count for term, count in zip(terms, counts, strict=True) if "..." in term), default=0)
    others = [letter for letter in string.ascii_letters if letter not in equation][:longest]
    if len(others) < longest:
        return None
    full = "".join(others)
    terms = [term.replace("...", full[longest - count :]) for term, count in zip(terms, counts, strict=True)]
    if not arrow:
        letters = "".join(terms)
        wanted = "..." + "".join(sorted(each for each in set(letters) - set(full) if letters.count(each) == 1))
    wanted = wanted.replace("...", full)
    plain = all(len(set(term)) == len(term) for term in (*terms, wanted))
    return (terms, wanted) if plain and set(wanted) <= set("".join(terms)) else None


def _same_sizes(terms: Sequence[str], tensors: Sequence[torch.Tensor]) -> bool:
    sizes: dict[str, set[int]] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for axis, size in zip(term, tensor.shape, strict=True):
            if type(size) is int:  # not a traced value
                sizes.setdefault(axis, set()).add(size)
    return all(len(found) == 1 for found in sizes.values())


def _product(
    one: torch.Tensor, axes: str, other: torch.Tensor, others: str, kept: Collection[str]
) -> tuple[torch.Tensor, str]:
    """The product of two operands and its axes, summed over those that are not `kept`."""
    one, axes = _summed(one, axes, {*kept, *others})
    other, others = _summed(other, others, {*kept, *axes})
    shared = [axis for axis in axes if axis in others]
    rows, columns = ([axis for axis in mine if axis not in theirs] for mine, theirs in ((axes, others), (others, axes)))
    inner = [axis for axis in shared if axis not in kept][-1:]
    if not inner or not (rows or columns):
        together = [*shared, *rows, *columns]
        return _summed(_laid(one, axes, together) * _laid(other, others, together), "".join(together), kept)
    row, column = rows[-1:] or [_ADDED], columns[-1:] or [_ADDED]
    batch = [axis for axis in shared if axis not in inner] + rows[:-1] + columns[:-1]
    product = _laid(one, axes, batch + row + inner) @ _laid(other, others, batch + inner + column)
    made = [*batch, *row, *column]
    if _ADDED in made:
        product = product.squeeze(made.index(_ADDED))
        made.remove(_ADDED)
    return _summed(product, "".join(made), kept)


_ADDED = "."
"""The letter of an axis of size 1 that is added to make a vector a matrix."""


def _summed(tensor: torch.Tensor, axes: str, kept: Collection[str]) -> tuple[torch.Tensor, str]:
    over = [index for index, axis in enumerate(axes) if axis not in kept]
    return (tensor.sum(over) if over else tensor), "".join(axis for axis in axes if axis in kept)


def _laid(tensor: torch.Tensor, axes: str, wanted: Sequence[str]) -> torch.Tensor:
    """The tensor with its axes in the order `wanted`, missing ones of size 1."""
    tensor = tensor.permute([axes.index(axis) for axis in wanted if axis in axes])
    for index, axis in enumerate(wanted):
        if axis not in axes:
            tensor = tensor.unsqueeze(index)
    return tensor
