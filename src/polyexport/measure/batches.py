"""The batches that artifacts are verified with: other sizes, further data, and other values made from the data.

PyTorch answers for each. What forward reads of the values decides how many are worth a try.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from polyexport.measure import dynamic_axes
from polyexport.measure.dynamic_axes import Axes, Dynamic, resized
from polyexport.measure.other_values import changed, edges, jittered
from polyexport.measure.parity import compare
from polyexport.measure.size_branches import branching
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays, Runner
from polyexport.tracing.attention import plain_attention
from polyexport.tracing.reads import FailedAt, Reads, reads


@dataclass(frozen=True, slots=True)
class Answered:
    """Inputs with PyTorch's outputs, of which `silent` are not compared; other fields as in `Batch`."""

    arrays: Arrays
    sizes: Mapping[str, int] = field(default_factory=dict)
    label: str = ""
    real: bool = True
    silent: frozenset[str] = frozenset()

    @property
    def compared(self) -> Arrays:
        """The inputs, and the outputs that artifacts are compared with."""
        return {name: array for name, array in self.arrays.items() if name not in self.silent}


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches that artifacts are verified with.

    Attributes:
        axes: The dynamic axes.
        sizes: Their sizes in the validation batch.
        batches: The validation batch, batches of other sizes, of the data, and of other values.
        static_because: Why no axis is dynamic although one was asked for; else empty.
        tried: What forward read of their values.
    """

    axes: Axes
    sizes: Mapping[str, int]
    batches: tuple[Answered, ...]
    static_because: str
    tried: Tried


def gather(
    model: Any, run: Runner, inputs: Arrays, outputs: Arrays, others: Mapping[int, Arrays], dynamic: Dynamic
) -> Batches:
    """Choose dynamic axes and batches, and run PyTorch on them; `others` are the inputs of further calls by index."""
    axes, sizes, sized, why_not = _sized(run, inputs, outputs, others, dynamic)
    sized += _of_other_branches(model, run, inputs, outputs, axes, [sizes, *(each.sizes for each in sized)])
    values, tried = _with_other_values(model, run, inputs, outputs, [each.arrays for each in sized if each.label])
    valued = [replace(each, sizes=sizes) for each in values]
    return Batches(axes, sizes, (Answered(inputs | outputs, sizes), *sized, *valued), why_not, tried)


def _of_other_branches(
    model: Any, run: Runner, inputs: Arrays, outputs: Arrays, axes: Axes, known: Sequence[Mapping[str, int]]
) -> list[Answered]:
    """Batches of sizes at which forward takes another branch than at the `known` ones, if PyTorch can run them."""
    found = []
    for sizes in branching(model, inputs, axes, known):
        batch = resized(inputs, axes, sizes)
        answer = dynamic_axes.answered(run, batch, outputs, "")
        if not isinstance(answer, str):
            found.append(Answered(batch | answer, sizes, "a size at which forward takes another branch", real=False))
    return found


def _sized(
    run: Runner, inputs: Arrays, outputs: Arrays, others: Mapping[int, Arrays], dynamic: Dynamic
) -> tuple[Axes, dict[str, int], list[Answered], str]:
    """Dynamic axes, their sizes in the validation batch, batches of other sizes and values, and why no axis is dynamic.

    Of the further batches, the first, the smallest and the largest are used.
    """
    axes = dynamic_axes.chosen(inputs, tuple(others.values()), dynamic)
    sizes = dynamic_axes.sizes_of(inputs, axes)
    found, why_not = dynamic_axes.further(run, inputs, outputs, axes, sizes)
    real = _real(run, inputs, outputs, others, axes)
    if why_not and all(each.sizes == sizes for each in real):
        axes, sizes = {}, {}
        real = _real(run, inputs, outputs, others, axes)
    else:
        why_not = ""
    return axes, sizes, [*(Answered(batch, at) for at, batch in found), *real], why_not


def _real(run: Runner, inputs: Arrays, outputs: Arrays, others: Mapping[int, Arrays], axes: Axes) -> list[Answered]:
    """Of further batches the first, the smallest and the largest, if they fit and PyTorch can run them."""
    fitting: dict[int, dict[str, int]] = {}
    for index, batch in others.items():
        sizes = dynamic_axes.fitting(batch, inputs, axes)
        if sizes is not None:
            fitting[index] = sizes
    by_size = sorted(fitting, key=lambda index: sum(array.size for array in others[index].values()))
    found = []
    for index in dict.fromkeys([*fitting][:1] + by_size[:1] + by_size[-1:]):
        label = f"batch {index + 1} of the data"
        answer = dynamic_axes.answered(run, others[index], outputs, label)
        if not isinstance(answer, str):
            found.append(Answered(others[index] | answer, fitting[index], label))
    return found


_ENOUGH = 6
"""How many changes of values are tried if forward reads data into Python; else it is one."""
_A_TENTH = replace(Tolerance.for_precision("float32"), rtol=1e-4, atol=1e-5)
"""A tenth of the float32 tolerance: outputs that rounding changes more are not used."""


class Tried:
    """What forward read of the values of each batch, and the branches that it took."""

    def __init__(self) -> None:
        self.values: dict[str, set[tuple[str, ...]]] = {}
        self.paths: set[int] = set()
        self.counts: set[tuple[str, int]] = set()
        self.guards = False
        self.ties = False
        self.folded: set[int] = set()
        self.refused: set[str | None] = set()

    def add(self, told: Reads) -> None:
        """Take over what forward read of one more batch."""
        self.paths.add(told.path)
        self.counts |= told.counts
        self.guards |= told.guards
        self.ties |= told.ties
        self.folded |= told.folded
        for site, values in told.values.items():
            self.values.setdefault(site, set()).add(values)

    def is_news(self, told: Reads) -> bool:
        """Whether it takes another branch, reads another value where there was only one, or selects none or one."""
        return (
            told.path not in self.paths
            or not told.counts <= self.counts
            or any(
                values not in self.values.get(site, ()) and len(self.values.get(site, ())) < 2
                for site, values in told.values.items()
            )
        )

    def one_side(self) -> tuple[str, ...]:
        """Lines at which only one branch was seen: always the same boolean, or numbers that led to one branch.

        A line counts as tried too if another value makes forward raise.
        """
        return tuple(
            site
            for site, found in self.values.items()
            if site not in self.refused
            and (
                len(found) == 1 or (len(self.paths) == 1 and not {"True", "False"}.issuperset(itertools.chain(*found)))
            )
        )


def _with_other_values(
    model: Any, run: Runner, inputs: Arrays, outputs: Arrays, real: Sequence[Arrays]
) -> tuple[list[Answered], Tried]:
    """Batches with values made from the data, and what forward read in them: only changes that make a difference."""
    tried = Tried()
    for batch in (inputs, *real):
        with contextlib.suppress(FailedAt):  # it ran before, so only the recording fails
            tried.add(_reads(model, batch))
    found: list[Answered] = []
    for label, values in changed(inputs, [{name: batch[name] for name in inputs} for batch in real]):
        if len(found) >= (_ENOUGH if tried.values or tried.counts else 1):
            break
        try:
            told = _reads(model, values)
        except FailedAt as error:
            if isinstance(dynamic_axes.answered(run, values, outputs, ""), str):
                tried.refused.add(error.site)
                continue
            told = Reads({}, 0)  # only the watching failed
        answer = _sound(run, values, outputs) if not found or tried.is_news(told) else None
        if answer is not None:
            found.append(Answered(values | answer, label=label, real=False))
            tried.add(told)
    folded = [name for index, name in enumerate(inputs) if index in tried.folded and inputs[name].dtype == np.int64]
    for label, values in edges(inputs, guards=tried.guards, sparse=tried.ties, folded=folded):
        if all(np.array_equal(values[name], inputs[name]) for name in inputs):
            continue
        answer, silent = _told(run, values, outputs)
        if len(silent) < len(outputs):
            found.append(Answered(values | answer, label=label, real=False, silent=silent))
    return found, tried


def _reads(model: Any, inputs: Arrays) -> Reads:
    return plain_attention()(reads)(model, inputs)


def _sound(run: Runner, inputs: Arrays, outputs: Arrays) -> Arrays | None:
    """PyTorch's outputs, if they are finite where `outputs` are, and not sensitive to rounding; else None."""
    answer, silent = _told(run, inputs, outputs)
    return None if silent else answer


def _told(run: Runner, inputs: Arrays, outputs: Arrays) -> tuple[Arrays, frozenset[str]]:
    """PyTorch's outputs, and the names of those that say nothing: all of them if PyTorch cannot run the inputs.

    They are not finite where `outputs` are, or rounding changes them much.
    """
    answer = dynamic_axes.answered(run, inputs, outputs, "")
    moved = dynamic_axes.answered(run, jittered(inputs), outputs, "")
    if isinstance(answer, str) or isinstance(moved, str):
        return {}, frozenset(outputs)
    silent = {
        name
        for name, array in answer.items()
        if (array.size and np.isfinite(array).mean() < np.isfinite(outputs[name]).mean())
        or not compare({name: moved[name]}, {name: array}, _A_TENTH).passed
    }
    return answer, frozenset(silent)
