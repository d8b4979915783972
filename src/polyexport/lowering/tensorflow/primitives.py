"""TensorFlow's primitives, as `Backend` describes them.

They are limited to operators that TensorFlow.js and TFLite have; others are composed of those.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import Size, Tensor, column_shape, is_known, static_of
from polyexport.lowering.spectra import fourier_table
from polyexport.lowering.tensorflow.weights import VARIABLE_FROM, set_shape
from polyexport.lowering.value import Value


def last(rank: int) -> tuple[int, ...]:
    """The order that has the channels last: `(0, 2, 3, 1)`."""
    return (0, *range(2, rank), 1)


def sizes_of(value: Value) -> list[Size]:
    """The size of each axis: an `int` where it is static, else a scalar int32 tensor."""
    shape = value.shape or ()
    if None not in shape:
        return list(shape)
    stored = tf.shape(value.stored)
    return [stored[value.placed(axis)] if size is None else size for axis, size in enumerate(shape)]


def tensor_sizes(tensor: Tensor) -> list[Size]:
    """The same of a tensor."""
    known = tensor.shape.as_list()
    dynamic = tf.shape(tensor) if None in known else None
    return [dynamic[axis] if size is None else size for axis, size in enumerate(known)]  # type: ignore[index]  # not None


def vector(sizes: Sequence[Size]) -> Any:
    """Sizes as TensorFlow's functions take them."""
    return list(sizes) if all(map(is_known, sizes)) else tf.stack([tf.cast(size, tf.int32) for size in sizes])


def reshape(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """A single size that is not known before the run becomes -1."""
    known = [size for size in sizes if is_known(size)]
    if len(known) == len(sizes) - 1 and 0 not in known and -1 not in known:
        return tf.reshape(tensor, [size if is_known(size) else -1 for size in sizes])
    made = tf.reshape(tensor, vector(sizes))
    return made if len(known) == len(sizes) else set_shape(made, static_of(sizes))


def full(sizes: Sequence[Size], content: Any, dtype: np.dtype[Any]) -> Tensor:
    """A tensor filled with a number; a constant if the sizes are known and small."""
    entry = tf.constant(np.asarray(content).astype(dtype))
    if all(map(is_known, sizes)):
        small = math.prod(sizes) < VARIABLE_FROM
        return tf.constant(np.full(sizes, content).astype(dtype)) if small else tf.fill(list(sizes), entry)
    return set_shape(tf.fill(vector(sizes), entry), static_of(sizes))


def broadcast(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """To sizes of which some may be scalar tensors."""
    return set_shape(tf.broadcast_to(tensor, vector(sizes)), static_of(sizes))


def unsqueeze(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """By one slice where the new axes come first, else axis by axis."""
    if axes == range(len(axes)):
        return tensor[(None,) * len(axes) + (Ellipsis,)]
    return functools.reduce(tf.expand_dims, axes, tensor)


def split(tensor: Tensor, sizes: Sequence[Size], axis: int) -> list[Tensor]:
    """Into parts of some sizes; even ones by the operator that TFLite runs fastest, which takes few dtypes."""
    if tensor.dtype in (tf.int64, tf.bool) and all(map(is_known, sizes)):
        before = (slice(None),) * (axis % tensor.shape.rank)
        ends = zip(sizes, itertools.accumulate(sizes), strict=True)
        return [tensor[(*before, slice(end - size, end))] for size, end in ends]
    even = all(map(is_known, sizes)) and len(set(sizes)) == 1
    return list(tf.split(tensor, len(sizes) if even else vector(sizes), axis, num=len(sizes)))


def pad(tensor: Tensor, sides: Sequence[tuple[int, int]], fill: Any) -> Tensor:
    """Padded, and cut where an amount is negative, by what is known before the run."""
    cuts = tuple(slice(max(-before, 0), min(after, 0) or None) for before, after in sides)
    if any(cut != slice(0, None) for cut in cuts):
        tensor = tensor[cuts]
    amounts = [(max(before, 0), max(after, 0)) for before, after in sides]
    return tf.pad(tensor, amounts, constant_values=tf.cast(fill, tensor.dtype)) if any(map(sum, amounts)) else tensor


def from_end(value: Value, size: Any) -> Any:
    """Indices without negative ones; constants stay constants. `size` is one, or one for each axis indexed."""
    if value.known is not None and ((value.known >= 0).all() or is_known(size)):
        return np.where(value.known < 0, value.known + (size if is_known(size) else 0), value.known)
    if value.known is not None and isinstance(size, list) and all(map(is_known, size)):
        return np.where(value.known < 0, value.known + np.array(size, value.known.dtype), value.known)
    indices = value.tensor
    return tf.where(indices < 0, indices + tf.cast(tf.stack(size), indices.dtype), indices)


def column(line: Tensor, axis: int, rank: int) -> Tensor:
    """A vector along one axis of tensors of a rank."""
    return tf.reshape(line, column_shape(axis, rank))


def grid(indices: Any, axis: int) -> Tensor:
    """The full index of every entry, its index along `axis` taken from `indices`."""
    indices = tf.convert_to_tensor(indices)
    sizes = tf.shape(indices, out_type=indices.dtype)
    rank = indices.shape.rank
    axes = [indices if i == axis else tf.broadcast_to(column(tf.range(sizes[i]), i, rank), sizes) for i in range(rank)]
    return tf.stack(axes, -1)


def scatter_add(size: Size, indices: Tensor, rows: Tensor) -> Tensor:
    """By a scatter into zeros, which TensorFlow.js and TFLite have."""
    shape = tf.concat([[tf.cast(size, indices.dtype)], tf.shape(rows, out_type=indices.dtype)[1:]], 0)
    return tf.scatter_nd(tf.expand_dims(indices, 1), rows, shape)


def nonzero(x: Tensor) -> Tensor:
    """The indices, `(count, axes)`."""
    return tf.where(x if x.dtype == tf.bool else tf.not_equal(x, tf.zeros([], x.dtype)))


def where(condition: Tensor, this: Tensor, that: Any) -> Tensor:
    """The second where the first is true, else the third, a tensor or a number."""
    return tf.where(condition, this, tf.cast(that, this.dtype))


def elu(x: Tensor, alpha: float) -> Tensor:
    """TensorFlow's elu has an alpha of 1."""
    return tf.nn.elu(x) if alpha == 1 else tf.where(x < 0, alpha * tf.math.expm1(x), x)


def wide(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computed in at least 32 bits: TensorFlow has no kernel for shorter integers, and ONNX's max of bools is an or."""

    def apply(x: Tensor, axes: Sequence[int], keepdims: bool) -> Tensor:
        if x.dtype in (tf.bool, tf.int8, tf.uint8, tf.int16, tf.uint16):
            return tf.cast(reduce(tf.cast(x, tf.int32), list(axes), keepdims), x.dtype)
        return reduce(x, list(axes), keepdims)

    return apply


def reduction(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With axes of any kind of sequence."""
    return lambda x, axes, keepdims: reduce(x, list(axes), keepdims)


def extreme(find: Callable[..., Tensor], reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The index along one axis, int64; of int64, which TFLite's operator does not take, where `reduce`'s result is."""

    def apply(x: Tensor, axis: int, keepdims: bool) -> Tensor:
        if x.dtype == tf.int64:
            found = tf.argmax(tf.cast(tf.equal(x, reduce(x, axis, True)), tf.int32), axis, tf.int64)
        else:
            found = find(x, axis, tf.int64)
        return tf.expand_dims(found, axis) if keepdims else found

    return apply


def magnitude(x: Tensor) -> Tensor:
    """The absolute value; TFLite's operator does not take int64."""
    return tf.maximum(x, -x) if x.dtype == tf.int64 else tf.abs(x)


def floor_divided(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, rounded down; of int64, which TFLite's operator does not take, by three quotients in float32.

    Each of them leaves 2^-22 of what it divides. The last one is exact, since a multiple of `b` is divided.
    """
    if a.dtype != tf.int64:
        return a // b
    divisor, quotient = tf.cast(b, tf.float32), tf.zeros([], tf.int64)
    rest = a - tf.math.floormod(a, b)
    for _ in range(3):
        part = tf.cast(tf.round(tf.cast(rest, tf.float32) / divisor), tf.int64)
        quotient, rest = quotient + part, rest - part * b
    return quotient


_SHORT = (tf.int8, tf.uint8, tf.int16, tf.uint16, tf.uint32, tf.uint64)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Of short integers in 64 bits; of vectors as matrices of one row or column."""
    if a.dtype in _SHORT:
        return tf.cast(matmul(tf.cast(a, tf.int64), tf.cast(b, tf.int64)), a.dtype)
    left = a[None, :] if a.shape.rank == 1 else a
    right = b[:, None] if b.shape.rank == 1 else b
    product = tf.matmul(left, right)
    if b.shape.rank == 1:
        product = tf.squeeze(product, -1)
    return tf.squeeze(product, -1 if b.shape.rank == 1 else -2) if a.shape.rank == 1 else product


def fourier(data: Tensor, axis: int, inverse: bool, kept: Size) -> Tensor:
    """For known sizes a matrix product: TFLite and TensorFlow.js have few operators for complex numbers."""
    rank, points, parts = data.shape.rank, data.shape[axis], data.shape[-1]
    if parts is None:
        raise NotImplementedError("whether the signal is real or complex, its last axis, must be known before the run")
    moved = [*(i for i in range(rank - 1) if i != axis), axis, rank - 1]
    back = [moved.index(i) for i in range(rank)]
    data = data if axis == rank - 2 else tf.transpose(data, moved)
    table = None
    if points is not None and is_known(kept):
        table = fourier_table(points, points, kept, parts=parts, inverse=inverse)
    if table is None:
        signal = tf.complex(data[..., 0], tf.zeros_like(data[..., 0]) if parts == 1 else data[..., 1])
        made = (tf.signal.ifft(signal) if inverse else tf.signal.fft(signal))[..., :kept]
        made = tf.stack([tf.math.real(made), tf.math.imag(made)], -1)
    else:
        sizes = tensor_sizes(data)[:-2]
        flat = reshape(data, [*sizes, points * parts])
        made = reshape(tf.matmul(flat, tf.constant(table, data.dtype)), [*sizes, kept, 2])
    return made if axis == rank - 2 else tf.transpose(made, back)


def drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A random function of TensorFlow, for sizes of which some may be scalar tensors."""

    def apply(sizes: Sequence[Size], first: float, second: float, seed: float | None, dtype: np.dtype[Any]) -> Tensor:
        drawn = draw(vector(sizes), first, second, tf.as_dtype(dtype), None if seed is None else int(seed))
        return set_shape(drawn, static_of(sizes))

    return apply
