"""Batches of other values in the shapes of the validation batch, which show whether an artifact fixed its values.

Integers stay within the range seen in the data, or between it and zero, since they may be indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from polyexport.spec import Arrays

Kind = Literal["real", "mask", "integer"]
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def kind(arrays: Sequence[np.ndarray]) -> Kind:
    """The kind of an input's values over several batches; a mask has only 0 and 1."""
    if all(np.isin(array, (0, 1)).all() for array in arrays):
        return "mask"
    return "real" if np.issubdtype(arrays[0].dtype, np.inexact) else "integer"


def changed(inputs: Arrays, others: Sequence[Arrays] = ()) -> Iterator[tuple[str, Arrays]]:
    """Label and values of one change after another, the most revealing first; `others` are further real batches.

    Changes that have no effect on any input are left out; an input without elements is not changed.
    """
    filled = {name: array for name, array in inputs.items() if array.size}
    kinds = {name: kind([array, *(other[name] for other in others)]) for name, array in filled.items()}
    for label, by_kind in _CHANGES.items():
        random = np.random.default_rng(0)
        values = {
            name: np.asarray(by_kind[kinds[name]](array, random), array.dtype)
            for name, array in filled.items()
            if kinds[name] in by_kind
        }
        if any(not np.array_equal(value, inputs[name]) for name, value in values.items()):
            yield label, {name: values.get(name, array) for name, array in inputs.items()}


def edges(inputs: Arrays, *, guards: bool, sparse: bool, folded: Sequence[str]) -> Iterator[tuple[str, Arrays]]:
    """Label and values with zeros in the place of some real ones, where logarithms, angles and quotients have edges.

    With `guards`, for a forward that looks for NaN or infinity, the same with those. They are `sparse`, one in each
    row, for a forward that chooses among equal elements in an order that PyTorch does not define. The inputs in
    `folded`, in which any integer will do, have integers that 32 bits do not hold.
    """
    gaps = {"zeros": (0.0,), **({"NaN": (np.nan,), "infinities": (np.inf, -np.inf)} if guards else {})}
    for called, each in gaps.items():
        yield f"{called} among the values", _gapped(inputs, each, sparse=sparse)
    if folded:
        random = np.random.default_rng(0)
        wide = {name: random.integers(1 << 33, 1 << 40, inputs[name].shape, np.int64) for name in folded}
        yield "integers of more than 32 bits", {**inputs, **wide}


def _gapped(inputs: Arrays, gaps: Sequence[float], *, sparse: bool) -> Arrays:
    """The inputs with any of `gaps` in the place of some real values."""
    random, found = np.random.default_rng(0), dict(inputs)
    for name, array in inputs.items():
        if kind([array]) == "real" and array.size:
            drawn = random.random(array.shape)
            rows = tuple(range(1, array.ndim)) or None
            chosen = drawn == drawn.min(rows, keepdims=True) if sparse else drawn < _GAPS
            found[name] = np.where(chosen, random.choice(gaps, array.shape), array).astype(array.dtype)
    return found


_GAPS = 0.2
"""The share of the values that become zeros, NaN or infinite."""


def jittered(inputs: Arrays) -> Arrays:
    """The inputs with real values changed by a millionth: outputs that this changes much are sensitive to rounding."""
    random = np.random.default_rng(0)
    return {
        name: np.asarray(array * (1 + 1e-6 * random.choice((-1, 1), array.shape)), array.dtype)
        if np.issubdtype(array.dtype, np.inexact)
        else array
        for name, array in inputs.items()
    }


def _shuffled(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return random.permutation(array.reshape(-1)).reshape(array.shape)


def _mixed(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each row averaged with the one before, or a single row with itself reversed; every second row negated."""
    if not array.ndim:
        return -array
    rows = (array + (np.roll(array, 1, 0) if len(array) > 1 else np.flip(array, -1))) / 2
    signs = np.where(np.arange(len(array)) % 2, 1, -1)
    mixed: np.ndarray = rows * signs.reshape(-1, *[1] * (array.ndim - 1))
    return mixed


def _times(factor: float) -> Change:
    return lambda array, random: array * factor


def _shifted(steps: float) -> Change:
    return lambda array, random: array + steps * array.std()


def _constant(choose: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda array, random: np.full_like(array, choose(array))


def _lengths(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Ones up to an index along the last axis, which differs from row to row."""
    if not array.ndim:
        return array
    length = array.shape[-1]
    ends = 1 + np.arange(array.size // length) % length
    ones: np.ndarray = np.arange(length) < ends.reshape(*array.shape[:-1], 1)
    return ones.astype(array.dtype)


_CHANGES: Mapping[str, Mapping[Kind, Change]] = {
    "rows mixed and negated": {"real": _mixed, "integer": _shuffled},
    "elements shuffled": {"real": _shuffled, "integer": _shuffled, "mask": _shuffled},
    "negated": {"real": _times(-1)},
    "8 times as large": {"real": _times(8)},
    "lengths varied": {"mask": _lengths, "integer": lambda array, random: array - array // 2},
    "an eighth as large": {"real": _times(0.125)},
    "masks inverted": {"mask": lambda array, random: 1 - array.astype(np.int8)},
    "masks full": {"mask": _constant(lambda array: np.ones((), array.dtype))},
    "masks empty": {"mask": _constant(lambda array: np.zeros((), array.dtype))},
    "integers at their least": {"integer": _constant(np.min)},
    "integers at their greatest": {"integer": _constant(np.max)},
    "shifted up": {"real": _shifted(4)},
    "shifted down": {"real": _shifted(-4)},
    "absolute values": {"real": lambda array, random: np.abs(array)},
    "100 times as large": {"real": _times(100)},
    "a hundredth as large": {"real": _times(0.01)},
    "10000 times as large": {"real": _times(1e4)},
    "all zero": {"real": lambda array, random: np.zeros_like(array)},
}
