"""The windows of convolutions and pools, for any framework.

A size is an `int` if it is known, else a scalar tensor of the target framework.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor, product
from polyexport.lowering.value import Value

Sides = list[tuple[Any, Any]]
"""How much is padded, or cropped, before and after each spatial axis."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows over the spatial axes of one tensor.

    Attributes:
        kernel: Entries of a window along each axis.
        strides: From the start of one window to the next.
        dilations: From one entry of a window to the next.
        sides: The padding that the model asks for.
        tails: Extra padding after that for the last window of `ceil_mode`.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    sides: Sides
    tails: Sequence[Any]

    @property
    def whole(self) -> Sides:
        """The padding, tails included."""
        return [(before, after + tail) for (before, after), tail in zip(self.sides, self.tails, strict=True)]

    @property
    def crop(self) -> Sides:
        """How the whole result of a transposed convolution is padded: by negative amounts, where it is cropped."""
        return [(-before, tail - after) for (before, after), tail in zip(self.sides, self.tails, strict=True)]


def window_entries(ops: Backend, data: Tensor, where: Windows, first: int) -> list[Tensor]:
    """For every element of the kernel, the elements of all windows at it; `first` is the first spatial axis."""
    found = [data]
    for axis in range(len(where.kernel)):
        found = [each for part in found for each in _along(ops, part, where, first, axis)]
    return found


def reduce_windows(
    ops: Backend, data: Tensor, where: Windows, first: int, combine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """One value per window, one axis after the other: by a maximum or a sum, which are independent of order."""
    for axis in range(len(where.kernel)):
        data = functools.reduce(combine, _along(ops, data, where, first, axis))
    return data


def _along(ops: Backend, data: Tensor, where: Windows, first: int, axis: int) -> list[Tensor]:
    """For every element of the kernel along one spatial axis, the tensor's elements at it in all windows."""
    kernel, stride, dilation = where.kernel[axis], where.strides[axis], where.dilations[axis]
    if kernel == stride == 1:
        return [data]
    size = ops.sizes(Value(ops, data))[first + axis]
    end = (size - spans([kernel], [dilation])[0]) // stride * stride + 1
    before = (slice(None),) * (first + axis)
    return [data[(*before, slice(at, at + end, stride))] for at in range(0, kernel * dilation, dilation)]


def flat_indices(ops: Backend, x: Value, storage_order: int) -> Value:
    """The flat index of every element, int64; with `storage_order` 1 the last two axes count the other way."""
    sizes, order = ops.sizes(x), list(range(x.rank or 0))
    if storage_order:
        order[-2:] = order[:-3:-1]
    indices = ops.cast(ops.range(0, product(sizes)), np.dtype(np.int64))
    return Value(ops, ops.reshape(indices, [sizes[axis] for axis in order])).permuted(order)


def windows(
    ops: Backend,
    sizes: Sequence[Any],
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Windows:
    """The windows over axes of given sizes, by the attributes of an ONNX node."""
    count = len(kernel_shape)
    strides, dilations = strides or [1] * count, dilations or [1] * count
    reach = spans(kernel_shape, dilations)
    sides = _sides(ops, sizes, reach, strides, pads, auto_pad)
    tails = [
        _tail(ops, size, span, stride, *side) if ceil_mode else 0
        for size, span, stride, side in zip(sizes, reach, strides, sides, strict=True)
    ]
    return Windows(list(kernel_shape), list(strides), list(dilations), sides, tails)


def spans(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """The extent of a window along each axis, dilation included."""
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def are_known(sides: Sides) -> bool:
    """Whether all amounts are known before the run."""
    return all(isinstance(each, int) for side in sides for each in side)


def _sides(
    ops: Backend, sizes: Sequence[Any], reach: Sequence[int], strides: Sequence[int], pads: Any, auto: str
) -> Sides:
    count = len(reach)
    if auto in ("NOTSET", ""):
        pads = pads or [0] * (2 * count)
        return [(pads[i], pads[i + count]) for i in range(count)]
    if auto == "VALID":
        return [(0, 0)] * count
    sides: Sides = []
    for size, span, stride in zip(sizes, reach, strides, strict=True):
        total = _not_negative(ops, (-(-size // stride) - 1) * stride + span - size)
        sides.append(_halves(total, auto))
    return sides


def _halves(total: Any, auto: str) -> tuple[Any, Any]:
    small, large = total // 2, total - total // 2
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _not_negative(ops: Backend, amount: Any) -> Any:
    return max(amount, 0) if isinstance(amount, int) else ops.maximum(amount, 0)


def _tail(ops: Backend, size: Any, span: int, stride: int, before: Any, after: Any) -> Any:
    """The extra padding for the last window, which must begin inside the axis or in the padding before it."""
    wanted = -(-(size + before + after - span) // stride) + 1
    starts = (size + before - 1) // stride + 1
    count = wanted - _not_negative(ops, wanted - starts)
    return _not_negative(ops, (count - 1) * stride + span - size - before - after)


def transposed_windows(
    sizes: Sequence[Any],
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
) -> tuple[Windows, list[Any]]:
    """The windows of a transposed convolution, and the sizes of its whole result.

    `sides` is cropped before and after each axis; `tails` is the node's `output_padding`, which is added after the
    whole result. `output_shape` may begin with batch and channels.
    """
    count = len(kernel_shape)
    strides, dilations = list(strides or [1] * count), list(dilations or [1] * count)
    reach, extra = spans(kernel_shape, dilations), output_padding or [0] * count
    whole = [(size - 1) * stride + span for size, stride, span in zip(sizes, strides, reach, strict=True)]
    if output_shape is None and auto_pad in ("NOTSET", "", "VALID"):
        pads = (pads if auto_pad != "VALID" else None) or [0] * (2 * count)
        sides = [(pads[i], pads[i + count]) for i in range(count)]
    else:
        wanted = output_shape[-count:] if output_shape else [n * s for n, s in zip(sizes, strides, strict=True)]
        sides = [_halves(have + more - want, auto_pad) for have, more, want in zip(whole, extra, wanted, strict=True)]
    return Windows(list(kernel_shape), strides, dilations, sides, extra), whole


def kernel_of(weight: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A convolution's attributes, its kernel's shape `(out, in, *spatial)` among them."""
    return {"kernel_shape": [int(size) for size in weight.shape[2:]], **attributes}
