"""Fourier transforms and windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.resize import where
from polyexport.lowering.paddle.shape import padded
from polyexport.lowering.paddle.target import OPS, dtype_of, is_tensor, sizes_of, static, told, vector
from polyexport.lowering.spectra import block_places, mel_triangles
from polyexport.lowering.value import Tensor, Value


def _complex(x: Tensor) -> Tensor:
    """From a last axis of 1 (real) or 2 (real, imaginary)."""
    if x.shape[-1] < 0:
        raise NotImplementedError("whether the signal is real or complex, its last axis, must be known before the run")
    real = x[..., 0]
    return paddle.complex(real, paddle.zeros_like(real) if x.shape[-1] == 1 else x[..., 1])


def _parts(x: Tensor) -> Tensor:
    return paddle.stack([paddle.real(x), paddle.imag(x)], -1)


@OPS.op("DFT", since=20)
def transform(
    x: Value, length: Value | None = None, axis: Value | None = None, *, inverse: int = 0, onesided: int = 0, node: Node
) -> Tensor:
    """Along one axis, padded with zeros or cut to `length`."""
    places = [-2] if axis is None else static(axis)
    if places is None:
        raise node.unsupported("its axis is not known before the run")
    return _transformed(x, length, places[0], bool(inverse), bool(onesided))


@OPS.op("DFT", since=17)
def transform_attribute(
    x: Value, length: Value | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """With the axis as an attribute."""
    return _transformed(x, length, axis, bool(inverse), bool(onesided))


def _transformed(x: Value, length: Value | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    axis = axis % (x.rank or 1)
    have = sizes_of(x)[axis]
    if length is None:
        count = 2 * (have - 1) if inverse and onesided else have
    else:
        known = static(length)
        count = known[0] if known else paddle.cast(paddle.reshape(length.tensor, []), "int64")
    data = _mirrored(x.tensor, axis, have, count) if inverse and onesided else _fitted(x, axis, have, count)
    moved = _complex(data)
    made = paddle.fft.ifft(moved, axis=axis) if inverse else paddle.fft.fft(moved, axis=axis)
    if onesided and inverse:
        return paddle.unsqueeze(paddle.real(made), -1)
    parts = _parts(made)
    return parts[(slice(None),) * axis + (slice(0, count // 2 + 1),)] if onesided else parts


def _fitted(x: Value, axis: int, have: Any, count: Any) -> Tensor:
    """Cut, or filled with zeros, to a length."""
    if not is_tensor(have) and not is_tensor(count) and have == count:
        return x.tensor
    place = paddle.arange(0, count, 1, dtype="int64")
    found = paddle.gather(x.tensor, paddle.clip(place, max=have - 1), axis=axis)
    inside = paddle.reshape(place < have, [-1] + [1] * ((x.rank or 0) - axis - 1))
    return where(inside, told(found, [None] * axis + [None, *(x.shape or ())[axis + 1 :]]), 0.0)


def _mirrored(data: Tensor, axis: int, half: Any, count: Any) -> Tensor:
    """The whole spectrum of a real signal from its first half."""
    place = paddle.arange(0, count, 1, dtype="int64")
    mirrored = place >= half
    found = paddle.gather(data, paddle.where(mirrored, count - place, place), axis=axis)
    sign = 1 - 2 * paddle.cast(mirrored, data.dtype)
    sign = paddle.reshape(sign, [-1] + [1] * (len(data.shape) - axis - 2))
    return paddle.stack([found[..., 0], found[..., 1] * sign], -1)


@OPS.op("STFT", since=17)
def short_transform(
    signal: Value, step: Value, window: Value | None = None, length: Value | None = None,
    *, onesided: int = 1, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Frames of a signal `(batch, time[, 1 or 2])`, each weighed by the window and transformed."""
    data = signal.tensor if signal.rank == 3 else paddle.unsqueeze(signal.tensor, -1)
    size: list[int | None] = [*(static(length) or ())] or [*((window.shape or ()) if window is not None else ())]
    stride = static(step)
    if not size or size[0] is None or stride is None:
        raise node.unsupported("its frames' length or step is not known before the run")
    span = size[0]
    batch, time = sizes_of(signal)[:2]
    count = (time - span) // stride[0] + 1
    starts = paddle.arange(0, count, 1, dtype="int64") * stride[0]
    places = paddle.unsqueeze(starts, 1) + paddle.arange(0, span, 1, dtype="int64")
    frames = paddle.gather(data, paddle.reshape(places, [-1]), axis=1)
    frames = paddle.reshape(frames, vector([batch, count, span, data.shape[-1]]))
    frames = told(frames, [None, None, span, data.shape[-1]])
    if window is not None:
        missing = span - (window.shape or (span,))[0]  # type: ignore[operator]  # static
        wide = padded(window.tensor, [(missing // 2, missing - missing // 2)], 0.0)
        frames = frames * paddle.unsqueeze(wide, 1)
    made = _parts(paddle.fft.fft(_complex(frames), axis=2))
    return made[:, :, : span // 2 + 1] if onesided else made


@OPS.op("MelWeightMatrix", since=17)
def mel(
    bins: Value, length: Value, rate: Value, low: Value, high: Value, *, output_datatype: int = 1, node: Node
) -> np.ndarray:
    """Triangles on the mel scale, computed now."""
    given = [each.known for each in (bins, length, rate, low, high)]
    if any(each is None for each in given):
        raise node.unsupported("its parameters are not known before the run")
    return mel_triangles(*(each.item() for each in given if each is not None)).astype(dtype_of(output_datatype))


@OPS.op("Col2Im", since=18)
def columns_to_image(
    x: Value, image: Value, block: Value,
    *, dilations: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Blocks laid back where they came from, added where they overlap."""
    kernel, sizes = static(block), static(image)
    if kernel is None or sizes is None:
        raise node.unsupported("its shapes are not known before the run")
    pads = pads or [0] * 2 * len(kernel)
    places, wide = block_places(sizes, kernel, dilations, pads, strides)
    batch, depth = sizes_of(x)[:2]
    channels, total = depth // int(np.prod(kernel)), int(np.prod(wide))
    data = paddle.transpose(paddle.reshape(x.tensor, vector([batch * channels, places.size])), [1, 0])
    empty = paddle.zeros(vector([total, batch * channels]), data.dtype)
    flat = paddle.scatter_nd_add(empty, node.value(places.reshape(-1, 1)).tensor, data)
    whole = paddle.reshape(paddle.transpose(flat, [1, 0]), vector([batch, channels, *wide]))
    return whole[(slice(None), slice(None), *(slice(pads[i], pads[i] + size) for i, size in enumerate(sizes)))]
