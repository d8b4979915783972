"""Operators that move, cut and join."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.target import OPS, dtype_of, sizes_of, static, told
from polyexport.lowering.value import Tensor, Value, align


@OPS.op("Transpose")
def transpose(x: Value, *, perm: list[int] | None = None) -> Value:
    """Nothing moves yet; see `Value.permuted`."""
    return x.permuted(perm if perm is not None else list(range(x.rank or 0))[::-1])


@OPS.op("Shape")
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Any:
    """Known where the sizes are static, and then no tensor is asked for anything."""
    if x.shape is None:
        return tf.shape(x.tensor, out_type=tf.int64)[start:end]
    wanted = x.shape[start:end]
    if None not in wanted:
        return np.array(wanted, np.int64)
    sizes = tf.shape(x.stored, out_type=tf.int64)
    return tf.stack([sizes[x.placed(axis)] for axis in range(len(x.shape))[start:end]])


@OPS.op("Size")
def size(x: Value) -> Any:
    """The number of entries."""
    if x.shape is not None and None not in x.shape:
        return np.array(_product(x.shape), np.int64)
    return tf.size(x.stored, out_type=tf.int64)


def _product(sizes: Sequence[int | None]) -> int:
    return math.prod(size for size in sizes if size is not None)


@OPS.op("Reshape", since=5)
def reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Tensor:
    """0 keeps a size unless `allowzero`, -1 is what is left; one size may be unknown before the run."""
    target = None if shape.sizes is None else [None if each is None else int(each) for each in shape.sizes]
    if target is None:
        return tf.reshape(x.tensor, _kept(x, shape.tensor, allowzero))
    kept = x.shape or ()
    free = [i for i, each in enumerate(target) if each is None]
    target = [kept[i] if each == 0 and not allowzero and i < len(kept) else each for i, each in enumerate(target)]
    unknown = [i for i, each in enumerate(target) if each is None]
    if len(unknown) == 1 and -1 not in target and 0 not in target:
        return tf.reshape(x.tensor, [-1 if each is None else each for each in target])
    if not unknown:
        return tf.reshape(x.tensor, target)
    # more sizes are free than one: the run's own shape has them
    own = sizes_of(x)
    content = shape.tensor if free else None
    entries = [content[i] if i in free else own[i] if each is None else each for i, each in enumerate(target)]  # type: ignore[index]  # there is content where a size is free
    made = tf.reshape(x.tensor, tf.stack([tf.cast(entry, tf.int64) for entry in entries]))
    made.set_shape([None if each == -1 else each for each in target])
    return made


def _kept(x: Value, shape: Tensor, allowzero: int) -> Tensor:
    if allowzero:
        return shape
    own = tf.shape(x.tensor, out_type=shape.dtype)
    count = tf.shape(shape)[0]
    padded = tf.concat([own, tf.zeros([count], shape.dtype)], 0)[:count]
    return tf.where(shape == 0, padded, shape)


@OPS.op("Flatten")
def flatten(x: Value, *, axis: int = 1) -> Tensor:
    """Two axes: what lies before `axis`, and the rest."""
    rank = x.rank or 0
    axis = axis + rank if axis < 0 else axis
    own = x.shape or ()
    if None not in own[axis:] and 0 not in own:
        return tf.reshape(x.tensor, [-1, _product(own[axis:])])
    if None not in own[:axis] and 0 not in own:
        return tf.reshape(x.tensor, [_product(own[:axis]), -1])
    sizes = tf.shape(x.tensor)
    return tf.reshape(x.tensor, [tf.reduce_prod(sizes[:axis]), tf.reduce_prod(sizes[axis:])])


@OPS.op("Squeeze", since=13)
def squeeze(x: Value, axes: Value | None = None, *, node: Node) -> Value:
    """The axes named, or all of size 1; the order of the others stays."""
    if axes is None and (x.shape is None or None in x.shape):
        return node.value(tf.squeeze(x.tensor))
    chosen = static(axes) if axes is not None else [i for i, each in enumerate(x.shape or ()) if each == 1]
    if chosen is None:
        raise node.unsupported("its axes are not known before the run")
    return squeezed(x, chosen, node)


@OPS.op("Squeeze")
def squeeze_attribute(x: Value, *, axes: list[int] | None = None, node: Node) -> Value:
    """With the axes as an attribute."""
    return squeeze(x, None if axes is None else node.value(np.array(axes)), node=node)


def squeezed(x: Value, axes: list[int], node: Node) -> Value:
    """Without some axes of size 1, wherever they lie."""
    if not axes:
        return x
    gone = sorted(axis % (x.rank or 1) for axis in axes)
    tensor = tf.squeeze(x.stored, [x.placed(axis) for axis in gone])
    return node.value(tensor, remaining(x, gone))


def remaining(x: Value, gone: list[int]) -> tuple[int, ...] | None:
    """The order of what is left when some axes are gone."""
    if x.order is None:
        return None
    left = [axis for axis in x.order if axis not in gone]
    return tuple(sorted(left).index(axis) for axis in left)


@OPS.op("Unsqueeze", since=13)
def unsqueeze(x: Value, axes: Value, *, node: Node) -> Tensor:
    """New axes of size 1, counted in the result."""
    places = static(axes)
    if places is None:
        raise node.unsupported("its axes are not known before the run")
    rank = (x.rank or 0) + len(places)
    tensor = x.tensor
    for axis in sorted(axis % rank for axis in places):
        tensor = tf.expand_dims(tensor, axis)
    return tensor


@OPS.op("Unsqueeze")
def unsqueeze_attribute(x: Value, *, axes: list[int], node: Node) -> Tensor:
    """With the axes as an attribute."""
    return unsqueeze(x, node.value(np.array(axes)), node=node)


@OPS.op("Concat", since=4)
def concat(*parts: Value, axis: int, node: Node) -> Value:
    """In the order that the first part with a layout of its own is stored in."""
    if len(parts) == 1:
        return parts[0]
    tensors, order = align(parts)
    return node.value(tf.concat(tensors, _place(axis, order, parts[0])), order)


def _place(axis: int, order: tuple[int, ...] | None, x: Value) -> int:
    axis = axis + (x.rank or 0) if axis < 0 else axis
    return axis if order is None else order.index(axis)


@OPS.op("Split", since=13)
def split_(x: Value, sizes: Value | None = None, *, axis: int = 0, num_outputs: int | None = None, node: Node) -> Any:
    """Into the sizes given, or evenly with a smaller last part."""
    where = x.placed(axis)
    if sizes is not None:
        parts = tf.split(x.stored, static(sizes) or sizes.tensor, where, num=node.outputs)
    else:
        parts = _even(x, axis, num_outputs or node.outputs)
    return tuple(node.value(part, x.order) for part in parts)


def _even(x: Value, axis: int, count: int) -> list[Tensor]:
    total = sizes_of(x)[axis]
    where = x.placed(axis)
    each = -(-total // count)
    if isinstance(total, int):
        return list(tf.split(x.stored, [min(each, total - i * each) for i in range(count)], where))
    last = total - each * (count - 1)
    return list(tf.split(x.stored, tf.stack([each] * (count - 1) + [last]), where, num=count))


@OPS.op("Split")
def split_attribute(x: Value, *, axis: int = 0, split: list[int] | None = None, node: Node) -> Any:
    """With the sizes as an attribute."""
    return split_(x, None if split is None else node.value(np.array(split)), axis=axis, node=node)


@OPS.op("Slice", since=10)
def slice_(
    x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None, *, node: Node
) -> Value:
    """Bounds beyond the tensor are cut to it, negative ones count from its end."""
    rank = x.rank or 0
    chosen = list(range(rank)) if axes is None else static(axes)
    stride = [1] * rank if steps is None else static(steps)
    if chosen is None or stride is None:
        return _slice_unknown(x, starts, ends, axes, steps, node)
    chosen = [axis % rank for axis in chosen]
    begin, end = static(starts), static(ends)
    if begin is None or end is None:
        return _slice_dynamic(x, starts, ends, chosen, stride, node)
    cuts: list[Any] = [slice(None)] * rank
    for axis, first, last, step in zip(chosen, begin, end, stride, strict=False):
        cuts[x.placed(axis)] = _cut(first, last, step, (x.shape or ())[axis])
    return node.value(x.stored[tuple(cuts)], x.order)


def _cut(first: int, last: int, step: int, size: int | None) -> slice:
    if size is not None:
        return _within(*slice(first, last, step).indices(size))
    bound = 2**31 - 1
    start = None if step < 0 and first >= bound else max(min(first, bound), -bound)
    # with a negative step, an end far below zero means: the first entry included
    return slice(start, None if abs(last) >= bound else last, step)


def _within(start: int, stop: int, step: int) -> slice:
    return slice(start, None if stop < 0 else stop, step)


def _slice_dynamic(x: Value, starts: Value, ends: Value, axes: list[int], steps: list[int], node: Node) -> Value:
    rank = x.rank or 0
    begin, end, stride = [tf.constant(0, tf.int64)] * rank, [tf.constant(0, tf.int64)] * rank, [1] * rank
    from_, to = tf.cast(starts.tensor, tf.int64), tf.cast(ends.tensor, tf.int64)
    masked = set(range(rank))
    for i, (axis, step) in enumerate(zip(axes, steps, strict=False)):
        place = x.placed(axis)
        total = tf.shape(x.stored, out_type=tf.int64)[place]
        begin[place], end[place] = _bounds(from_[i], to[i], step, total)
        stride[place] = step
        masked.discard(place)
    mask = sum(1 << place for place in masked)
    strides = tf.constant(stride, tf.int64)
    cut = tf.strided_slice(x.stored, tf.stack(begin), tf.stack(end), strides, begin_mask=mask, end_mask=mask)
    return node.value(cut, x.order)


def _bounds(first: Tensor, last: Tensor, step: Any, total: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that `strided_slice` understands as ONNX does."""
    zero = tf.zeros_like(total)
    first = tf.where(first < 0, first + total, first)
    last = tf.where(last < 0, last + total, last)
    down = tf.convert_to_tensor(step) < 0
    first = tf.where(down, tf.clip_by_value(first, zero, total - 1), tf.clip_by_value(first, zero, total))
    last = tf.where(down, tf.clip_by_value(last, zero - 1, total), tf.clip_by_value(last, zero, total))
    # -1 would count from the end: one before the first entry is written as -(total + 1)
    return first, tf.where(last < 0, -total - 1, last)


def _slice_unknown(x: Value, starts: Value, ends: Value, axes: Value | None, steps: Value | None, node: Node) -> Value:
    """Axes or steps that only the run knows."""
    rank = x.rank or 0
    total = tf.shape(x.tensor, out_type=tf.int64)
    count = tf.shape(starts.tensor)[0]
    where = tf.range(rank, dtype=tf.int64) if axes is None else tf.cast(axes.tensor, tf.int64) % rank
    stride = tf.ones([count], tf.int64) if steps is None else tf.cast(steps.tensor, tf.int64)
    own = tf.gather(total, where)
    first, last = _bounds(tf.cast(starts.tensor, tf.int64), tf.cast(ends.tensor, tf.int64), stride, own)
    at = where[:, None]
    begin = tf.tensor_scatter_nd_update(tf.zeros([rank], tf.int64), at, first)
    end = tf.tensor_scatter_nd_update(total, at, last)
    strides = tf.tensor_scatter_nd_update(tf.ones([rank], tf.int64), at, stride)
    return node.value(told(tf.strided_slice(x.tensor, begin, end, strides), [None] * rank))


@OPS.op("Slice")
def slice_attribute(
    x: Value, *, starts: list[int], ends: list[int], axes: list[int] | None = None, node: Node
) -> Value:
    """With the bounds as attributes."""
    first, last = (node.value(np.array(each)) for each in (starts, ends))
    return slice_(x, first, last, None if axes is None else node.value(np.array(axes)), node=node)


@OPS.op("Expand", since=8)
def expand(x: Value, shape: Value, *, node: Node) -> Tensor:
    """Broadcast in both directions: a size of 1 in `shape` keeps the tensor's own."""
    target = None if shape.sizes is None else list(shape.sizes)
    if target is None:
        return tf.broadcast_to(
            x.tensor, tf.broadcast_dynamic_shape(tf.shape(x.tensor), tf.cast(shape.tensor, tf.int32))
        )
    if all(each == 1 for each in target) and len(target) <= (x.rank or 0):
        return x
    rank = max(len(target), x.rank or 0)
    wide, own = [1] * (rank - len(target)) + target, x.widened(rank)
    have = own.shape or ()
    if None not in wide and None not in have:
        return tf.broadcast_to(x.tensor, np.broadcast_shapes(tuple(wide), have))  # type: ignore[arg-type]  # no None
    joined = tf.broadcast_dynamic_shape(tf.shape(x.tensor), tf.cast(shape.tensor, tf.int32))
    made = tf.broadcast_to(x.tensor, joined)
    made.set_shape([_joint(a, b) for a, b in zip(wide, have, strict=True)])
    return made


def _joint(a: int | None, b: int | None) -> int | None:
    if a == 1:
        return b
    if b == 1:
        return a
    return b if a is None else a


@OPS.op("Tile", since=6)
def tile(x: Value, repeats: Value) -> Tensor:
    """Each axis, so many times."""
    known = static(repeats)
    return tf.tile(x.tensor, repeats.tensor if known is None else known)


@OPS.op("ConstantOfShape", since=9)
def constant_of_shape(shape: Value, *, value: np.ndarray | None = None) -> Tensor:
    """One value, everywhere."""
    content = np.zeros(1, np.float32) if value is None else value
    made = tf.fill(tf.cast(shape.tensor, tf.int32), tf.constant(content.ravel()[0]))
    if shape.sizes is not None:
        made.set_shape(list(shape.sizes))
    return made


@OPS.op("Constant")
def constant(**attributes: Any) -> np.ndarray:
    """A tensor, or one of the short forms."""
    ((name, content),) = attributes.items()
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if name == "sparse_value":
        from polyexport.lowering.graph import dense

        return dense(content)
    return np.asarray(content, kinds.get(name))


@OPS.op("Range", since=11)
def range_(start: Value, limit: Value, delta: Value) -> Tensor:
    """As Python's, for floats too."""
    return tf.range(*(tf.reshape(each.tensor, []) for each in (start, limit, delta)))


@OPS.op("EyeLike", since=9)
def eye_like(x: Value, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on one diagonal."""
    rows, columns = sizes_of(x)
    on = tf.range(columns)[None, :] - tf.range(rows)[:, None] == k
    return tf.cast(on, tf.as_dtype(x.dtype) if dtype is None else dtype_of(dtype))


@OPS.op("Trilu", since=14)
def triangle(x: Value, k: Value | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of the last two axes, the rest zero."""
    rows, columns = sizes_of(x)[-2:]
    shift = 0 if k is None else tf.cast(tf.reshape(k.tensor, []), tf.int32)
    beyond = tf.range(columns)[None, :] - tf.range(rows)[:, None] - shift
    return tf.where(beyond >= 0 if upper else beyond <= 0, x.tensor, tf.zeros([], tf.as_dtype(x.dtype)))


@OPS.op("Pad", since=11)
def pad(
    x: Value, pads: Value, value: Value | None = None, axes: Value | None = None, *, mode: str = "constant", node: Node
) -> Any:
    """Negative amounts cut; `edge` and `wrap` by index, since TensorFlow has no such modes."""
    rank = x.rank or 0
    chosen = list(range(rank)) if axes is None else static(axes)
    amounts = static(pads)
    if chosen is None:
        raise node.unsupported("its axes are not known before the run")
    fill = None if value is None else tf.reshape(value.tensor, [])
    if amounts is None:
        return _pad_dynamic(x, pads.tensor, [axis % rank for axis in chosen], fill, mode)
    sides = [(0, 0)] * rank
    for i, axis in enumerate(chosen):
        sides[x.placed(axis)] = (amounts[i], amounts[i + len(chosen)])
    return node.value(padded(x.stored, sides, fill, mode), x.order)


@OPS.op("Pad")
def pad_attribute(x: Value, *, pads: list[int], value: float = 0.0, mode: str = "constant", node: Node) -> Any:
    """With the amounts as an attribute."""
    return pad(x, node.value(np.array(pads)), node.value(np.array(value, x.dtype)), mode=mode, node=node)


def padded(tensor: Tensor, sides: list[tuple[int, int]], fill: Tensor | None, mode: str = "constant") -> Tensor:
    """Padded, and cut where an amount is negative, by what is known before the run."""
    cuts = tuple(slice(max(-before, 0), min(after, 0) or None) for before, after in sides)
    if any(cut != slice(0, None) for cut in cuts):
        tensor = tensor[cuts]
    amounts = [(max(before, 0), max(after, 0)) for before, after in sides]
    if not any(map(sum, amounts)):
        return tensor
    if mode == "constant":
        return tf.pad(tensor, amounts, constant_values=0 if fill is None else fill)
    for axis, (before, after) in enumerate(amounts):
        if before or after:
            tensor = tf.gather(tensor, source_of(tf.shape(tensor)[axis], before, after, mode), axis=axis)
    return tensor


def source_of(size: Any, before: Any, after: Any, mode: str) -> Tensor:
    """Which entry of an axis each entry of the padded axis repeats."""
    place = tf.range(-before, size + after)
    if mode == "edge":
        return tf.clip_by_value(place, 0, size - 1)
    if mode == "wrap":
        return tf.math.floormod(place, size)
    turn = tf.maximum(2 * (size - 1), 1)
    place = tf.math.floormod(place, turn)
    return tf.minimum(place, turn - place)


def _pad_dynamic(x: Value, pads: Tensor, axes: list[int], fill: Tensor | None, mode: str) -> Tensor:
    amounts = tf.cast(tf.reshape(pads, [2, len(axes)]), tf.int32)
    tensor = x.tensor
    for i, axis in enumerate(axes):
        size, before, after = tf.shape(tensor)[axis], amounts[0, i], amounts[1, i]
        if mode != "constant":
            tensor = tf.gather(tensor, source_of(size, before, after, mode), axis=axis)
            continue
        place = tf.range(-before, size + after)
        inside = tf.logical_and(place >= 0, place < size)
        taken = tf.gather(tensor, tf.clip_by_value(place, 0, tf.maximum(size - 1, 0)), axis=axis)
        kept = tf.reshape(inside, [-1] + [1] * ((x.rank or 1) - axis - 1))
        tensor = tf.where(kept, taken, tf.zeros([], taken.dtype) if fill is None else fill)
    return tensor


@OPS.op("DepthToSpace")
def depth_to_space(x: Value, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels into blocks of pixels: depth first (DCR), or column and row first (CRD)."""
    batch, depth, height, width = sizes_of(x)
    b = blocksize
    parts = [batch, b, b, depth // (b * b)] if mode == "DCR" else [batch, depth // (b * b), b, b]
    moved = [0, 3, 4, 1, 5, 2] if mode == "DCR" else [0, 1, 4, 2, 5, 3]
    blocks = tf.transpose(tf.reshape(x.tensor, tf.stack([*parts, height, width])), moved)
    return _shaped(blocks, [batch, depth // (b * b), height * b, width * b])


@OPS.op("SpaceToDepth")
def space_to_depth(x: Value, *, blocksize: int) -> Tensor:
    """Blocks of pixels into channels."""
    batch, depth, height, width = sizes_of(x)
    b = blocksize
    blocks = tf.reshape(x.tensor, tf.stack([batch, depth, height // b, b, width // b, b]))
    return _shaped(tf.transpose(blocks, [0, 3, 5, 1, 2, 4]), [batch, depth * b * b, height // b, width // b])


def _shaped(tensor: Tensor, sizes: list[Any]) -> Tensor:
    made = tf.reshape(tensor, tf.stack(sizes))
    made.set_shape([size if isinstance(size, int) else None for size in sizes])
    return made
