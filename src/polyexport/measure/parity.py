"""Whether an artifact agrees with PyTorch. Pure functions over named arrays.

Every check here has a test that passes it a wrong output and sees it fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polyexport.measure.slices import is_broken, limits, where
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output against PyTorch's float32 reference; measures are None where they do not apply.

    Attributes:
        max_abs_error: Largest absolute difference over the finite elements.
        scale: Largest absolute finite element of the reference.
        misses: Share of elements outside the tolerance.
        cosine: Cosine similarity of the flattened output with the reference.
        snr_db: 10 log10 of reference power over error power; None for a bit-equal output.
        top1: Share of rows whose largest element is the reference's, ties within the tolerance counted as equal; for
            images, whose classes PyTorch has on the second axis, the share of pixels.
        noise_floor: Largest absolute difference between float32 and float64 PyTorch: the effect of rounding alone.
    """

    max_abs_error: float | None
    scale: float
    misses: float
    cosine: float | None
    snr_db: float | None
    top1: float | None
    noise_floor: float | None


@dataclass(frozen=True, slots=True)
class Parity:
    """All outputs of an artifact against PyTorch's, on the validation batch and on further batch sizes.

    Attributes:
        passed: Whether every check of every output passed.
        reason: The failed checks in words, the first output first; empty if all passed.
        outputs: The measures by output name, on the validation batch.
        batches: The sizes of the dynamic axes in each batch.
        verified_by: What ran the artifact, if it was not simply its own runtime.
        off_device: Whether that was a stand-in for the runtime that will serve the artifact, which is not on this
            machine.
    """

    passed: bool
    reason: str
    outputs: Mapping[str, OutputParity]
    batches: tuple[Mapping[str, int], ...] = ()
    verified_by: str | None = None
    off_device: bool = False

    @property
    def max_abs_error(self) -> float | None:
        """That of the worst output."""
        return _worst(output.max_abs_error for output in self.outputs.values())

    @property
    def noise_floor(self) -> float | None:
        """That of the worst output."""
        return _worst(output.noise_floor for output in self.outputs.values())


def _worst(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def compare(
    actual: Arrays,
    reference: Arrays,
    tolerance: Tolerance,
    noise: Arrays | None = None,
    whole: Arrays | None = None,
) -> Parity:
    """Compare what an artifact returned with the reference: names first, then dtypes and shapes, then values.

    Args:
        actual: What the artifact returned.
        reference: PyTorch's outputs.
        tolerance: The limits.
        noise: What `noise_floor` found on the validation batch, as far as it is known; for integers the `TIES`, and the
            outputs that are `NARROW`.
        whole: The reference on the validation batch, if this is another batch. A batch of one row may be the row that
            the tolerance allows to fail, or be so near zero that a similarity is meaningless. So it may lose as many
            rows as the whole, up to half of its own, and its error is judged relative to the power that as many
            elements of the whole have.
    """
    missing = [name for name in reference if name not in actual]
    surplus = [name for name in actual if name not in reference]
    if missing or surplus:
        return Parity(False, f"outputs are {list(actual)}, PyTorch has {list(reference)}", {})
    outputs: dict[str, OutputParity] = {}
    reasons: list[str] = []
    for name, expected in reference.items():
        figures, why = _compared(name, actual[name], expected, tolerance, noise or {}, (whole or {}).get(name))
        outputs |= {} if figures is None else {name: figures}
        reasons += [why] if why else []
    return Parity(not reasons, reasons[0] if reasons else "", outputs)


def _compared(
    name: str,
    found: np.ndarray,
    expected: np.ndarray,
    tolerance: Tolerance,
    noise: Arrays,
    whole: np.ndarray | None,
) -> tuple[OutputParity | None, str]:
    """One output's figures, none where dtype or shape differ, and why it disagrees; empty if it does not."""
    if found.dtype != expected.dtype:
        return None, f"{name} is {found.dtype}, PyTorch has {expected.dtype}"
    if found.shape != expected.shape:
        return None, f"{name} has shape {list(found.shape)}, PyTorch has {list(expected.shape)}"
    if not expected.size:
        return OutputParity(0.0, 0.0, 0.0, None, None, None, None), ""
    known, whole = noise.get(name), whole if whole is not None and whole.size else None
    if np.issubdtype(expected.dtype, np.inexact):
        is_narrow = name + NARROW in noise
        allowed = tolerance.or_looser(Tolerance.for_precision("bfloat16")) if is_narrow else tolerance
        figures, why = _compare_output(found, expected, allowed, known, whole)
    else:
        size = (expected if whole is None else whole).size
        figures, why = _compare_discrete(found, expected, tolerance, known, noise.get(name + TIES), size)
    return figures, f"{name}: {why}" if why else ""


def merge(results: Sequence[Parity], batches: Sequence[Mapping[str, int]]) -> Parity:
    """One result for several batches; its measures are those of the first, the validation batch."""
    first = replace(results[0], batches=tuple(dict(sizes) for sizes in batches))
    for result, sizes in zip(results[1:], batches[1:], strict=True):
        if first.passed and not result.passed:
            where = ", ".join(f"{name}={size}" for name, size in sizes.items())
            return replace(first, passed=False, reason=f"at {where}: {result.reason}")
    return first


TIES = "@ties"
"""Suffix of an integer output's name: the least `Tolerance.roundoff` that changes each element, infinite if none."""


NARROW = "@bfloat16"
"""Suffix of the name of an output that PyTorch itself rounds to bfloat16; the value has no meaning."""


def noise_floor(float32: Arrays, *others: Arrays) -> Arrays:
    """Largest absolute difference, element by element, between a model in float32 and variants that differ by rounding.

    For integers it is nonzero at ties, as of an argmax.
    """
    floors: Arrays = {}
    for name, low in float32.items():
        alike = [other[name] for other in others if name in other and other[name].shape == low.shape]
        if alike and low.size:
            wide = np.complex128 if np.iscomplexobj(low) else np.float64
            difference = np.max([np.abs(low.astype(wide) - each.astype(wide)) for each in alike], axis=0)
            floors[name] = np.where(np.isfinite(difference), difference, 0.0).astype(np.float32)
    return floors


def says_little(reference: Arrays) -> Iterator[str]:
    """A note for each output on which agreement proves little."""
    for name, array in reference.items():
        what = "agreement"
        if not array.size:
            why = "PyTorch itself returns no element"
        elif array.size > 1 and (array == array.flat[0]).all():
            why = f"PyTorch itself returns {array.flat[0]} everywhere"
        elif array.ndim < 2 or len(array) < _FEW:
            continue
        elif (array == array[:1]).all():
            why = "PyTorch itself returns the same for every row"
        elif (column := _only_class(array)) is not None:
            what, why = "top-1 agreement", f"in every row the largest element of PyTorch's is column {column}"
        else:
            continue
        yield f"{what} on {name} proves little: {why}; a batch with more varied outputs would prove more"


def _only_class(array: np.ndarray) -> int | None:
    """The column with the largest element of every row, if it is the same and may be a class."""
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] < 2:
        return None
    classes = np.argmax(array, -1)
    return int(classes[0]) if (classes == classes[0]).all() else None


_FEW = 8
"""Below this number of rows, equal rows may be chance."""


def _compare_output(
    actual: np.ndarray,
    reference: np.ndarray,
    tolerance: Tolerance,
    noise: np.ndarray | None,
    whole: np.ndarray | None,
) -> tuple[OutputParity, str]:
    """The measures of one output, and the reason why it fails; empty if it passes."""
    floor = None if noise is None or whole is not None else float(noise.max(initial=0.0))
    beside = reference if whole is None else whole
    if reference.dtype == np.float16:
        tolerance = tolerance.or_looser(Tolerance.for_precision("float16"))
    y = actual.astype(np.complex128 if np.iscomplexobj(actual) else np.float64)
    ref = reference.astype(y.dtype)
    unequal = _unlike_specials(y, ref)
    finite = np.isfinite(ref) & np.isfinite(y)
    y_finite, ref_finite = np.where(finite, y, 0), np.where(finite, ref, 0)
    error, magnitude = np.abs(y_finite - ref_finite), np.abs(ref_finite)
    scale = float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0))
    limit = np.full(ref.shape, np.inf)
    if tolerance.rtol is not None and tolerance.atol is not None:
        limit = limits(ref, tolerance, noise, whole)
    tie = limit if tolerance.tie is None else np.full(ref.shape, tolerance.tie * scale)
    off = (error > limit) | unequal
    power, lost = float(np.sum(magnitude**2)), float(np.sum(error**2))
    result = OutputParity(
        max_abs_error=float(error.max()),
        scale=scale,
        misses=float(np.mean(off)),
        cosine=_cosine(y_finite, ref_finite, _power(beside) * int(finite.sum())),
        snr_db=float(10 * np.log10(power / lost)) if lost and power else None,
        top1=_top1(y, ref, tie),
        noise_floor=floor,
    )
    failed = _failed(result, tolerance, off, magnitude, int(unequal.sum()))
    if result.top1 is not None and _loses(1.0 - result.top1, 1.0 - tolerance.top1, _rows(ref), _rows(beside)):
        failed.append(f"top-1 agreement {result.top1:.2%} is under {tolerance.top1:.0%}")
    return result, "; ".join(failed)


def _unlike_specials(y: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """A mask of where one side is NaN or infinite and the other is different."""
    infinite = np.isinf(y) | np.isinf(ref)
    unequal: np.ndarray = (np.isnan(y) != np.isnan(ref)) | (infinite & (y != ref) & ~(np.isnan(y) & np.isnan(ref)))
    return unequal


def _power(array: np.ndarray) -> float:
    """Mean square of the finite elements."""
    magnitude = np.abs(array[np.isfinite(array)]).astype(np.float64)
    return float(np.mean(magnitude**2)) if magnitude.size else 0.0


def _cosine(y: np.ndarray, ref: np.ndarray, least: float) -> float:
    """Cosine similarity; if the reference has less power than `least`, both get one more element that adds the rest."""
    power, found = float(np.linalg.norm(ref)) ** 2, float(np.linalg.norm(y)) ** 2
    lack = max(0.0, least - power)
    norms = np.sqrt((power + lack) * (found + lack))
    if norms == 0.0:
        return 1.0 if np.array_equal(y, ref) else 0.0
    product = np.vdot(ref, y)
    return float(((np.abs(product) if np.iscomplexobj(y) else product) + lack) / norms)


def _classes(array: np.ndarray) -> int:
    """The axis that seems to be that of classes."""
    return 1 if array.ndim > 3 else -1


def _rows(array: np.ndarray) -> int:
    """The number of rows, each of which has a largest element."""
    return array.size // max(1, array.shape[_classes(array)]) if array.ndim else 1


def _top1(y: np.ndarray, ref: np.ndarray, limit: np.ndarray) -> float | None:
    """Share of rows with the same largest element; elements that differ by less than their limits are a tie."""
    axis = _classes(ref)
    if ref.ndim < 2 or ref.shape[axis] < 2 or np.iscomplexobj(ref):
        return None
    y, ref, limit = (np.moveaxis(array, axis, -1) for array in (y, ref, limit))
    chosen, expected = np.argmax(y, -1)[..., None], np.argmax(ref, -1)[..., None]
    ref = np.nan_to_num(ref, posinf=1e300, neginf=-1e300)  # infinities cannot be subtracted
    behind = np.take_along_axis(ref, expected, -1) - np.take_along_axis(ref, chosen, -1)
    slack = np.take_along_axis(limit, expected, -1) + np.take_along_axis(limit, chosen, -1)
    tie = np.isfinite(slack) & (behind <= slack)
    return float(np.mean((chosen == expected) | tie))


def _failed(
    result: OutputParity, tolerance: Tolerance, off: np.ndarray, magnitude: np.ndarray, specials: int
) -> list[str]:
    """The checks that fail, in words."""
    failed = []
    if specials:
        failed.append(f"{specials} elements are NaN or infinite on one side only")
    elif result.misses > tolerance.misses or (tolerance.misses < 1.0 and is_broken(off)):
        failed.append(
            f"{result.misses:.3%} of the elements are off{where(off, magnitude)}, "
            f"max abs error {result.max_abs_error:.3g} at a scale of {result.scale:.3g}"
        )
    if result.cosine is not None and result.cosine < tolerance.cosine:
        failed.append(f"cosine similarity {result.cosine:.6f} is under {tolerance.cosine}")
    return failed


def _loses(share: float, may_lose: float, count: int, whole: int) -> bool:
    """Whether more rows fail than allowed: `may_lose` of `count`, or as many as of `whole` up to half of several."""
    allowed = max(may_lose * count, min(may_lose * whole, max(1, count / 2)))
    return share * count > allowed + 1e-6  # the share has a rounding error


def _compare_discrete(
    actual: np.ndarray,
    reference: np.ndarray,
    tolerance: Tolerance,
    noise: np.ndarray | None,
    ties: np.ndarray | None,
    whole: int,
) -> tuple[OutputParity, str]:
    """Compare integers and booleans: exact but for ties, which rounding in the artifact's precision changes.

    Rounding was tried only a few times, so as many others may differ as ties were found, if top-1 may lose them.
    """
    difference = np.abs(actual.astype(np.float64) - reference.astype(np.float64))
    off = difference > _of_rows(noise, reference, 0.0)
    tie = _of_rows(ties, reference, np.inf) <= tolerance.roundoff
    seen = 0.0 if ties is None or not ties.size else float(np.mean(ties <= tolerance.roundoff))
    scale = float(np.abs(reference.astype(np.float64)).max())
    result = OutputParity(float(difference.max()), scale, float(np.mean(off)), None, None, None, None)
    unexcused = float(np.mean(off & ~tie))
    if not _loses(unexcused, min(1.0 - tolerance.top1, _UNSEEN * seen), reference.size, whole):
        return result, ""
    return result, f"{unexcused:.3%} of the {reference.dtype} elements differ, by up to {difference[~tie].max():g}"


_UNSEEN = 2.0
"""How many ties to expect for each that was found: about half of the draws of noise change one, and batches differ."""


def _of_rows(noise: np.ndarray | None, reference: np.ndarray, unknown: float) -> np.ndarray:
    """The noise of the validation batch for a batch of the same rows repeated; `unknown` if the rows are others."""
    if noise is None or noise.shape[1:] != reference.shape[1:]:
        return np.full(reference.shape, unknown)
    return np.resize(noise, reference.shape)
