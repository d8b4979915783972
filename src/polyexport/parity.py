"""Does an artifact agree with PyTorch? Pure functions over named arrays.

Every check here has a test that feeds it a wrong answer and sees it fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polyexport.format import Tolerance
from polyexport.spec import Arrays


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output against PyTorch's float32 reference; figures are None where they have no meaning.

    Attributes:
        max_abs_error: Greatest absolute difference over the finite elements.
        scale: Greatest absolute finite element of the reference, which `atol` is relative to.
        misses: Share of elements outside the tolerance.
        cosine: Cosine similarity of the flattened output with the reference.
        snr_db: 10 log10 of reference power over error power; None for a bit-equal output.
        top1: Share of rows whose greatest element is the reference's, ties within the tolerance counted as equal.
        noise_floor: Greatest absolute difference between float32 and float64 PyTorch: what rounding alone does.
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
        reason: The first check that failed, in words; empty when all passed.
        outputs: The figures by output name, on the validation batch.
        batches: The sizes of the dynamic axes that were run.
        verified_by: What ran the artifact, where that is not its own runtime, or one of several ways to run it.
    """

    passed: bool
    reason: str
    outputs: Mapping[str, OutputParity]
    batches: tuple[Mapping[str, int], ...] = ()
    verified_by: str | None = None

    @property
    def max_abs_error(self) -> float | None:
        """The worst output's."""
        return _worst(output.max_abs_error for output in self.outputs.values())

    @property
    def noise_floor(self) -> float | None:
        """The worst output's."""
        return _worst(output.noise_floor for output in self.outputs.values())


def _worst(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def compare(
    actual: Arrays, reference: Arrays, tolerance: Tolerance, noise: Mapping[str, float] | None = None
) -> Parity:
    """Compare what an artifact returned with the reference: names first, then dtypes and shapes, then values."""
    missing = [name for name in reference if name not in actual]
    surplus = [name for name in actual if name not in reference]
    if missing or surplus:
        return Parity(False, f"outputs are {list(actual)}, PyTorch has {list(reference)}", {})
    outputs: dict[str, OutputParity] = {}
    reasons: list[str] = []
    for name, expected in reference.items():
        found = actual[name]
        if found.dtype != expected.dtype:
            reasons.append(f"{name} is {found.dtype}, PyTorch has {expected.dtype}")
        elif found.shape != expected.shape:
            reasons.append(f"{name} has shape {list(found.shape)}, PyTorch has {list(expected.shape)}")
        else:
            outputs[name], why = _compare_output(found, expected, tolerance, (noise or {}).get(name))
            reasons += [f"{name}: {why}"] if why else []
    return Parity(not reasons, reasons[0] if reasons else "", outputs)


def merge(results: Sequence[Parity], batches: Sequence[Mapping[str, int]]) -> Parity:
    """One verdict over several batches; the figures are those of the first, the validation batch."""
    first = replace(results[0], batches=tuple(dict(sizes) for sizes in batches))
    for result, sizes in zip(results[1:], batches[1:], strict=True):
        if first.passed and not result.passed:
            where = ", ".join(f"{name}={size}" for name, size in sizes.items())
            return replace(first, passed=False, reason=f"at {where}: {result.reason}")
    return first


def noise_floor(float32: Arrays, float64: Arrays) -> dict[str, float]:
    """Greatest absolute difference per output between the same model in float32 and in float64."""
    floors: dict[str, float] = {}
    for name, low in float32.items():
        high = float64.get(name)
        if high is not None and high.shape == low.shape and low.size and np.issubdtype(low.dtype, np.floating):
            difference = np.abs(low.astype(np.float64) - high.astype(np.float64))
            floors[name] = float(np.nanmax(np.where(np.isfinite(difference), difference, 0.0)))
    return floors


def _compare_output(
    actual: np.ndarray, reference: np.ndarray, tolerance: Tolerance, noise: float | None
) -> tuple[OutputParity, str]:
    """Figures of one output, and the reason why it fails, if it does."""
    if reference.size == 0:
        return OutputParity(0.0, 0.0, 0.0, None, None, None, noise), ""
    if not np.issubdtype(reference.dtype, np.inexact):
        return _compare_discrete(actual, reference, tolerance)
    y = actual.astype(np.complex128 if np.iscomplexobj(actual) else np.float64)
    ref = reference.astype(y.dtype)
    unequal = _unlike_specials(y, ref)
    finite = np.isfinite(ref) & np.isfinite(y)
    y_finite, ref_finite = np.where(finite, y, 0), np.where(finite, ref, 0)
    error, magnitude = np.abs(y_finite - ref_finite), np.abs(ref_finite)
    scale = float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0))
    limit = np.full(ref.shape, np.inf)
    if tolerance.rtol is not None and tolerance.atol is not None:
        limit = tolerance.atol * max(scale, _TINY) + tolerance.rtol * magnitude
    misses = float(np.mean((error > limit) | unequal))
    power, lost = float(np.sum(magnitude**2)), float(np.sum(error**2))
    result = OutputParity(
        max_abs_error=float(error.max()),
        scale=scale,
        misses=misses,
        cosine=_cosine(y_finite, ref_finite),
        snr_db=float(10 * np.log10(power / lost)) if lost and power else None,
        top1=_top1(y, ref, limit),
        noise_floor=noise,
    )
    return result, _verdict(result, tolerance, int(unequal.sum()))


_TINY = 1e-6  # an all-zero reference would otherwise allow no rounding at all


def _unlike_specials(y: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Where one side is NaN or infinite and the other is not the same."""
    infinite = np.isinf(y) | np.isinf(ref)
    unequal: np.ndarray = (np.isnan(y) != np.isnan(ref)) | (infinite & (y != ref) & ~(np.isnan(y) & np.isnan(ref)))
    return unequal


def _cosine(y: np.ndarray, ref: np.ndarray) -> float:
    norms = float(np.linalg.norm(y)) * float(np.linalg.norm(ref))
    if norms == 0.0:
        return 1.0 if np.array_equal(y, ref) else 0.0
    return float(np.abs(np.vdot(ref, y)) / norms if np.iscomplexobj(y) else np.vdot(ref, y) / norms)


def _top1(y: np.ndarray, ref: np.ndarray, limit: np.ndarray) -> float | None:
    """Share of rows with the same greatest element; two elements closer than their limits count as a tie."""
    if ref.ndim < 2 or ref.shape[-1] < 2 or np.iscomplexobj(ref):
        return None
    chosen, expected = np.argmax(y, -1)[..., None], np.argmax(ref, -1)[..., None]
    ref = np.nan_to_num(ref, posinf=1e300, neginf=-1e300)  # infinities have no difference
    behind = np.take_along_axis(ref, expected, -1) - np.take_along_axis(ref, chosen, -1)
    slack = np.take_along_axis(limit, expected, -1) + np.take_along_axis(limit, chosen, -1)
    tie = np.isfinite(slack) & (behind <= slack)
    return float(np.mean((chosen == expected) | tie))


def _verdict(result: OutputParity, tolerance: Tolerance, specials: int) -> str:
    if specials:
        return f"{specials} elements are NaN or infinite on one side only"
    if result.misses > tolerance.misses:
        return (
            f"{result.misses:.3%} of the elements are off, max abs error {result.max_abs_error:.3g} "
            f"at a scale of {result.scale:.3g}"
        )
    if result.cosine is not None and result.cosine < tolerance.cosine:
        return f"cosine similarity {result.cosine:.6f} is under {tolerance.cosine}"
    if result.top1 is not None and result.top1 < tolerance.top1:
        return f"top-1 agreement {result.top1:.2%} is under {tolerance.top1:.0%}"
    return ""


def _compare_discrete(actual: np.ndarray, reference: np.ndarray, tolerance: Tolerance) -> tuple[OutputParity, str]:
    """Integers and booleans: the share of elements that differ, held against the share that top-1 may lose."""
    misses = float(np.mean(actual != reference))
    difference = np.abs(actual.astype(np.float64) - reference.astype(np.float64))
    scale = float(np.abs(reference.astype(np.float64)).max())
    result = OutputParity(float(difference.max()), scale, misses, None, None, None, None)
    allowed = 1.0 - tolerance.top1
    return result, f"{misses:.3%} of the {reference.dtype} elements differ" if misses > allowed else ""
