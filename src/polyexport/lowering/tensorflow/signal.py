"""Fourier transforms and windows.

Of a known size, a transform is a product with a table: complex numbers have hardly an operator in TFLite and
TensorFlow.js.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.spectra import block_places, fourier_table, mel_triangles
from polyexport.lowering.tensorflow.target import OPS, dtype_of, sizes_of, static
from polyexport.lowering.value import Tensor, Value


def _complex(x: Tensor) -> Tensor:
    """From a last axis of 1 (real) or 2 (real, imaginary)."""
    if x.shape[-1] is None:
        raise NotImplementedError("whether the signal is real or complex, its last axis, must be known before the run")
    imaginary = tf.zeros_like(x[..., 0]) if x.shape[-1] == 1 else x[..., 1]
    return tf.complex(x[..., 0], imaginary)


def _product(data: Tensor, points: int | None, wanted: int | None, *, inverse: bool = False) -> Tensor | None:
    """The transform of the axis before the last as a product; None where a size is unknown or too large for that."""
    have, parts = data.shape[-2:]
    if have is None or parts is None or points is None or wanted is None:
        return None
    have = min(have, points)
    table = fourier_table(have, points, wanted, parts=parts, inverse=inverse)
    if table is None:
        return None
    leading = tf.shape(data)[:-2]
    flat = tf.reshape(data[..., :have, :], tf.concat([leading, [have * parts]], 0))
    made = tf.reshape(tf.matmul(flat, tf.constant(table, data.dtype)), tf.concat([leading, [wanted, 2]], 0))
    made.set_shape([*data.shape[:-2], wanted, 2])
    return made


def _parts(x: Tensor) -> Tensor:
    return tf.stack([tf.math.real(x), tf.math.imag(x)], -1)


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
    rank = x.rank or 0
    axis = axis % rank
    data = x.tensor
    if inverse and onesided:
        data = _mirrored(data, axis, length)
    known = data.shape[axis] if length is None else (static(length) or (None,))[0]
    product = _product(
        tf.experimental.numpy.moveaxis(data, axis, -2),
        known,
        known // 2 + 1 if known is not None and onesided and not inverse else known,
        inverse=inverse,
    )
    if product is not None:
        moved = tf.experimental.numpy.moveaxis(product, -2, axis)
        return moved[..., :1] if inverse and onesided else moved
    moved = tf.experimental.numpy.moveaxis(_complex(data), axis, -1)
    count = tf.shape(moved)[-1] if length is None else tf.cast(tf.reshape(length.tensor, []), tf.int32)
    have = tf.shape(moved)[-1]
    moved = moved[..., : tf.minimum(count, have)]
    missing = tf.maximum(count - have, 0)
    moved = tf.pad(moved, tf.concat([tf.zeros([rank - 2, 2], tf.int32), [[0, missing]]], 0))
    made = tf.signal.ifft(moved) if inverse else tf.signal.fft(moved)
    if onesided and inverse:
        return tf.experimental.numpy.moveaxis(tf.math.real(made), -1, axis)[..., None]
    if onesided:
        made = made[..., : count // 2 + 1]
    return _parts(tf.experimental.numpy.moveaxis(made, -1, axis))


def _mirrored(data: Tensor, axis: int, length: Value | None) -> Tensor:
    """The whole spectrum of a real signal from its first half."""
    half = tf.shape(data)[axis]
    count = 2 * (half - 1) if length is None else tf.cast(tf.reshape(length.tensor, []), tf.int32)
    place = tf.range(count)
    mirrored = place >= half
    found = tf.gather(data, tf.where(mirrored, count - place, place), axis=axis)
    sign = tf.reshape(tf.where(mirrored, -1.0, 1.0), [-1] + [1] * (data.shape.rank - axis - 2))
    return tf.stack([found[..., 0], found[..., 1] * tf.cast(sign, data.dtype)], -1)


@OPS.op("STFT", since=17)
def short_transform(
    signal: Value,
    step: Value,
    window: Value | None = None,
    length: Value | None = None,
    *,
    onesided: int = 1,
    node: Node,
) -> Tensor:
    """Frames of a signal `(batch, time[, 1 or 2])`, each weighed by the window and transformed."""
    data = signal.tensor if signal.rank == 3 else signal.tensor[..., None]
    size: list[int | None] = [*(static(length) or ())] or [*((window.shape or ()) if window is not None else ())]
    stride = static(step)
    if not size or size[0] is None or stride is None:
        raise node.unsupported("its frames' length or step is not known before the run")
    frames = tf.signal.frame(data, size[0], stride[0], axis=1)
    if window is not None:
        frames *= _centred(window.tensor, size[0])[:, None]
    product = _product(frames, size[0], size[0] // 2 + 1 if onesided else size[0])
    if product is not None:
        return product
    made = tf.signal.fft(_complex(frames))
    return _parts(made[..., : size[0] // 2 + 1] if onesided else made)


def _centred(window: Tensor, size: int) -> Tensor:
    missing = size - window.shape[0]
    return tf.pad(window, [(missing // 2, missing - missing // 2)])


@OPS.op("MelWeightMatrix", since=17)
def mel(
    bins: Value, length: Value, rate: Value, low: Value, high: Value, *, output_datatype: int = 1, node: Node
) -> np.ndarray:
    """Triangles on the mel scale, computed now."""
    given = [each.known for each in (bins, length, rate, low, high)]
    if any(each is None for each in given):
        raise node.unsupported("its parameters are not known before the run")
    return mel_triangles(*(each.item() for each in given if each is not None)).astype(
        dtype_of(output_datatype).as_numpy_dtype
    )


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
    batch, depth = sizes_of(x)[0], (x.shape or ())[1]
    channels = depth // int(np.prod(kernel)) if depth is not None else -1
    data = tf.reshape(x.tensor, tf.stack([batch, channels, places.size]))
    rows = tf.transpose(data, [2, 0, 1])
    shape = tf.concat([[int(np.prod(wide))], tf.shape(rows)[1:]], 0)
    flat = tf.scatter_nd(
        places.reshape(-1, 1).astype(np.int32), rows, shape
    )  # adds up; LiteRT and TensorFlow.js have it
    whole = tf.reshape(tf.transpose(flat, [1, 2, 0]), tf.stack([batch, channels, *wide]))
    return whole[(slice(None), slice(None), *(slice(pads[i], pads[i] + size) for i, size in enumerate(sizes)))]
