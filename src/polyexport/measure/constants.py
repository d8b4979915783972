"""What forward receives beside tensors, which every artifact keeps as it is in the first batch: a constant.

A number, a word or a switch is the model's configuration. An array is data, and so is whatever another batch has
otherwise: if forward reads it, artifacts are right for its first value only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.capture import snapshot
from polyexport.capture.flatten import as_runner, constants, flat, to_arrays, with_constants
from polyexport.spec import Arrays, Runner

_ADVICE = "give inputs=<a function of the batch> that makes it a tensor"


@dataclass(frozen=True, slots=True)
class Frozen:
    """What artifacts cannot be given, though forward reads it.

    Attributes:
        notes: On arrays.
        narrow: Why artifacts are right for the first batch's constants only; empty where no other ones were seen.
    """

    notes: tuple[str, ...] = ()
    narrow: str = ""


def frozen(source: Path, model: Any, outputs: Arrays, within: Callable[[Runner], Runner]) -> Frozen:
    """What forward of the flat `model` of `source` reads beside tensors; `outputs` are its answers to the first batch.

    `within` is the setting in which they were computed. Of a trace, whose constants are written down, nothing is known.
    """
    if not hasattr(model, "inner"):
        return Frozen()
    call = snapshot.restore(snapshot.call_file(source))
    first = constants(model.inner.forward, *call)
    reads = functools.partial(_reads, model, call, outputs, within)
    for index, path in enumerate(snapshot.further_calls(source)[:_TRIED] if first else (), 2):
        there = _constants(model, path)
        other = {name: there[name] for name, value in first.items() if name in there and not _same(value, there[name])}
        if found := _culprits(reads, other):
            had = ", ".join(f"{name}={_told(first[name])}" for name in found)
            has = ", ".join(_told(other[name]) for name in found)
            why = f"right for {had} only: forward reads it, it is no tensor, and it is {has} in batch {index}"
            return Frozen(narrow=f"{why}; {_ADVICE}")
    arrays = {name: _changed(value) for name, value in first.items() if _holds_numbers(value)}
    return Frozen(
        tuple(
            f"forward reads {name}, a numpy array, whose numbers are constants in every artifact; {_ADVICE}"
            for name in _culprits(reads, arrays)
        )
    )


_TRIED = 3
"""How many further batches are looked at."""
_NAMED = 4
"""How many constants are told of."""


def _culprits(reads: Callable[[Mapping[str, Any]], bool], changed: Mapping[str, Any]) -> list[str]:
    """Those of the changed constants that forward reads, or the first few of them."""
    if not changed or not reads(changed):
        return []
    alone = [name for name in list(changed)[:_SINGLY] if reads({name: changed[name]})]
    return alone[:_NAMED] or list(changed)[:_NAMED]


_SINGLY = 16


def _reads(
    model: Any, call: Any, outputs: Arrays, within: Callable[[Runner], Runner], changed: Mapping[str, Any]
) -> bool:
    """Whether forward answers otherwise, or not at all, where some constants are others."""
    other = flat(model.inner, *with_constants(model.inner.forward, call, changed))
    other.within, other.kept = model.within, tuple(outputs)
    try:
        answer = within(as_runner(other))(to_arrays(other.input_names, other.example))
    except Exception:  # forward is the user's, and another value may be none for it
        return True
    return not all(
        np.array_equal(answer[name], array, equal_nan=array.dtype.kind in "fc") for name, array in outputs.items()
    )


def _constants(model: Any, path: Path) -> dict[str, Any]:
    try:
        return constants(model.inner.forward, *snapshot.restore(path))
    except Exception:  # as in `_other_batches`, a call of another kind is left out
        return {}


def _holds_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.size > 0 and value.dtype.kind in "biufc"


def _changed(array: np.ndarray) -> np.ndarray:
    """Other numbers in its place."""
    found: np.ndarray = ~array if array.dtype.kind == "b" else array + array.dtype.type(1)
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return type(one) is type(other) and bool(np.array_equal(one, other))
    try:
        return type(one) is type(other) and (not isinstance(one, _PLAIN) or bool(one == other))
    except Exception:  # an object of the user's own need not be comparable
        return True


_PLAIN = (bool, int, float, complex, str, bytes, np.generic)


def _told(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}…"
