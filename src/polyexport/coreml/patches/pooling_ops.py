"""Pools of one to three axes with `ceil_mode`, by padding; registered by `composite_ops.py`.

MIL's own `ceil_mode` differs from PyTorch's: it counts the part beyond the edge as padding, so that an average is too
small on a device, and without padding it keeps a window that is completely beyond the edge. So it is never written.

https://github.com/apple/coremltools/issues/2772
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyexport.coreml.patches.scatter_ops import _sizes


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a pool: their size, steps and padding along each axis, and what hangs over behind each.

    A dynamic axis gets the maximum that the last window may need, which adds no window.
    """

    kernel: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[int]
    overhang: Sequence[int]

    def pads(self) -> list[int]:
        """Before and after each axis, as MIL's ops take it."""
        pairs = zip(self.padding, self.overhang, strict=True)
        return [width for padding, over in pairs for width in (padding, padding + over)]


def _windows(x: Any, kernel: Any, strides: Any, padding: Any, ceil: Any, spread: Sequence[int] = (1, 1, 1)) -> Windows:
    sizes = _sizes(x)[2:]
    kernel = _ints(kernel, len(sizes), 1)
    strides, padding = _ints(strides, len(sizes), kernel), _ints(padding, len(sizes), 0)
    wide = [gap * (count - 1) + 1 for gap, count in zip(spread, kernel, strict=False)]
    axes = zip(sizes, wide, strides, padding, strict=True)
    overhang = [_overhang(*axis) if ceil is not None and ceil.val else 0 for axis in axes]
    return Windows(kernel, strides, padding, overhang)


def _ints(given: Any, count: int, default: Any) -> list[int]:
    """A number for each of `count` axes; PyTorch takes one for all, and none for the default."""
    values = np.ravel([each.val for each in given] if isinstance(given, list) else [] if given is None else given.val)
    return list(np.broadcast_to(np.asarray(values if len(values) else default, int), count).tolist())


def _overhang(size: int, kernel: int, stride: int, padding: int) -> int:
    """The extra padding for PyTorch's last window; a size of -1 is dynamic.

    Raises:
        NotImplementedError: a dynamic axis whose last window may begin beyond the edge, which PyTorch drops.
    """
    if size == -1:
        if kernel < stride + padding:
            raise NotImplementedError(f"ceil_mode along a dynamic axis with kernel {kernel} and stride {stride}")
        return stride - 1
    steps = math.ceil((size + 2 * padding - kernel) / stride)
    if steps * stride >= size + padding:
        steps -= 1
    return max(steps * stride + kernel - size - 2 * padding, 0)


def avg_pool(context: Any, node: Any) -> None:
    """Means over windows: of what PyTorch counts in each, or by a divisor of its own."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, kernel, strides, padding, ceil, counts, divisor = [*_get_inputs(context, node), *[None] * 5][:7]
    windows = _windows(x, kernel, strides, padding, ceil)
    counts_padding = counts is None or bool(counts.val)
    how: dict[str, Any] = {"kernel_sizes": windows.kernel, "strides": windows.strides}
    if divisor is None and not any(windows.overhang):
        how |= {"pad_type": "custom", "pad": windows.pads(), "exclude_padding_from_average": not counts_padding}
        context.add(mb.avg_pool(x=x, **how, name=node.name))
        return
    mean = mb.avg_pool(x=_padded(x, windows.pads()), **how, pad_type="valid")
    if divisor is not None:
        factor = math.prod(windows.kernel) / int(divisor.val)
        context.add(mb.mul(x=mean, y=np.float32(factor), name=node.name))
        return
    sizes = _sizes(x)[2:]
    ones = mb.fill_like(ref_tensor=x, value=1.0) if -1 in sizes else np.ones((1, 1, *sizes), np.float32)
    behind = [width for over in windows.overhang for width in (0, over)]
    counted = _padded(ones, np.repeat(windows.padding, 2).tolist(), float(counts_padding))
    share = mb.avg_pool(x=_padded(counted, behind), **how, pad_type="valid")
    context.add(mb.real_div(x=mean, y=share, name=node.name))


def _padded(x: Any, widths: Sequence[int], value: float = 0.0) -> Any:
    from coremltools.converters.mil import Builder as mb

    return mb.pad(x=x, pad=[0, 0, 0, 0, *widths], mode="constant", constant_val=value) if any(widths) else x


def max_pool(context: Any, node: Any) -> None:
    """The maximum of each window, and for the operator that returns them their indices, if all sizes are known.

    Raises:
        NotImplementedError: the windows are dilated, and sizes are dynamic.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, kernel, strides, padding, dilation, ceil = [*ops._get_inputs(context, node), *[None] * 4][:6]
    spread = _ints(dilation, x.rank - 2, 1)
    is_known, is_dilated = -1 not in _sizes(x)[1:], set(spread) != {1}
    if is_dilated and not is_known:
        raise NotImplementedError("a max pool over dilated windows")
    windows = _windows(x, kernel, strides, padding, ceil, spread)
    if is_dilated:
        greatest = _looked_up(x, windows, spread).greatest
    else:
        how = {"kernel_sizes": windows.kernel, "strides": windows.strides}
        greatest = mb.max_pool(x=x, **how, pad_type="custom", pad=windows.pads())
    if "with_indices" not in node.kind:
        context.add(mb.identity(x=greatest, name=node.name))
        return
    found = (greatest, _looked_up(x, windows, spread).indices if is_known else None)
    if context.frontend != ops.TorchFrontend.TORCHSCRIPT or not is_known:
        context.add(found, torch_name=node.name)
        return
    for name, result in zip(node.outputs, found, strict=True):
        context.add(result, torch_name=name)


@dataclass(frozen=True, slots=True)
class _LookedUp:
    """The maximum of each window, and its index in the flattened axes."""

    greatest: Any
    indices: Any


def _looked_up(x: Any, windows: Windows, spread: Sequence[int]) -> _LookedUp:
    """The elements of each window by a lookup, for known sizes; `spread` is the step between them along each axis."""
    from coremltools.converters.mil import Builder as mb

    channels, *sizes = _sizes(x)[1:]
    pads = windows.pads()
    padded = [size + before + after for size, before, after in zip(sizes, pads[::2], pads[1::2], strict=True)]
    taken = [
        np.add.outer(np.arange((size - gap * (width - 1) - 1) // stride + 1) * stride, np.arange(width) * gap)
        for size, stride, width, gap in zip(padded, windows.strides, windows.kernel, spread, strict=True)
    ]
    flat = mb.reshape(x=_padded(x, pads, _LEAST), shape=[-1, channels, math.prod(padded)])
    elements = mb.gather(x=flat, indices=_table(taken, padded), axis=2)
    own = _table([each - before for each, before in zip(taken, windows.padding, strict=True)], sizes)
    rows = np.arange(len(own), dtype=np.int32) * own.shape[1]
    chosen = mb.add(x=mb.cast(x=mb.reduce_argmax(x=elements, axis=3), dtype="int32"), y=rows)
    shape = [-1, channels, *map(len, taken)]
    return _LookedUp(
        greatest=mb.reshape(x=mb.reduce_max(x=elements, axes=[3], keep_dims=False), shape=shape),
        indices=mb.reshape(x=mb.gather(x=own.ravel(), indices=chosen, axis=0), shape=shape),
    )


_LEAST = -3.0e38


def _table(taken: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """The index of each element of each window, `(windows, elements)`, in a flattened array of these sizes.

    `taken` has the indices along each axis, `(windows, elements)` too.
    """
    total = np.zeros((1, 1), np.int64)
    for along, size in zip(taken, sizes, strict=True):
        joined = total[:, None, :, None] * size + along[None, :, None, :]
        total = joined.reshape(total.shape[0] * along.shape[0], -1)
    return total.astype(np.int32)


COMPOSITES = {
    **{f"avg_pool{rank}d": avg_pool for rank in (1, 2, 3)},
    **{f"max_pool{rank}d{of}": max_pool for rank in (1, 2, 3) for of in ("", "_with_indices")},
}
