"""Operators that reshape, reorder, pad, concatenate and fill.

Shape, Slice, Range, Transpose, Expand and ConstantOfShape are in each framework's folder: TensorFlow slices by bounds
that only the run knows, and takes a shape as one tensor, and Paddle does not; TensorFlow's tensors may be stored in
another order, and Paddle's never are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Size, Tensor, is_known, product
from polyexport.lowering.graph import Node
from polyexport.lowering.protobuf import dense
from polyexport.lowering.table import SHARED, Ints
from polyexport.lowering.value import Value, align, static


def entries(ops: Backend, shape: Value, node: Node) -> list[Size]:
    """The elements of a shape: an `int` if known, else a scalar tensor.

    Raises:
        UnsupportedOp: not even the number of elements is known.
    """
    if shape.sizes is not None and None not in shape.sizes:
        return [int(entry) for entry in shape.sizes.ravel()]
    count = (shape.shape or (None,))[0]
    if count is None:
        raise node.unsupported("the rank of its result is not known before the run")
    content = ops.cast(shape.tensor, ops.index)
    sizes = [None] * count if shape.sizes is None else shape.sizes
    return [content[i] if size is None else int(size) for i, size in enumerate(sizes)]


def entry(ops: Backend, number: Value) -> Size:
    """The only element of an input, of whatever rank: an `int` if known, else a scalar tensor."""
    known = static(number)
    return known[0] if known else ops.cast(ops.reshape(number.tensor, []), ops.index)


@SHARED.op("Size", narrow=True)
def size(ops: Backend, x: Value) -> Any:
    """The number of entries."""
    count = product(ops.sizes(x))
    return np.array(count, np.int64) if is_known(count) else ops.cast(count, np.dtype(np.int64))


@SHARED.op("Flatten", narrow=True)
def flatten(ops: Backend, x: Value, *, axis: int = 1) -> Tensor:
    """Two axes: all before `axis`, and the rest."""
    own, axis = x.shape or (), axis + (x.rank or 0) if axis < 0 else axis
    if None not in own[axis:] and 0 not in own:
        return ops.reshape(x.tensor, [-1, product(own[axis:])])
    if None not in own[:axis] and 0 not in own:
        return ops.reshape(x.tensor, [product(own[:axis]), -1])
    sizes = ops.sizes(x)
    return ops.reshape(x.tensor, [product(sizes[:axis]), product(sizes[axis:])])


@SHARED.op("Reshape", since=5, narrow=True)
def reshape(ops: Backend, x: Value, shape: Value, *, allowzero: int = 0, node: Node) -> Tensor:
    """0 keeps a size unless `allowzero`, -1 is the remaining size; any size may be unknown before the run."""
    sizes = [] if shape.sizes is None else [size if size is None else int(size) for size in shape.sizes.ravel()]
    if sizes.count(None) == 1 and not {0, -1} & {*sizes}:
        return ops.reshape(x.tensor, [-1 if size is None else size for size in sizes])
    target = entries(ops, shape, node)
    if allowzero:
        return ops.reshape(x.tensor, target)
    own = ops.sizes(x) if shape.sizes is None or 0 in shape.sizes else []
    target = [_kept(ops, size, own[i], shape) if i < len(own) else size for i, size in enumerate(target)]
    if 0 in (x.shape or ()):
        target = [0 if is_known(size) and size == -1 else size for size in target]
    return ops.reshape(x.tensor, target)


def _kept(ops: Backend, size: Size, own: Size, shape: Value) -> Size:
    """A size that Reshape asks for, or the tensor's own where that is 0; of a computed shape it never is."""
    if is_known(size):
        return own if size == 0 else size
    return size if shape.sizes is not None else ops.where(size == 0, ops.scalar(own, ops.index), size)


@SHARED.op("Squeeze", narrow=True)
def squeeze(ops: Backend, x: Value, axes: Ints | None = None, *, node: Node) -> Value:
    """The axes named, or all of size 1; the order of the others stays."""
    known = x.shape or ()
    if axes is None and None in known:
        raise node.unsupported("which of its axes are of size 1 is not known before the run")
    chosen = [axis for axis, each in enumerate(known) if each == 1] if axes is None else axes
    if not chosen:
        return x
    gone = sorted(axis % len(known) for axis in chosen)
    return node.value(ops.squeeze(x.stored, [x.placed(axis) for axis in gone]), x.without(gone))


@SHARED.op("Unsqueeze", narrow=True)
def unsqueeze(ops: Backend, x: Value, axes: Ints) -> Tensor:
    """New axes of size 1, counted in the result."""
    rank = (x.rank or 0) + len(axes)
    return ops.unsqueeze(x.tensor, sorted(axis % rank for axis in axes)) if axes else x


@SHARED.op("Concat", since=4, narrow=True)
def concat(ops: Backend, *parts: Value, axis: int, node: Node) -> Value:
    """In the order that costs the fewest transposes."""
    if len(parts) == 1:
        return parts[0]
    tensors, order = align(parts)
    axis = axis % (parts[0].rank or 1)
    return node.value(ops.concat(tensors, axis if order is None else order.index(axis)), order)


@SHARED.op("Split")
def split(
    ops: Backend,
    x: Value,
    sizes: Value | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    node: Node,
) -> tuple[Value, ...]:
    """Into the sizes given, or evenly with a smaller last part."""
    total, count = ops.sizes(x)[axis], num_outputs or node.outputs
    each = (total + (count - 1)) // count
    if sizes is not None:
        parts = entries(ops, sizes, node)
    elif is_known(total):
        parts = [min(each, total - i * each) for i in range(count)]
    else:
        parts = [each] * (count - 1) + [total - each * (count - 1)]
    return tuple(node.value(part, x.order) for part in ops.split(x.stored, parts, x.placed(axis)))


@SHARED.op("SplitToSequence")
def split_to_sequence(
    ops: Backend, x: Value, sizes: Ints | None = None, *, axis: int = 0, keepdims: int = 1, node: Node
) -> list[Value]:
    """Into pieces of one size, of the sizes given, or of 1."""
    total = ops.sizes(x)[axis]
    if not is_known(total):
        raise node.unsupported("how many tensors it makes is not known before the run")
    parts = [1] if sizes is None else sizes
    if sum(parts) != total:
        parts = [min(parts[0], total - start) for start in range(0, total, parts[0])]
    axis = axis % (x.rank or 1)
    found = ops.split(x.tensor, parts, axis)
    return [node.value(part if sizes is not None or keepdims else ops.squeeze(part, [axis])) for part in found]


@SHARED.op("ConcatFromSequence", narrow=True)
def concat_from_sequence(ops: Backend, sequence: list[Value], *, axis: int, new_axis: int = 0) -> Tensor:
    """Joined along an axis, a new one if asked for."""
    join = ops.stack if new_axis else ops.concat
    return join([each.tensor for each in sequence], axis % ((sequence[0].rank or 1) + new_axis))


@SHARED.op("Tile", since=6)
def tile(ops: Backend, x: Value, repeats: Value, *, node: Node) -> Tensor:
    """Each axis, so many times."""
    return ops.tile(x.tensor, entries(ops, repeats, node))


@SHARED.op("Constant", narrow=True)
def constant(**attributes: Any) -> np.ndarray:
    """A tensor, or one of the short forms."""
    ((name, content),) = attributes.items()
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return dense(content) if name == "sparse_value" else np.asarray(content, kinds.get(name))


@SHARED.op("EyeLike")
def eye_like(ops: Backend, x: Value, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on one diagonal."""
    return ops.cast(_beyond(ops, *ops.sizes(x)) == k, x.dtype if dtype is None else ops.type_of(dtype))


def _beyond(ops: Backend, rows: Size, columns: Size) -> Tensor:
    """How far each entry of a matrix lies right of the diagonal."""
    return ops.unsqueeze(ops.range(0, columns), [0]) - ops.unsqueeze(ops.range(0, rows), [1])


@SHARED.op("Trilu")
def triangle(ops: Backend, x: Value, k: Value | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of the last two axes, the rest zero."""
    beyond = _beyond(ops, *ops.sizes(x)[-2:])
    shift = 0 if k is None else entry(ops, k)
    return ops.where(beyond >= shift if upper else beyond <= shift, x.tensor, 0)


@SHARED.op("Pad", since=2)
def pad(
    ops: Backend,
    x: Value,
    pads: Value,
    value: Value | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
    node: Node,
) -> Value:
    """Negative amounts crop. Modes other than constant use gathers, since no framework supports all of them."""
    rank = x.rank or 0
    chosen, amounts = list(range(rank)) if axes is None else axes, entries(ops, pads, node)
    sides: list[tuple[Size, Size]] = [(0, 0)] * rank
    for i, axis in enumerate(chosen):
        sides[x.placed(axis)] = (amounts[i], amounts[i + len(chosen)])
    fill = node.value(np.zeros((), x.dtype)) if value is None else value
    if mode == "constant" and all(map(is_known, amounts)) and fill.known is not None:
        return node.value(ops.pad(x.stored, sides, fill.known.item()), x.order)
    made = x.stored
    for axis, (before, after) in enumerate(sides):
        if not (is_known(before) and is_known(after) and before == after == 0):
            made = padded_axis(ops, made, axis, before, after, ops.reshape(fill.tensor, []), mode)
    return node.value(made, x.order)


def padded_axis(
    ops: Backend, tensor: Tensor, axis: int, before: Size, after: Size, fill: Tensor, mode: str = "constant"
) -> Tensor:
    """Padded along one axis, and cut where an amount is negative, by the entry that each of the result repeats."""
    value = Value(ops, tensor)
    size = ops.sizes(value)[axis]
    position = ops.range(0 - before, size + after)
    made = ops.gather(tensor, _source(ops, position, size, mode), axis)
    if mode != "constant":
        return made
    inside = ops.column((position >= 0) & (position < size), axis, value.rank or 1)
    return ops.where(inside, made, fill)


def _source(ops: Backend, position: Tensor, size: Size, mode: str) -> Tensor:
    if mode == "wrap":
        return position % size
    if mode != "reflect":
        return ops.maximum(ops.minimum(position, size - 1), 0)
    turn = max(2 * (size - 1), 1) if is_known(size) else ops.maximum(2 * (size - 1), 1)
    position = position % turn
    return ops.minimum(position, turn - position)


@SHARED.op("DepthToSpace")
def depth_to_space(ops: Backend, x: Value, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels into blocks of pixels: depth first (DCR), or column and row first (CRD)."""
    batch, depth, height, width = ops.sizes(x)
    b = blocksize
    parts = [batch, b, b, depth // (b * b)] if mode == "DCR" else [batch, depth // (b * b), b, b]
    moved = [0, 3, 4, 1, 5, 2] if mode == "DCR" else [0, 1, 4, 2, 5, 3]
    blocks = ops.transpose(ops.reshape(x.tensor, [*parts, height, width]), moved)
    return ops.reshape(blocks, [batch, depth // (b * b), height * b, width * b])


@SHARED.op("SpaceToDepth")
def space_to_depth(ops: Backend, x: Value, *, blocksize: int) -> Tensor:
    """Blocks of pixels into channels."""
    batch, depth, height, width = ops.sizes(x)
    b = blocksize
    blocks = ops.reshape(x.tensor, [batch, depth, height // b, b, width // b, b])
    return ops.reshape(ops.transpose(blocks, [0, 3, 5, 1, 2, 4]), [batch, depth * b * b, height // b, width // b])
