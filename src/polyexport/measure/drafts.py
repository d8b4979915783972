"""Which of several ways to quantize a model is kept, and which layers go back to float: what the outputs tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyexport.spec import Arrays

NEAR = 0.05
"""Relative error of the outputs up to which nothing more is tried."""

SHARES = (1 / 8, 1 / 4, 1 / 2)
"""The costliest eighth of the layers is put back to float, then the costliest quarter, then half of them."""

_SECONDS = 120.0
"""How long the cost of single layers is looked for; a large model has more than fit."""


_WRAPPER = "inner."
"""What the names of a module's own parts begin with in what is exported, see `capture.flatten`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A quantized model.

    Attributes:
        model: In its framework's own form.
        how: In which way it was made.
        error: How far its outputs are from the float model's, see `distance`.
        kept: The layers that stay in float on purpose.
    """

    model: Any
    how: str
    error: float
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """A layer, what it is called in a report, and the error of the outputs where it alone is quantized."""

    layer: str
    called: str
    error: float


def distance(expected: Iterable[Arrays], found: Iterable[Arrays]) -> float:
    """Norm of the errors of all float outputs, each relative to that of the output; infinite where one is NaN."""
    least = float(np.finfo(np.float32).tiny)
    errors = [
        float(np.linalg.norm(theirs[name] - array)) / max(float(np.linalg.norm(array)), least)
        for ours, theirs in zip(expected, found, strict=True)
        for name, array in ours.items()
        if array.dtype.kind == "f"
    ]
    return float(np.nan_to_num(np.linalg.norm(errors) / max(1.0, len(errors)) ** 0.5, nan=np.inf))


def best(drafts: Iterable[Draft]) -> Draft:
    """The draft whose outputs are the nearest."""
    return min(drafts, key=lambda each: each.error)


def mended(
    drafts: Sequence[Draft],
    layers: Mapping[str, str],
    make: Callable[[Sequence[str], Sequence[str]], Draft],
    share: float = 0.0,
) -> tuple[Draft, str]:
    """The best draft, after layers that cost the most were put back to float where it is far; and what was done.

    Args:
        drafts: What was made so far.
        layers: Those that can be kept in float, and what each is called in a report.
        make: `make(kept, alone)` quantizes all layers but `kept`, or where it is given `alone`, on the first batch.
        share: Of the layers that are put back to float, however near the drafts are; 0 where that decides.
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
    return chosen, f"back to float32, by the error that each makes alone: {kept} (error of the outputs {errors})"


def _costs(layers: Mapping[str, str], make: Callable[[Sequence[str], Sequence[str]], Draft]) -> list[Cost]:
    """The costliest first, of as many as fit in `_SECONDS`."""
    start, found = time.monotonic(), []
    for layer, called in layers.items():
        if time.monotonic() - start < _SECONDS:
            found.append(Cost(layer, called, make((), (layer,)).error))
    return sorted(found, key=lambda each: -each.error)


def _rounds(
    costs: Sequence[Cost], make: Callable[[Sequence[str], Sequence[str]], Draft], shares: Iterable[float]
) -> Iterator[Draft]:
    """Drafts with more and more of the costliest layers in float, until one is near."""
    for count in sorted({math.ceil(len(costs) * share) for share in shares} - {0}):
        draft = make([each.layer for each in costs[:count]], ())
        yield draft
        if draft.error <= NEAR:
            return
