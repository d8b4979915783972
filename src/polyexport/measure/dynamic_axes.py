"""Which axes of a module's inputs are dynamic, and the sizes at which that is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polyexport.errors import BadRequest, line
from polyexport.spec import Arrays, ExportSpec, Runner, TensorSpec, repeated

Dynamic = bool | Mapping[str, Mapping[int, str]]
"""Which input axes are dynamic: True for the batch axis and all whose size differs between batches, False for none, or
input name -> {axis: name}."""


BATCH = "batch"

Axes = Mapping[str, Mapping[int, str]]


def plain(dynamic: Any) -> Dynamic:
    """The value as booleans or plain dictionaries, whatever mappings a configuration library passes.

    Raises:
        BadRequest: it is something else.
    """
    if isinstance(dynamic, bool):
        return dynamic
    if isinstance(dynamic, Mapping) and all(_are_axes(name, axes) for name, axes in dynamic.items()):
        return {name: dict(axes) for name, axes in dynamic.items()}
    raise BadRequest(f"dynamic={dynamic!r}; give True, False, or the axes of each input: {{'ids': {{1: 'length'}}}}")


def _are_axes(name: Any, axes: Any) -> bool:
    if not (isinstance(name, str) and isinstance(axes, Mapping)):
        return False
    # some configuration files have strings for keys only
    return all(str(axis).lstrip("-").isdigit() and isinstance(called, str) for axis, called in axes.items())


def chosen(inputs: Arrays, others: Sequence[Arrays], dynamic: Dynamic) -> Axes:
    """The dynamic axes as input name -> {axis: name}; `others` are the inputs of further batches."""
    if isinstance(dynamic, Mapping):
        return _asked(inputs, dynamic)
    return _found(inputs, others) if dynamic else {}


def _asked(inputs: Arrays, dynamic: Mapping[str, Mapping[int, str]]) -> Axes:
    for name, axes in dynamic.items():
        if name not in inputs:
            raise BadRequest(f"dynamic names the input {name!r}; forward received {', '.join(inputs)}")
        for axis in axes:
            if not -inputs[name].ndim <= int(axis) < inputs[name].ndim:
                raise BadRequest(f"dynamic names axis {axis} of {name}, which has {inputs[name].ndim} axes")
    return {
        name: {int(axis) % inputs[name].ndim: called for axis, called in axes.items()} for name, axes in dynamic.items()
    }


def _found(inputs: Arrays, others: Sequence[Arrays]) -> Axes:
    """The batch axis, and every axis whose size differs between batches; axes of equal sizes share a name."""
    names: dict[tuple[int, ...], str] = {}
    axes: dict[str, dict[int, str]] = {}
    for name, array in inputs.items():
        for axis in range(array.ndim):
            sizes = tuple(batch[name].shape[axis] for batch in (inputs, *others))
            names = names or {sizes: BATCH}  # the first axis of the first input that has axes
            if len(set(sizes)) > 1 or (axis == 0 and sizes in names):
                axes.setdefault(name, {})[axis] = names.setdefault(sizes, f"{name}_axis_{axis}")
    return axes


def varying(inputs: Arrays, others: Sequence[Arrays], axes: Axes) -> dict[str, dict[int, str]]:
    """The axes that differ between batches and are not among `axes`, as `chosen` would name them."""
    found = _found(inputs, others)
    return {
        name: left
        for name, named in found.items()
        if (
            left := {
                axis: called
                for axis, called in named.items()
                if axis not in axes.get(name, {}) and len({batch[name].shape[axis] for batch in (inputs, *others)}) > 1
            }
        )
    }


def fitting(batch: Arrays, inputs: Arrays, axes: Axes) -> dict[str, int] | None:
    """Size of each named axis in another batch; None if it differs from `inputs` in a static axis."""
    sizes: dict[str, int] = {}
    for name, array in inputs.items():
        for axis, size in enumerate(array.shape):
            called = axes.get(name, {}).get(axis)
            here = batch[name].shape[axis]
            if here != (size if called is None else sizes.setdefault(called, here)):
                return None
    return sizes


def sizes_of(inputs: Arrays, axes: Axes) -> dict[str, int]:
    """Size of each named axis in the validation batch."""
    sizes: dict[str, int] = {}
    for name, named in axes.items():
        for axis, called in named.items():
            size = inputs[name].shape[axis]
            if sizes.setdefault(called, size) != size:
                raise BadRequest(
                    f"dynamic: the axis {called!r} has size {sizes[called]} in one input and {size} in {name}"
                )
    return sizes


def resized(inputs: Arrays, axes: Axes, sizes: Mapping[str, int]) -> Arrays:
    """The same inputs at other sizes: rows are repeated in order, so that every row is a real one; zeros if none is."""
    batch = dict(inputs)
    for name, named in axes.items():
        for axis, called in named.items():
            batch[name] = repeated(batch[name], axis, sizes[called])
    return batch


def one_row(inputs: Arrays, spec: ExportSpec) -> Arrays | None:
    """A batch's first row; None if it has only one, its first axis is static, or first axes have different names."""
    return first_rows(inputs, spec, 1)


def first_rows(inputs: Arrays, spec: ExportSpec, count: int) -> Arrays | None:
    """A batch's first rows; None if it has no more, its first axis is static, or first axes have different names."""
    axes = {tensor.name: tensor.dynamic for tensor in spec.inputs}
    leading = {called for named in axes.values() for axis, called in named.items() if axis == 0}
    if len(leading) != 1 or spec.sizes[called := leading.pop()] <= count:
        return None
    return resized(inputs, axes, {**spec.sizes, called: count})


def _candidates(axes: Axes, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try besides those of the validation batch: small batches, with other axes doubled, halved and unchanged.

    Larger ones come last: a graph may get more nodes, but not fewer than its edges refer to.
    """
    leading = {called for named in axes.values() for axis, called in named.items() if axis == 0}
    scales: tuple[Callable[[int], int], ...] = (lambda n: 2 * n, lambda n: max(n // 2, 1), lambda n: n)
    candidates = [
        {called: rows if called in leading else scale(size) for called, size in sizes.items()}
        for index, rows in enumerate((1, 3, 2, 5))
        for scale in (scales[index:] if len(leading) < len(sizes) else scales[2:])
    ]
    for more in (1, 2):  # not doubled, since a fixed batch size might divide that
        candidates.append({called: size + more if called in leading else size for called, size in sizes.items()})
    yielded = [dict(sizes)]
    for tried in candidates:
        if tried not in yielded:
            yielded.append(tried)
            yield tried


def further(
    run: Runner, inputs: Arrays, outputs: Arrays, axes: Axes, sizes: Mapping[str, int]
) -> tuple[list[tuple[dict[str, int], Arrays]], str]:
    """Two further batches with their reference outputs, or the reason why the module cannot run other sizes."""
    found: list[tuple[dict[str, int], Arrays]] = []
    why = ""
    for tried in _candidates(axes, sizes):
        batch = resized(inputs, axes, tried)
        answer = answered(run, batch, outputs, ", ".join(f"{name}={size}" for name, size in tried.items()))
        if isinstance(answer, str):
            why = answer
            continue
        found.append((tried, batch | answer))
        if len(found) == 2:
            break
    return (found, "") if found or not sizes else ([], why)


def answered(run: Runner, batch: Arrays, outputs: Arrays, where: str) -> Arrays | str:
    """The module's outputs if they have the names and ranks of `outputs`; else a reason that says `where`."""
    try:
        answer = run(batch)
    except Exception as error:  # forward is the user's, and any exception means that it cannot run this
        return f"PyTorch itself fails at {where}: {line(error, 200)}"
    ranks = {name: (array.ndim, outputs[name].ndim) for name, array in answer.items() if name in outputs}
    if answer.keys() != outputs.keys() or any(here != there for here, there in ranks.values()):
        return f"PyTorch itself returns outputs of another rank at {where}"
    return answer


def describe(name: str, array: np.ndarray, named: Mapping[int, str]) -> TensorSpec:
    """The signature of an array whose dynamic axes are `named`."""
    return TensorSpec(name, str(array.dtype), tuple(named.get(axis, size) for axis, size in enumerate(array.shape)))


def describe_outputs(
    outputs: Arrays, sizes: Mapping[str, int], further: Sequence[tuple[Mapping[str, int], Arrays]]
) -> tuple[tuple[TensorSpec, ...], dict[str, int]]:
    """Signatures of outputs, with names for the axes that changed, and the sizes of axes that follow no input axis."""
    described, own = [], {}
    for name, array in outputs.items():
        named: dict[int, str] = {}
        for axis, size in enumerate(array.shape):
            seen = [(size, sizes), *((batch[name].shape[axis], at) for at, batch in further)]
            if len({found for found, _ in seen}) == 1:
                continue
            follows = [called for called in sizes if all(found == at[called] for found, at in seen)]
            named[axis] = follows[0] if follows else f"{name}_axis_{axis}"
            if not follows:
                own[named[axis]] = size
        described.append(describe(name, array, named))
    return tuple(described), own
