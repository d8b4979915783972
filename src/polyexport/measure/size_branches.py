"""Sizes at which forward takes another branch than at those of the data, as for `if x.shape[1] > 512`.

A trace keeps one branch, and is right at all sizes that take it. Requirements:
* Sizes are tried with tensors that have no values, so that a larger one costs nothing. Where forward reads its data
  into Python it is run instead, at sizes that are not much larger.
* A loop over an axis differs at each size, and needs no further size to be found.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from polyexport.capture.answer import left_as_it_is
from polyexport.measure.dynamic_axes import Axes, resized
from polyexport.spec import Arrays
from polyexport.tracing.attention import plain_attention
from polyexport.tracing.reads import path

Sizes = Mapping[str, int]

_NEAR, _FAR = 4, 16
"""How many times the data's size is tried, where forward needs values and where it does not."""
_ELEMENTS = 2**22
"""Inputs with more elements are not run."""


def branching(model: Any, inputs: Arrays, axes: Axes, known: Sequence[Sizes]) -> Iterator[dict[str, int]]:
    """For each dynamic axis the least size, if there is one, that takes a branch that none of the `known` sizes does.

    `known` begins with the sizes of `inputs`. Sizes are left out at which the inputs are too large to be run.
    """
    if not known[0]:
        return

    @functools.cache
    def path_of(sizes: tuple[tuple[str, int], ...]) -> int | None:
        found = _path(model, _valueless(model, inputs, axes, dict(sizes)))
        is_near = all(size <= _NEAR * known[0][name] + 1 for name, size in sizes)
        return _path(model, _filled(model, inputs, axes, dict(sizes))) if found is None and is_near else found

    with left_as_it_is(model):
        found = [_first_other(lambda sizes: path_of(tuple(sizes.items())), name, known) for name in known[0]]
    yield from (at for at in found if at is not None and _elements(inputs, axes, at) <= _ELEMENTS)


def _first_other(path_of: Callable[[Sizes], int | None], name: str, known: Sequence[Sizes]) -> dict[str, int] | None:
    """The least size of the axis `name` that takes a branch of its own; `path_of` is None where forward fails."""
    size = known[0][name]

    def path_at(other: int) -> int | None:
        return path_of({**known[0], name: other})

    seen = {path_of(each) for each in known}
    nearby = [path_at(size + more) for more in (0, 1, 2)]
    if None in (*seen, *nearby) or len(set(nearby)) == len(nearby):  # it fails, or is a loop over the axis
        return None
    last = size
    for other in (size + 1, size + 2, _NEAR * size + 1, _FAR * size + 1):
        found = path_at(other)
        if found is not None and found not in seen:
            return {**known[0], name: _least(lambda n: path_at(n) in seen, last, other)}
        last = other if found in seen else last
    return None


def _least(is_known: Callable[[int], bool], known: int, other: int) -> int:
    """The least size between them that is not known, if there is one border only."""
    while other - known > 1:
        middle = (known + other) // 2
        known, other = (middle, other) if is_known(middle) else (known, middle)
    return other


def _path(model: Any, tensors: Sequence[Any] | None) -> int | None:
    if tensors is None:
        return None
    try:
        return plain_attention()(path)(model, tensors)
    except Exception:  # forward is the user's, and may take no such sizes, or need values
        return None


def _valueless(model: Any, inputs: Arrays, axes: Axes, sizes: Sizes) -> list[Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return [
            torch.empty(_shape(inputs, axes, sizes, name), dtype=_dtype(inputs[name])) for name in model.input_names
        ]


def _filled(model: Any, inputs: Arrays, axes: Axes, sizes: Sizes) -> list[Any] | None:
    import torch

    if _elements(inputs, axes, sizes) > _ELEMENTS:
        return None
    batch = resized(inputs, axes, sizes)
    return [torch.from_numpy(batch[name].copy()) for name in model.input_names]


def _dtype(array: Any) -> Any:
    import torch

    return torch.from_numpy(array[:0] if array.ndim else array).dtype


def _shape(inputs: Arrays, axes: Axes, sizes: Sizes, name: str) -> list[int]:
    named = axes.get(name, {})
    return [sizes[named[axis]] if axis in named else size for axis, size in enumerate(inputs[name].shape)]


def _elements(inputs: Arrays, axes: Axes, sizes: Sizes) -> int:
    return sum(math.prod(_shape(inputs, axes, sizes, name)) for name in inputs)
