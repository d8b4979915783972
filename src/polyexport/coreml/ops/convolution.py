"""Convolution and pooling over one to three spatial axes, `(N, C, *D)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from polyexport.coreml.ops.arguments import along, ints

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_MAXIMUM = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}

Pairs = list[tuple[int, int]]
"""Padding before and after, for each spatial axis."""


def _per_axis(given: Tensor | None, count: int) -> list[int]:
    return [1] * count if given is None else ints(given)


def _pairs(pad: Tensor | None, count: int) -> Pairs:
    widths = [0] * 2 * count if pad is None else ints(pad)
    return list(zip(widths[::2], widths[1::2], strict=True))


def _halves(total: int, *, lower: bool = False) -> tuple[int, int]:
    """Where a sum is odd, the larger part is behind, or with `lower` in front."""
    less = max(total, 0) // 2
    more = max(total, 0) - less
    return (more, less) if lower else (less, more)


def _padding(
    pad_type: str, pad: Tensor | None, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> Pairs:
    """Padding of windows that span `spans` elements."""
    if pad_type == "custom":
        return _pairs(pad, len(sizes))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    totals = [
        (math.ceil(size / stride) - 1) * stride + span - size
        for size, span, stride in zip(sizes, spans, strides, strict=True)
    ]
    return [_halves(total, lower=pad_type == "same_lower") for total in totals]


def _padded(x: Tensor, pairs: Pairs, value: float = 0.0) -> Tensor:
    return functional.pad(x, [width for pair in reversed(pairs) for width in pair], value=value)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    count = x.ndim - 2
    steps, spread = _per_axis(strides, count), _per_axis(dilations, count)
    spans = [(size - 1) * each + 1 for size, each in zip(weight.shape[2:], spread, strict=True)]
    padded = _padded(x, _padding(pad_type, pad, x.shape[2:], spans, steps))
    return _CONV[count](padded, weight, bias, steps, 0, spread, int(groups))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """The padding is cut off the full result; `output_shape` may ask for more than there is, which is then bias."""
    count = x.ndim - 2
    steps, spread = _per_axis(strides, count), _per_axis(dilations, count)
    full = _CONV_TRANSPOSE[count](x, weight, None, steps, 0, 0, int(groups), spread)
    pairs = _pairs(pad, count) if pad_type == "custom" else [(0, 0)] * count
    if pad_type.startswith("same"):
        grown = [size * step for size, step in zip(x.shape[2:], steps, strict=True)]
        pairs = [_halves(have - size) for have, size in zip(full.shape[2:], grown, strict=True)]
    if output_shape is not None:
        wanted = ints(output_shape)[-count:]
        pairs = [
            (before, have - before - size)
            for have, (before, _), size in zip(full.shape[2:], pairs, wanted, strict=True)
        ]
    result = _padded(full, [(-before, -after) for before, after in pairs])
    return result if bias is None else result + along(bias, 1, result.ndim)


def _ceiled(size: int, pair: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    """Padding with room behind for the last window, which begins beyond the input where there is no padding."""
    before, after = pair
    windows = math.ceil((size + before + after - kernel) / stride) + 1
    if (windows - 1) * stride >= size + before and before + after:
        windows -= 1
    return before, (windows - 1) * stride + kernel - size - before


def _windows(
    x: Tensor, kernel_sizes: Tensor, strides: Tensor | None, pad_type: str, pad: Tensor | None, ceil_mode: bool
) -> tuple[list[int], list[int], Pairs]:
    """Kernel, strides, and the padding with what the last window needs."""
    kernel = ints(kernel_sizes)
    steps = _per_axis(strides, len(kernel))
    pairs = _padding(pad_type, pad, x.shape[2:], kernel, steps)
    sizes = zip(x.shape[2:], pairs, kernel, steps, strict=True)
    return kernel, steps, [_ceiled(*each) for each in sizes] if ceil_mode else pairs


def max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    kernel, steps, pairs = _windows(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    return _MAXIMUM[len(kernel)](_padded(x, pairs, -math.inf), kernel, steps)


def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor | bool = False,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """What the last window of `ceil_mode` needs counts as padding, unlike in PyTorch.

    https://github.com/apple/coremltools/issues/2772
    """
    kernel, steps, pairs = _windows(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    average = _AVERAGE[len(kernel)]
    mean = average(_padded(x, pairs), kernel, steps)
    counted = _padded(torch.ones_like(x[:1, :1]), pairs)
    return mean / average(counted, kernel, steps) if exclude_padding_from_average else mean


def l2_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    kernel, steps, pairs = _windows(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    mean = _AVERAGE[len(kernel)](_padded(x.square(), pairs), kernel, steps)
    return torch.sqrt(mean * math.prod(kernel))


OPS = {each.__name__: each for each in (avg_pool, conv, conv_transpose, l2_pool, max_pool)}
