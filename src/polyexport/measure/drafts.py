"""Chooses between ways to quantize a model, and which layers get more bits, by the error of the outputs."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyexport.spec import Arrays

NEAR = 0.05
"""Relative error of the outputs below which nothing more is tried."""

SHARES = (1 / 8, 1 / 4, 1 / 2)
"""The costliest eighth of the layers is put back to float, then the costliest quarter, then half of them."""

IN_FOUR_BITS = (7 / 8, 3 / 4, 1 / 2)
"""Shares of the weights that are in 4 bits, in one draft after the other; the others are in 8."""

NEAR_IN_FOUR_BITS = 0.1
"""The same as `NEAR`, for weights in 4 bits, whose tolerance is twice as large."""

_SECONDS = 120.0
"""Processor time for measuring the cost of single layers; for a large model it is enough for some of them."""


_WRAPPER = "inner."
"""Prefix of the names of the module's own submodules in what is exported, see `capture.flatten`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A quantized model.

    Attributes:
        model: The model, in its framework's type.
        how: The way it was quantized.
        error: The error of its outputs, see `distance`.
        kept: The layers that were kept in float on purpose.
    """

    model: Any
    how: str
    error: float
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """A layer, its name in the report, and the error of the outputs if only it is quantized."""

    layer: str
    called: str
    error: float


def distance(expected: Iterable[Arrays], found: Iterable[Arrays]) -> float:
    """Norm of the errors of all outputs; infinite if one is NaN.

    Of floats it is the error relative to the output's norm, of integers the share that differs.
    """
    errors = [
        _error(array, theirs[name])
        for ours, theirs in zip(expected, found, strict=True)
        for name, array in ours.items()
    ]
    return float(np.nan_to_num(np.linalg.norm(errors) / max(1.0, len(errors)) ** 0.5, nan=np.inf))


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.dtype.kind != "f":
        return float(np.mean(found != expected))
    size = max(float(np.linalg.norm(expected)), float(np.finfo(np.float32).tiny))
    return float(np.linalg.norm(found - expected)) / size


def best(drafts: Iterable[Draft]) -> Draft:
    """The draft with the smallest error."""
    return min(drafts, key=lambda each: each.error)


def mended(
    drafts: Sequence[Draft],
    layers: Mapping[str, str],
    make: Callable[[Sequence[str], Sequence[str]], Draft],
    share: float = 0.0,
) -> tuple[Draft, str]:
    """The best draft, in which the costliest layers are kept in float if the error is large; and a note on that.

    Args:
        drafts: The models made so far.
        layers: The layers that can be kept in float, each with its name in the report.
        make: `make(kept, alone)` quantizes all layers but `kept`, or only `alone` if that is given, on the first batch.
        share: The share of the layers that are kept in float, however small the error is; 0 to decide by the error.
    """
    if best(drafts).error <= NEAR and not share:
        return best(drafts), ""
    costs = _costs(layers, make)
    rounds = list(_rounds(costs, make, (share,) if share else SHARES))
    for each in rounds:
        print(f"{len(each.kept)} layers in float: relative error {each.error:.3g}")
    chosen = best(rounds if share and rounds else [*drafts, *rounds])
    if not chosen.kept:
        return chosen, ""
    kept = ", ".join(
        f"{each.called.removeprefix(_WRAPPER)} ({each.error:.1%})" for each in costs if each.layer in chosen.kept
    )
    errors = ", then ".join(f"{each.error:.1%}" for each in (best(drafts), *rounds))
    return chosen, f"kept in float, each with the error that it alone causes: {kept} (error of the outputs: {errors})"


def partly(sizes: Mapping[str, int], total: int, make: Callable[[Collection[str]], Draft]) -> Draft:
    """The draft with the cheapest weights in 4 bits and the others in 8, the fewer in 4 the larger its error is.

    Args:
        sizes: The weights that can be in 4 bits, and how many numbers each has.
        total: How many numbers all weights have.
        make: `make(names)` stores only the weights with these names in 4 bits.
    """
    costs = {each.layer: each.error for each in _costs({name: name for name in sizes}, lambda _, alone: make(alone))}
    order = sorted(sizes, key=lambda name: costs.get(name, math.inf) ** 2 / sizes[name])
    drafts: list[Draft] = []
    for share in IN_FOUR_BITS:
        up_to = itertools.accumulate(sizes[name] for name in order)
        count = 1 + sum(sum_of < share * total for sum_of in up_to)
        drafts.append(make(order[:count]))
        print(f"{count} of {len(order)} weights in 4 bits: relative error {drafts[-1].error:.3g}")
        if drafts[-1].error <= NEAR_IN_FOUR_BITS:
            break
    return best(drafts)


def _costs(layers: Mapping[str, str], make: Callable[[Sequence[str], Sequence[str]], Draft]) -> list[Cost]:
    """The costs of as many layers as fit in `_SECONDS`, the highest first.

    Time without a processor does not count: a busy machine would have other layers in float than an idle one.
    """
    start, found = _processor_seconds(), []
    for layer, called in layers.items():
        if _processor_seconds() - start < _SECONDS:
            found.append(Cost(layer, called, make((), (layer,)).error))
    return sorted(found, key=lambda each: -each.error)


def _processor_seconds() -> float:
    """Processor time of this process, and of those it has waited for, which make the drafts of some formats."""
    return sum(os.times()[:4])


def _rounds(
    costs: Sequence[Cost], make: Callable[[Sequence[str], Sequence[str]], Draft], shares: Iterable[float]
) -> Iterator[Draft]:
    """Drafts with more and more of the costliest layers in float, until the error is small."""
    for count in sorted({math.ceil(len(costs) * share) for share in shares} - {0}):
        draft = make([each.layer for each in costs[:count]], ())
        yield draft
        if draft.error <= NEAR:
            return
