"""Which elements of an output are the same quantity, and how large each quantity is.

It is unknown which axis is that of features: `(N, F)`, `(N, L, F)`, `(N, C, H, W)`, and in detectors both
`(N, 4 + C, A)` and `(N, A, 4 + C)`. So an output is sliced along every axis but the first, and along all of them at
once. Any of these slicings may separate boxes in pixels from scores between 0 and 1, and a correct artifact is within
the limits of each of them: the noise floor of a slice shows if it cannot be held to its own scale, since rounding alone
changes it more. The first axis is the batch, whose rows are alike; it is sliced only between rows whose scales are
`_APART`, as in an output without a batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from polyexport.measure.tolerance import Tolerance

Axes = tuple[int, ...]
"""The axes that an output is sliced along; a slice has one index along each."""

_APART = 100.0
"""Ratio of two neighboring scales from which rows count as different quantities."""

_MARGIN = 8.0
"""How many times the noise floor an error may be, since the floor is the maximum of few samples."""

_MANY = 2**20
"""Number of positions above which an output is not sliced into them, since it is an image or a signal."""

_FLOAT32 = 2.0**-24

_TINY = 1e-6  # an all-zero reference would otherwise allow no rounding at all


def limits(
    ref: np.ndarray, tolerance: Tolerance, noise: np.ndarray | None = None, whole: np.ndarray | None = None
) -> np.ndarray:
    """The largest error that each element of `ref` may have: the least that any of the slicings allows.

    Args:
        ref: The reference; only its finite elements have a scale.
        tolerance: The limits; `rtol` and `atol` must be set.
        noise: The effect of float32 rounding on each element of the validation batch, absolute. If it is None, or less
            than one rounding of the slice's largest element, it is that rounding. For a batch of larger values it grows
            with them.
        whole: The reference of the validation batch, if `ref` is of another batch; scales are taken from both.
    """
    assert tolerance.atol is not None, "a check that is switched off has no limits"
    assert tolerance.rtol is not None, "as above"
    magnitude = _magnitude(ref)
    beside = magnitude if whole is None else _magnitude(whole)
    if noise is not None and magnitude.max(initial=0.0) > beside.max(initial=0.0) > 0:
        noise = noise * (magnitude.max() / beside.max())
    allowed = np.full(ref.shape, tolerance.atol * max(magnitude.max(initial=_TINY), beside.max(initial=0.0)))
    for along in _cuts(ref.shape):
        scale, floor = _slices(magnitude, beside, noise, along)
        rounding = _MARGIN * tolerance.roundoff / _FLOAT32 * _shared(scale, floor, tolerance)
        own = tolerance.atol * scale + rounding
        allowed = np.minimum(allowed, np.where(scale > 0, own, np.inf))  # a slice of zeros has no scale of its own
    found: np.ndarray = allowed + tolerance.rtol * magnitude + tolerance.smallest
    return found


def is_broken(off: np.ndarray) -> bool:
    """Whether one slice may be mostly `off`, however small a part of the output it is."""
    shares = [(share, off.shape[axis] / off.size) for axis, share in _shares(off) if axis]
    return any((share > max(_BROKEN, one_element)).any() for share, one_element in shares)


def where(off: np.ndarray, magnitude: np.ndarray) -> str:
    """The slices with most of the elements that are `off`: ` in column 4 of axis 1 (100% of it, at a scale of 0.9)`.

    Empty if all slices are alike.
    """
    axis, share = max(_shares(off), key=lambda found: float(found[1].max()), default=(0, np.zeros(0)))
    worst = np.flatnonzero(share >= max(share.max(initial=0.0) / 2, off.mean()))
    if not 0 < worst.size < share.size:
        return ""
    named = ", ".join(map(str, worst[:_NAMED])) + (f" and {worst.size - _NAMED} more" if worst.size > _NAMED else "")
    first = int(worst[0])
    about = f"{share[first]:.0%} of {first}, at a scale of {np.take(magnitude, first, axis).max():.3g}"
    return f" in {'column' if axis else 'row'}{'s' * (worst.size > 1)} {named} of axis {axis} ({about})"


_BROKEN = 0.25
"""Share of a slice that may be off if a few elements of the output may."""

_NAMED = 8


def _shares(off: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each axis from the last to the first, and the share of each of its slices that is off."""
    for axis in range(off.ndim - 1, -1, -1):
        yield axis, off.mean(axis=tuple(other for other in range(off.ndim) if other != axis))


def _cuts(shape: tuple[int, ...]) -> Iterator[Axes]:
    """The ways to slice an output."""
    yield from ((axis,) for axis in range(len(shape)))
    if len(shape) > 2 and math.prod(shape[1:]) <= _MANY:
        yield tuple(range(1, len(shape)))


def _greatest(magnitude: np.ndarray, along: Axes) -> np.ndarray:
    """The largest element of each slice; the other axes have size 1."""
    rest = tuple(axis for axis in range(magnitude.ndim) if axis not in along)
    found: np.ndarray = magnitude.max(axis=rest, keepdims=True, initial=0.0)
    return found


def _magnitude(array: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.abs(np.where(np.isfinite(array), array, 0)).astype(np.float64)
    return found


def _slices(
    magnitude: np.ndarray, beside: np.ndarray, noise: np.ndarray | None, along: Axes
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and noise floor of each slice; `noise` is that of `beside`, the validation batch."""
    scale, known = _greatest(magnitude, along), np.zeros(())
    if along == (0,):
        rows = _greatest(beside, along)
        floor = _FLOAT32 * rows if noise is None else np.maximum(_greatest(noise, along), _FLOAT32 * rows)
        return _grouped(scale, rows, rows), _grouped(scale, rows, floor)
    if magnitude.ndim == beside.ndim and all(magnitude.shape[axis] == beside.shape[axis] for axis in along):
        scale = np.maximum(scale, _greatest(beside, along))
        known = known if noise is None else _greatest(noise, along)
    elif noise is not None:
        known = noise.max(initial=0.0)
    return scale, np.maximum(known, _FLOAT32 * scale)


def _shared(scale: np.ndarray, floor: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Each slice's floor, or the largest of slices of similar scale: a single sample may happen to have no noise.

    Only slices count whose noise cannot excuse more than `rtol` does.
    """
    assert tolerance.rtol is not None, "as above"
    reach = max(1.0, tolerance.rtol / tolerance.roundoff / _MARGIN)
    order = np.argsort(scale, axis=None)
    scales = scale.ravel()[order]
    floors = np.maximum.accumulate(np.broadcast_to(floor, scale.shape).ravel()[order])
    found: np.ndarray = floors[np.searchsorted(scales, scale * reach, side="right") - 1]
    return found


def _grouped(scale: np.ndarray, scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For rows of `scale`, the largest of the `values` of the `scales` in their group.

    Rows are sorted by scale; a group ends where the next row is `_APART`.
    """
    order = np.argsort(scales, axis=None)
    ordered = scales.ravel()[order]
    ends = [*np.flatnonzero(ordered[1:] > _APART * ordered[:-1]), ordered.size - 1]
    most = np.maximum.reduceat(values.ravel()[order], [0, *(end + 1 for end in ends[:-1])])
    borders = [_APART * ordered[end] for end in ends[:-1]]
    found: np.ndarray = most[np.searchsorted(borders, scale)]
    return found
