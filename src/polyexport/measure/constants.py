"""Arguments of forward that are not tensors: every artifact has their values of the first batch as constants.

A number, a string or a flag is configuration of the model. An array is data, and so is any value that differs in
another batch: if forward reads it, artifacts are right only for its first value. So is an integer that equals the
size of a dynamic axis, such as `len(x)`, as long as no batch of another size shows that it is something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.capture.calls import call_file, further_calls
from polyexport.capture.flatten import as_runner, constants, flat, to_arrays, with_constants
from polyexport.capture.pickling import restore
from polyexport.spec import Arrays, ExportSpec, Runner

_ADVICE = "give inputs=<a function of the batch> that makes it a tensor"


@dataclass(frozen=True, slots=True)
class Frozen:
    """The arguments that forward reads but that are constants in artifacts.

    Attributes:
        notes: Notes on arrays.
        narrow: Why artifacts are right only for the first batch's constants; empty if no others were seen.
    """

    notes: tuple[str, ...] = ()
    narrow: str = ""


def frozen(
    source: Path,
    model: Any,
    outputs: Arrays,
    spec: ExportSpec,
    others: Sequence[Arrays],
    within: Callable[[Runner], Runner],
) -> Frozen:
    """Find the constants that forward of the flat `model` of `source` reads.

    `outputs` are the model's for the first batch, `spec` is its signature, `others` are the further batches, and
    `within` sets up the context in which outputs are computed. Nothing is found for a trace, which has no constants.
    """
    if not hasattr(model, "inner"):
        return Frozen()
    call = restore(call_file(source))
    first = constants(model.inner.forward, *call)
    reads = functools.partial(_reads, model, call, outputs, within)
    for index, path in enumerate(further_calls(source)[:_TRIED] if first else (), 2):
        there = _constants(model, path)
        other = {name: there[name] for name, value in first.items() if name in there and not _same(value, there[name])}
        if found := _culprits(reads, other):
            had = ", ".join(f"{name}={_told(first[name])}" for name in found)
            has = ", ".join(_told(other[name]) for name in found)
            why = f"right for {had} only: forward reads it, it is not a tensor, and it is {has} in batch {index}"
            return Frozen(narrow=f"{why}; {_ADVICE}")
    sizes = {size: axis for axis, size in _equal_sizes(spec, others).items() if size > 1}
    counts = {name: value for name, value in first.items() if _is_integer(value) and value in sizes}
    if found := _culprits(reads, {name: value + 1 for name, value in counts.items()}):
        size = counts[found[0]]
        why = f"right for {sizes[size]}={size} only: forward reads {found[0]}, which is as large and not a tensor"
        return Frozen(narrow=f"{why}; {_ADVICE}")
    arrays = {name: _changed(value) for name, value in first.items() if _holds_numbers(value)}
    return Frozen(
        tuple(
            f"forward reads {name}, a numpy array, which becomes a constant in every artifact; {_ADVICE}"
            for name in _culprits(reads, arrays)
        )
    )


_TRIED = 3
"""How many further batches are checked."""
_NAMED = 4
"""How many constants are reported."""


def _equal_sizes(spec: ExportSpec, others: Sequence[Arrays]) -> dict[str, int]:
    """Each dynamic axis that has the same size in all batches, and that size."""
    varies = {
        axis
        for tensor in spec.inputs
        for index, axis in tensor.dynamic.items()
        if any(arrays[tensor.name].shape[index] != spec.sizes[axis] for arrays in others)
    }
    return {axis: size for axis, size in spec.sizes.items() if axis not in varies}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _culprits(reads: Callable[[Mapping[str, Any]], bool], changed: Mapping[str, Any]) -> list[str]:
    """The changed constants that forward reads, at most the first few."""
    if not changed or not reads(changed):
        return []
    alone = [name for name in list(changed)[:_SINGLY] if reads({name: changed[name]})]
    return alone[:_NAMED] or list(changed)[:_NAMED]


_SINGLY = 16


def _reads(
    model: Any, call: Any, outputs: Arrays, within: Callable[[Runner], Runner], changed: Mapping[str, Any]
) -> bool:
    """Whether forward returns something else, or fails, with the changed constants."""
    other = flat(model.inner, *with_constants(model.inner.forward, call, changed))
    other.within, other.kept = model.within, tuple(outputs)
    try:
        answer = within(as_runner(other))(to_arrays(other.input_names, other.example))
    except Exception:  # forward is the user's, and may refuse another value
        return True
    return not all(
        np.array_equal(answer[name], array, equal_nan=array.dtype.kind in "fc") for name, array in outputs.items()
    )


def _constants(model: Any, path: Path) -> dict[str, Any]:
    try:
        return constants(model.inner.forward, *restore(path))
    except Exception:  # a call with other arguments is left out, as in `_other_batches`
        return {}


def _holds_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.size > 0 and value.dtype.kind in "biufc"


def _changed(array: np.ndarray) -> np.ndarray:
    """An array of other numbers."""
    found: np.ndarray = ~array if array.dtype.kind == "b" else array + array.dtype.type(1)
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return type(one) is type(other) and bool(np.array_equal(one, other))
    try:
        return type(one) is type(other) and (not isinstance(one, _PLAIN) or bool(one == other))
    except Exception:  # the user's objects may not be comparable
        return True


_PLAIN = (bool, int, float, complex, str, bytes, np.generic)


def _told(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}…"
