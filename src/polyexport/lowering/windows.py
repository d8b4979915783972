"""Where the windows of convolutions and pools lie, whatever framework runs them.

A size is an `int` where it is known, else a scalar tensor of the target framework, whose operators Python's call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Sides = list[tuple[Any, Any]]
"""How much is padded, or cut, before and after each spatial axis."""

NotNegative = Callable[[Any], Any]
"""A framework's maximum of a scalar tensor and zero."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows over the spatial axes of one tensor.

    Attributes:
        kernel: Entries of a window along each axis.
        strides: From the start of one window to the next.
        dilations: From one entry of a window to the next.
        sides: The padding that the model asks for.
        tails: What is missing after that padding for a last window that `ceil_mode` asks for.
    """

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    sides: Sides
    tails: Sequence[Any]

    @property
    def whole(self) -> Sides:
        """The padding, tails included."""
        return [(before, after + tail) for (before, after), tail in zip(self.sides, self.tails, strict=True)]


def windows(
    sizes: Sequence[Any], kernel: Sequence[int],
    *, strides: Sequence[int] | None, dilations: Sequence[int] | None, pads: Sequence[int] | None, auto_pad: str,
    ceil_mode: int = 0, not_negative: NotNegative,
) -> Windows:  # fmt: skip  # the sizes on one line, the attributes on the next two
    """The windows that an ONNX node's attributes ask for."""
    count = len(kernel)
    strides, dilations = strides or [1] * count, dilations or [1] * count
    reach = spans(kernel, dilations)
    sides = _sides(sizes, reach, strides, pads, auto_pad, not_negative)
    tails = [
        _tail(size, span, stride, *side, not_negative) if ceil_mode else 0
        for size, span, stride, side in zip(sizes, reach, strides, sides, strict=True)
    ]
    return Windows(kernel, strides, dilations, sides, tails)


def spans(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """From the first to behind the last entry of a window, along each axis."""
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def are_known(sides: Sides) -> bool:
    """Whether all amounts are known before the run."""
    return all(isinstance(each, int) for side in sides for each in side)


def _sides(
    sizes: Sequence[Any], reach: Sequence[int], strides: Sequence[int], pads: Sequence[int] | None, auto: str,
    not_negative: NotNegative,
) -> Sides:  # fmt: skip  # the data on one line
    count = len(reach)
    if auto in ("NOTSET", ""):
        pads = pads or [0] * (2 * count)
        return [(pads[i], pads[i + count]) for i in range(count)]
    if auto == "VALID":
        return [(0, 0)] * count
    sides: Sides = []
    for size, span, stride in zip(sizes, reach, strides, strict=True):
        total = _not_negative((-(-size // stride) - 1) * stride + span - size, not_negative)
        sides.append(_halves(total, auto))
    return sides


def _halves(total: Any, auto: str) -> tuple[Any, Any]:
    small, large = total // 2, total - total // 2
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _not_negative(amount: Any, not_negative: NotNegative) -> Any:
    return max(amount, 0) if isinstance(amount, int) else not_negative(amount)


def _tail(size: Any, span: int, stride: int, before: Any, after: Any, not_negative: NotNegative) -> Any:
    """What is missing for the last window, which must begin inside the axis or in the padding before it."""
    wanted = -(-(size + before + after - span) // stride) + 1
    starts = (size + before - 1) // stride + 1
    count = wanted - _not_negative(wanted - starts, not_negative)
    return _not_negative((count - 1) * stride + span - size - before - after, not_negative)


def cuts(
    sizes: Sequence[Any], whole: Sequence[Any], strides: Sequence[int], extra: Sequence[int],
    pads: Sequence[int] | None, output_shape: Sequence[int] | None, auto_pad: str,
) -> Sides:  # fmt: skip  # the sizes on one line, the attributes on the next
    """How much of the whole result of a transposed convolution falls away before and after each axis.

    Args:
        sizes: Of the input's spatial axes.
        whole: Of the result's, nothing cut.
        strides: The node's attribute, as are the others.
        extra: `output_padding`, which counts as if it lay behind the whole result.
        pads: Taken as they are, unless `output_shape` or `auto_pad` says how large the result is to be.
        output_shape: Of the spatial axes, which are its last.
        auto_pad: The side that takes the odd entry.
    """
    count = len(sizes)
    if output_shape is None and auto_pad in ("NOTSET", "", "VALID"):
        pads = (pads if auto_pad != "VALID" else None) or [0] * (2 * count)
        return [(pads[i], pads[i + count]) for i in range(count)]
    wanted = output_shape[-count:] if output_shape else [n * s for n, s in zip(sizes, strides, strict=True)]
    return [_halves(have + more - want, auto_pad) for have, more, want in zip(whole, extra, wanted, strict=True)]
