"""Layer by layer: the outputs of a module's layers, and the tensors of an artifact that correspond to them.

No two formats name their tensors alike, and converters merge, split, rename and transpose layers. So tensors are
matched by their values. After the first wrong layer no values agree any more, so the rest is matched in order, such
that the sum of differences is the least.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from polyexport.measure.parity import compare
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the module, and the artifact's tensor that corresponds to it.

    Attributes:
        name: The layer's name in the module: `body.0.conv`.
        merged: Layers before it that the artifact computes together with it, so that they have no tensors of their own.
        tensor: The name of the artifact's tensor.
        shape: Shape of PyTorch's output.
        error: Norm of the difference, relative to the norm of PyTorch's values.
        reason: How it is beyond the format's tolerance; empty if it is within.
    """

    name: str
    merged: tuple[str, ...]
    tensor: str
    shape: tuple[int, ...]
    error: float
    reason: str

    @property
    def shown_name(self) -> str:
        """The name, with what is merged into it: `bn1 (with conv1)`."""
        return f"{self.name} (with {', '.join(self.merged)})" if self.merged else self.name


Reads = Mapping[str, Sequence[str]]
"""The layers that each layer reads (see `polyexport.capture.layers`)."""


def compared(
    expected: Arrays, found: Arrays, reads: Reads, tolerance: Tolerance, noise: Arrays | None, outputs: Sequence[Layer]
) -> tuple[Layer, ...]:
    """Each layer with a tensor in the artifact, in the order in which the module computes them, and the outputs.

    Args:
        expected: PyTorch's values by layer name, in order of computation.
        found: The artifact's values by its own tensor names, in order of computation.
        reads: The layers that each layer or output reads.
        tolerance: The limits for errors.
        noise: The noise floor of PyTorch's values, None if it is unknown.
        outputs: The outputs, compared already.
    """
    partners = paired(expected, found, reads, {output.name for output in outputs if output.reason})
    rows = (
        judged(name, array, found[partners[name]], tolerance, noise, partners[name], _merged(name, partners, reads))
        for name, array in expected.items()
        if name in partners
    )
    return (*rows, *(replace(output, merged=_merged(output.name, partners, reads)) for output in outputs))


def _merged(name: str, partners: Mapping[str, str], reads: Reads) -> tuple[str, ...]:
    """The layers without a tensor between a layer and those before it that have one, in order of computation."""
    found: dict[str, None] = {}
    for other in reads.get(name, ()):
        if other not in partners:
            found |= dict.fromkeys((*_merged(other, partners, reads), other))
    return tuple(found)


def judged(
    name: str,
    expected: np.ndarray,
    found: np.ndarray,
    tolerance: Tolerance,
    noise: Arrays | None,
    tensor: str,
    merged: tuple[str, ...] = (),
) -> Layer:
    """A layer compared with the artifact's tensor for it, in whichever layout fits best."""
    limits = replace(tolerance, top1=0.0)  # the largest element of a hidden layer is not a class
    theirs = min(_layouts(found, expected.shape), key=lambda laid_out: relative_error(expected, laid_out))
    parity = compare({name: theirs.astype(expected.dtype)}, {name: expected}, limits, noise)
    reason = parity.reason.removeprefix(f"{name}: ")
    return Layer(name, merged, tensor, expected.shape, relative_error(expected, theirs), reason)


def output(name: str) -> str:
    """An output's name among layers."""
    return f"output {name}"


def first(layers: Sequence[Layer]) -> Layer | None:
    """The first layer that is beyond the tolerance."""
    return next((layer for layer in layers if layer.reason), None)


def worst(layers: Sequence[Layer]) -> Layer | None:
    """The layer beyond the tolerance with the largest error; of those that print the same error, the first."""
    beyond = [layer for layer in layers if layer.reason]
    return max(beyond, key=lambda layer: float(f"{np.nan_to_num(layer.error, nan=np.inf):.2g}"), default=None)


def divergence(layers: Sequence[Layer]) -> str:
    """Where artifact and PyTorch diverge, in words; empty if all layers are within the tolerance."""
    one, most = first(layers), worst(layers)
    if one is None or most is None:
        return ""
    also = "" if most is one else f", the worst {most.shown_name} ({most.error:.2g})"
    return f"the first layer beyond the tolerance is {one.shown_name} (relative error {one.error:.2g}){also}"


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Norm of the difference relative to the norm of `expected`, over its finite elements; infinite for a NaN."""
    finite = np.isfinite(expected)
    right = expected[finite].astype(np.float64)
    difference = float(np.linalg.norm(found[finite].astype(np.float64) - right))
    scale = max(float(np.linalg.norm(right)), float(np.finfo(np.float32).tiny))
    return float(np.nan_to_num(difference / scale, nan=np.inf, posinf=np.inf))


# --- which belongs to which -------------------------------------------------------------------------------------------

_NEAR = 0.1
"""Relative error up to which two tensors are taken to correspond, regardless of order."""

_SAMPLES = 4096
"""Number of elements that are compared to see whether two tensors correspond."""

_ALONE = 2.01
"""The cost of leaving a layer without a tensor in the alignment: more than any tensor of its size."""


def paired(expected: Arrays, found: Arrays, reads: Reads, wrong: Collection[str]) -> dict[str, str]:
    """The artifact's tensor for each layer that has one; no tensor belongs to two layers.

    Args:
        expected: As in `compared`.
        found: As in `compared`.
        reads: As in `compared`.
        wrong: The outputs that are beyond the tolerance.
    """
    errors, order = _errors(expected, found), list(found)
    near = _nearest(errors)
    copies = {other for row in errors.values() for other, error in row.items() if error <= _NEAR}
    behind = _behind(reads, near, order)
    fitting = {
        name: {other: error for other, error in errors[name].items() if order.index(other) > behind[name]}
        for name in _suspects(expected, near, reads, wrong)
    }
    return near | _in_order(fitting, [name for name in order if name not in copies])


def _behind(reads: Reads, near: Mapping[str, str], order: Sequence[str]) -> dict[str, int]:
    """The index of the last matched tensor that each layer depends on; -1 if there is none."""
    index = {name: order.index(other) for name, other in near.items()}
    found: dict[str, int] = {}
    for name, others in reads.items():
        found[name] = max((max(found[other], index.get(other, -1)) for other in others), default=-1)
    return found


def _suspects(expected: Arrays, near: Mapping[str, str], reads: Reads, wrong: Collection[str]) -> list[str]:
    """The layers that match no tensor and are read by something wrong.

    A layer that is read by a correct one is correct too, and was merged into it, as a convolution into its batch norm.
    """
    suspected: set[str] = set()
    cleared: set[str] = set(near)
    for name in reversed([*reads]):  # readers come after what they read
        is_wrong = name in wrong if name not in expected else name in suspected - cleared
        (suspected if is_wrong else cleared).update(reads[name])
    return [name for name in expected if name in suspected - cleared]


Errors = Mapping[str, Mapping[str, float]]
"""The difference of each layer and each tensor of its size: up to 1 the relative error, see `_unlikeness`."""


def _errors(expected: Arrays, found: Arrays) -> Errors:
    """Compares samples of the elements, the same ones for all tensors of one size."""
    random = np.random.default_rng(0)
    sizes = {array.size for array in expected.values() if array.size}
    chosen = {n: np.arange(n) if n <= _SAMPLES else random.integers(0, n, _SAMPLES) for n in sorted(sizes)}
    sampled = {
        name: [laid_out.reshape(-1)[chosen[array.size]] for laid_out in _layouts(array, array.shape)]
        for name, array in found.items()
        if array.size in chosen
    }
    return {
        name: {
            other: min(_unlikeness(array.reshape(-1)[chosen[array.size]], sample) for sample in samples)
            for other, samples in sampled.items()
            if found[other].size == array.size
        }
        for name, array in expected.items()
    }


def _unlikeness(expected: np.ndarray, found: np.ndarray) -> float:
    """The relative error; from 1 on the difference of sorted values, which is small if channels were swapped."""
    error = relative_error(expected, found)
    return error if error < 1 else 1 + min(relative_error(np.sort(expected), np.sort(found)), 1.0)


def _layouts(array: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The array reshaped to `shape`, and the same with its last axis moved to where PyTorch has the channels."""
    yield array.reshape(shape)
    if array.ndim > 2:
        yield np.moveaxis(array, -1, 1).reshape(shape)


def _nearest(errors: Errors) -> dict[str, str]:
    """Pairs of similar tensors, the most similar first."""
    pairs = [(error, name, other) for name, row in errors.items() for other, error in row.items()]
    made: dict[str, str] = {}
    taken: set[str] = set()
    # of copies the first one, since they are in order
    for error, name, other in sorted(pairs, key=lambda pair: pair[0]):
        if error <= _NEAR and name not in made and other not in taken:
            made[name] = other
            taken.add(other)
    return made


def _in_order(errors: Errors, others: Sequence[str]) -> dict[str, str]:
    """Pairs that keep both orders and have the least sum of errors (an alignment, by dynamic programming)."""
    names = list(errors)
    cost = np.zeros((len(names) + 1, len(others) + 1))
    cost[:, 0] = _ALONE * np.arange(len(names) + 1)
    for i, name in enumerate(names, 1):
        for j, other in enumerate(others, 1):
            both = cost[i - 1, j - 1] + errors[name].get(other, np.inf)
            cost[i, j] = min(cost[i, j - 1], cost[i - 1, j] + _ALONE, both)
    made: dict[str, str] = {}
    i, j = len(names), len(others)
    while i and j:
        if cost[i, j] == cost[i, j - 1]:
            j -= 1
        elif cost[i, j] == cost[i - 1, j] + _ALONE:
            i -= 1
        else:
            made[names[i - 1]] = others[j - 1]
            i, j = i - 1, j - 1
    return made
