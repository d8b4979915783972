"""Paddle's primitives, as `Backend` describes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.backend import Size, Tensor, column_shape, is_float, is_known
from polyexport.lowering.paddle.weights import ONEDNN_AXES, Weights, is_kept, numpy_dtype, paddle_dtype, set_shape
from polyexport.lowering.value import Value


def static_shape(tensor: Tensor) -> list[int | None]:
    """A tensor's sizes, None for those that are not known before the run."""
    return [None if size < 0 else int(size) for size in tensor.shape]


def sizes_of(value: Value) -> list[Size]:
    """The size of each axis: an `int` where it is static, else a scalar int64 tensor."""
    shape = value.shape or ()
    return list(shape) if None not in shape else tensor_sizes(value.tensor)


def tensor_sizes(tensor: Tensor) -> list[Size]:
    """The same of a tensor."""
    known = static_shape(tensor)
    sizes = cast(paddle.shape(tensor), "int64") if None in known else None
    return [sizes[axis] if size is None and sizes is not None else size for axis, size in enumerate(known)]


def moved(tensor: Tensor, axes: int, move: Callable[[Tensor], Tensor]) -> Tensor:
    """What becomes of a tensor that is only moved, to a number of axes; past oneDNN where that takes no such number."""
    if tensor.dtype != paddle.float32 or max(axes, len(tensor.shape)) <= ONEDNN_AXES:
        return move(tensor)
    return paddle.cast(move(paddle.cast(tensor, "float64")), "float32")


def reshape(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """To sizes of which some may be scalar tensors; an `int` of 0 is meant as one."""
    return moved(tensor, len(sizes), lambda each: _reshaped(each, sizes))


def _reshaped(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    known = [size for size in sizes if is_known(size)]
    if 0 in known:
        return paddle.zeros(list(sizes), tensor.dtype)  # Paddle's reshape would keep a size there
    if len(known) == len(sizes) - 1 and -1 not in known:
        return paddle.reshape(tensor, [int(size) if is_known(size) else -1 for size in sizes])
    return paddle.reshape(tensor, list(sizes))


def broadcast(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """To sizes of which some may be scalar tensors."""
    missing = len(sizes) - len(tensor.shape)
    return paddle.expand(unsqueeze(tensor, range(missing)) if missing else tensor, list(sizes)) if sizes else tensor


def full(weights: Weights) -> Callable[[Sequence[Size], Any, np.dtype[Any]], Tensor]:
    """Filled with a number; one that an attribute of a saved program cannot hold is a weight."""

    def apply(sizes: Sequence[Size], content: Any, dtype: np.dtype[Any]) -> Tensor:
        array = np.asarray(content, dtype)
        if is_kept(array):
            return paddle.full(list(sizes), array.item(), paddle_dtype(dtype))
        return broadcast(weights.tensor(array), sizes)

    return apply


def transpose(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor with its axes in another order."""
    return moved(tensor, len(order), lambda each: paddle.transpose(each, list(order)))


def vector(entries: Sequence[Size]) -> Tensor:
    """An int64 tensor of integers of which some are scalar tensors."""
    if all(map(is_known, entries)):
        return assigned(np.array(entries, np.int64))
    scalars = [paddle.full([], each, "int64") if is_known(each) else cast(each, "int64") for each in entries]
    return paddle.stack([paddle.reshape(each, []) for each in scalars])


def assigned(content: Any) -> Tensor:
    """A numpy array as a constant of the program; a tensor as it is."""
    if not isinstance(content, np.ndarray):
        return content
    array = np.ascontiguousarray(content)
    return paddle.to_tensor(array) if paddle.in_dynamic_mode() else paddle.assign(array)


def squeeze(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """By a reshape, which takes any number of axes."""
    return reshape(tensor, [size for axis, size in enumerate(tensor_sizes(tensor)) if axis not in axes])


def unsqueeze(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """With new axes, ascending and counted in the result."""
    return moved(tensor, len(tensor.shape) + len(axes), lambda each: paddle.unsqueeze(each, list(axes)))


def split(tensor: Tensor, sizes: Sequence[Size], axis: int) -> list[Tensor]:
    """One part after another along an axis, of sizes of which some may be scalar tensors."""
    if all(map(is_known, sizes)) and len(set(sizes)) == 1 and tensor.shape[axis] == sum(sizes):
        return list(paddle.split(tensor, len(sizes), axis))
    found, start = [], 0
    for size in sizes:
        part = paddle.slice(tensor, [axis], [start], [start + size])
        known = static_shape(part)
        known[axis] = int(size) if is_known(size) else None
        found.append(set_shape(part, known))
        start = start + size
    return found


FAR = 2**31 - 1  # beyond any axis


def pad(tensor: Tensor, sides: Sequence[tuple[int, int]], fill: Any) -> Tensor:
    """Padded, and cut where an amount is negative, by what is known before the run."""
    if tensor.dtype == paddle.bool:
        return paddle.cast(pad(paddle.cast(tensor, "int32"), sides, int(fill)), "bool")
    cuts = [(axis, max(-before, 0), min(after, 0) or FAR) for axis, (before, after) in enumerate(sides)]
    cuts = [cut for cut in cuts if cut[1:] != (0, FAR)]
    if cuts:
        tensor = paddle.slice(tensor, *(list(part) for part in zip(*cuts, strict=True)))
    wide = [(max(before, 0), max(after, 0)) for before, after in sides]
    if 3 <= len(wide) <= 5 and not any(map(any, wide[:2])) and any(map(any, wide)):
        return F.pad(tensor, [each for side in reversed(wide[2:]) for each in side], value=fill)
    for axis, (before, after) in enumerate(wide):  # Paddle's operator for any axis pads others when oneDNN runs it
        parts = [_filled(tensor, axis, before, fill), tensor, _filled(tensor, axis, after, fill)]
        tensor = paddle.concat([part for part in parts if part is not None], axis) if before or after else tensor
    return tensor


def _filled(tensor: Tensor, axis: int, count: int, fill: float) -> Tensor | None:
    """As many slices of one value, None for no slice."""
    if not count:
        return None
    own = tensor_sizes(tensor)
    return paddle.full([*own[:axis], count, *own[axis + 1 :]], fill, tensor.dtype)


def from_end(value: Value, size: Any) -> Tensor:
    """Indices in int64, negative ones counted from a size, or from one for each axis that they index."""
    is_static = all(map(is_known, size)) if isinstance(size, list) else is_known(size)
    if value.known is not None and (is_static or (value.known >= 0).all()):
        known = value.known.astype(np.int64)
        whole = np.array(size) if is_static else 0
        return Value(value.backend, known=np.where(known < 0, known + whole, known)).tensor
    indices = cast(value.tensor, "int64")
    return paddle.where(indices < 0, indices + (vector(size) if isinstance(size, list) else size), indices)


def gather(tensor: Tensor, indices: Any, axis: int) -> Tensor:
    """Entries along an axis, in the shape of the indices."""
    indices = assigned(indices)
    if len(indices.shape) == 1:
        return paddle.index_select(tensor, indices, axis)
    taken = paddle.index_select(tensor, paddle.reshape(indices, [-1]), axis)
    sizes = tensor_sizes(tensor)
    return reshape(taken, [*sizes[:axis], *tensor_sizes(indices), *sizes[axis + 1 :]])


def take_along(tensor: Tensor, indices: Tensor, axis: int) -> Tensor:
    """One entry along an axis for each index."""
    return paddle.take_along_axis(tensor, indices, axis, broadcast=False)


def line(start: Size, end: Size) -> Tensor:
    """The integers from a size up to another one."""
    return paddle.arange(start, end, 1, "int64")


def one_hot(indices: Tensor, size: Size, axis: int) -> Tensor:
    """By a comparison with all indices."""
    return paddle.unsqueeze(indices, axis) == reshape(line(0, size), column_shape(axis, len(indices.shape) + 1))


def scatter_add(size: Size, indices: Tensor, rows: Tensor) -> Tensor:
    """By a scatter into zeros."""
    empty = paddle.zeros(vector([size, *tensor_sizes(rows)[1:]]), rows.dtype)
    return paddle.scatter_nd_add(empty, paddle.unsqueeze(cast(indices, "int64"), 1), rows)


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """The tensor in a type of numpy's; itself where it has it."""
    wanted = paddle_dtype(dtype)
    return tensor if tensor.dtype == wanted else paddle.cast(tensor, wanted)


def where(condition: Tensor, this: Tensor, that: Any) -> Tensor:
    """The second where the first is true, else the third, a tensor or a number."""
    # of three shapes Paddle makes one by additions
    return paddle.where(condition, this, paddle.full_like(this, that) if is_known(that) else that)


def as_tensor(content: Any, like: Tensor) -> Tensor:
    """A number as a scalar of another tensor's type; a tensor as it is."""
    return paddle.full([], content, like.dtype) if is_known(content) else content


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum; as a difference where a pass of the inference runtime would make it part of the product before it.

    oneDNN's matrix products and convolutions can end in an addition, but what they add may not be wider than they are,
    and narrower only as a bias is: a vector as long as their last axis.
    """
    narrow, wide = sorted((list(a.shape), list(b.shape)), key=len)
    is_bias = len(narrow) == 1 < len(wide) and narrow[0] == wide[-1] > 1
    if a.dtype != paddle.float32 or is_bias or (narrow == wide and len(wide) > 1):
        return paddle.add(a, b)
    return a - (-b) if list(a.shape) == wide else b - (-a)


def round_(x: Tensor) -> Tensor:
    """Halves to even numbers, which Paddle's own kernel rounds away from zero."""
    low = paddle.floor(x)
    rest = x - low
    odd = low - 2 * paddle.floor(low / 2)
    up = paddle.logical_or(rest > 0.5, paddle.logical_and(rest == 0.5, odd == 1))
    return paddle.where(up, low + 1, low)


def relu(x: Tensor) -> Tensor:
    """Of integers too."""
    return F.relu(x) if is_float(numpy_dtype(x.dtype)) else paddle.clip(x, min=0)


def softplus(x: Tensor) -> Tensor:
    """Without the threshold from which Paddle's is a line."""
    return paddle.maximum(x, paddle.zeros_like(x)) + paddle.log1p(paddle.exp(-paddle.abs(x)))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of tensors of any rank, one included; of integers in float64, which alone has a kernel."""
    if not is_float(numpy_dtype(a.dtype)):
        return cast(matmul(cast(a, "float64"), cast(b, "float64")), numpy_dtype(a.dtype))
    made = paddle.matmul(a, b)
    if min(len(a.shape), len(b.shape)) < 2:
        return made
    # of 1 and a size unknown before the run Paddle makes 1
    pairs = itertools.zip_longest(reversed(a.shape[:-2]), reversed(b.shape[:-2]), fillvalue=1)
    batch = [max(pair) if max(pair) > 1 else min(pair) for pair in pairs]
    sizes = [*reversed(batch), a.shape[-2], b.shape[-1]]
    return set_shape(made, [None if size < 0 else size for size in sizes])


def layer_norm(x: Value, scale: Value, bias: Value | None, epsilon: float) -> Tensor | None:
    """Of float32 by Paddle's own operator, which is eight times as fast as its parts."""
    sizes = (x.shape or ())[-1:]
    if x.dtype != np.float32 or any(each.shape != sizes for each in (scale, bias) if each is not None):
        return None
    return F.layer_norm(x.tensor, list(sizes), scale.tensor, None if bias is None else bias.tensor, epsilon)


def fourier(data: Tensor, axis: int, inverse: bool, kept: Size) -> Tensor:
    """By Paddle's own transforms, of complex numbers."""
    if data.shape[-1] < 0:
        raise NotImplementedError("whether the signal is real or complex, its last axis, must be known before the run")
    real = data[..., 0]
    signal = paddle.complex(real, paddle.zeros_like(real) if data.shape[-1] == 1 else data[..., 1])
    made = paddle.fft.ifft(signal, axis=axis) if inverse else paddle.fft.fft(signal, axis=axis)
    parts = paddle.stack([paddle.real(made), paddle.imag(made)], -1)
    return parts if kept is data.shape[axis] else parts[(slice(None),) * axis + (slice(0, kept),)]


Reduction = Callable[[Tensor, Sequence[int], bool], Tensor]


def reduction(reduce: Callable[..., Tensor]) -> Reduction:
    """In the type of the input, where Paddle would widen it."""
    return lambda x, axes, keepdims: cast(reduce(x, list(axes), keepdim=keepdims), numpy_dtype(x.dtype))


def extreme(reduce: Callable[..., Tensor], sign: int, weights: Weights) -> Reduction:
    """ONNX's max of bools is an or; of nothing it is the least number, and Paddle has no answer."""

    def apply(x: Tensor, axes: Sequence[int], keepdims: bool) -> Tensor:
        if x.dtype == paddle.bool:
            return paddle.cast(apply(paddle.cast(x, "int32"), axes, keepdims), "bool")
        for axis in axes:
            if x.shape[axis] <= 0:  # none, or nobody knows
                x = paddle.concat([x, _limits(x, axis, sign, weights)], axis)
        return reduce(x, list(axes), keepdim=keepdims)

    return apply


def _limits(x: Tensor, axis: int, sign: int, weights: Weights) -> Tensor:
    """One slice more, of what changes no extreme."""
    dtype, sizes = numpy_dtype(x.dtype), tensor_sizes(x)
    limit = np.inf if dtype.kind == "f" else np.iinfo(dtype).max
    return paddle.expand(weights.tensor(np.array(sign * limit, dtype)), [*sizes[:axis], 1, *sizes[axis + 1 :]])


def log_sum_exp(x: Tensor, axes: Sequence[int], keepdims: bool, greatest: Tensor) -> Tensor:
    """Where the greatest is infinite, that is it; Paddle's own says NaN, and its exponential of -inf is not zero."""
    endless = paddle.isinf(greatest)
    shift = paddle.where(endless, paddle.zeros_like(greatest), greatest)
    whole = paddle.log(reduction(paddle.sum)(paddle.exp(x - shift), axes, True)) + shift
    whole = paddle.where(endless, greatest, whole)
    return whole if keepdims else paddle.squeeze(whole, list(axes))


def normal(sizes: Sequence[Size], mean: float, scale: float, seed: float | None, dtype: np.dtype[Any]) -> Tensor:
    """Drawn normally."""
    return cast(paddle.tensor.random.gaussian(vector(sizes), mean, scale, _seed(seed), dtype="float32"), dtype)


def uniform(sizes: Sequence[Size], low: float, high: float, seed: float | None, dtype: np.dtype[Any]) -> Tensor:
    """Drawn evenly."""
    return cast(paddle.uniform(vector(sizes), "float32", low, high, _seed(seed)), dtype)


def _seed(seed: float | None) -> int:
    return int(seed) if seed is not None else 0  # by which Paddle takes another one at each run
