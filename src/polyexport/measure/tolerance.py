"""How far an artifact's outputs may be from PyTorch's, by the precision that it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyexport.spec import Precision


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an output may be from PyTorch's; None switches a check off.

    An element passes if `|y - ref| <= atol * scale + rtol * |ref|` and some of the noise floor, where `scale` is the
    largest magnitude of its own column, channel or position (see `polyexport.measure.slices`).

    Attributes:
        rtol: Relative to the element.
        atol: Relative to the scale.
        misses: Share of all elements that may fail.
        cosine: Least cosine similarity of a whole output.
        top1: Least share of rows whose largest element is at the same index (if an axis seems to be that of classes).
        roundoff: Largest relative error of rounding one number in the precision; the noise floor is scaled with it.
        smallest: Spacing of the smallest numbers of the precision; rounding may lose that much absolutely.
        tie: Two elements closer than this share of the scale are a tie for `top1`; None for the limits of the two.
    """

    rtol: float | None
    atol: float | None
    misses: float
    cosine: float
    top1: float
    roundoff: float = 2.0**-24
    smallest: float = 0.0
    tie: float | None = None

    def or_looser(self, other: Tolerance) -> Tolerance:
        """The looser of each limit; a check that either switches off is off."""
        off = None in (self.rtol, self.atol, other.rtol, other.atol)
        return Tolerance(
            rtol=None if off else max(self.rtol or 0.0, other.rtol or 0.0),
            atol=None if off else max(self.atol or 0.0, other.atol or 0.0),
            misses=max(self.misses, other.misses),
            cosine=min(self.cosine, other.cosine),
            top1=min(self.top1, other.top1),
            roundoff=max(self.roundoff, other.roundoff),
            smallest=max(self.smallest, other.smallest),
            tie=self.tie if self.roundoff > other.roundoff else other.tie,
        )

    @staticmethod
    def for_precision(precision: Precision) -> Tolerance:
        """The default for the precision that the artifact really computes in."""
        return _TOLERANCES[precision]


_STEP = 1 / 127
"""One step of int8, relative to the largest number."""

_INT8 = Tolerance(rtol=0.1, atol=0.1, misses=0.02, cosine=0.99, top1=0.95, roundoff=_STEP / 2, tie=_STEP)

_TOLERANCES: Mapping[Precision, Tolerance] = {
    "float32": Tolerance(rtol=1e-3, atol=1e-4, misses=0.0, cosine=0.99999, top1=1.0),
    "float16": Tolerance(
        rtol=1e-2, atol=5e-3, misses=1e-3, cosine=0.9999, top1=0.99, roundoff=2.0**-11, smallest=2.0**-24
    ),
    "bfloat16": Tolerance(rtol=5e-2, atol=2e-2, misses=1e-2, cosine=0.999, top1=0.98, roundoff=2.0**-8),
    "int8": _INT8,
    "w8": _INT8,  # a runtime may quantize activations at run time, and then computes as in int8
    "w4": Tolerance(rtol=0.15, atol=0.15, misses=0.02, cosine=0.97, top1=0.9, roundoff=_STEP, tie=2 * _STEP),
}
