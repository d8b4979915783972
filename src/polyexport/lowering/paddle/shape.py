"""Operators that move, cut, join and fill, and compute with shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.graph import Node, dense
from polyexport.lowering.paddle.target import (
    OPS,
    dtype_of,
    entries_of,
    is_tensor,
    paddle_dtype,
    shaped,
    sizes_of,
    static,
    told,
    vector,
)
from polyexport.lowering.value import Tensor, Value


@OPS.op("Transpose", narrow=True)
def transpose(x: Value, *, perm: list[int] | None = None) -> Any:
    """All axes turned round, if none is named."""
    order = list(range(x.rank or 0))[::-1] if perm is None else perm
    return x.permuted(order) if x.known is not None else paddle.transpose(x.tensor, order)


@OPS.op("Shape", narrow=True)
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Any:
    """Known where the sizes are static, and then no tensor is asked for anything."""
    wanted = (x.shape or ())[start:end]
    if None not in wanted:
        return np.array(wanted, np.int64)
    return paddle.cast(paddle.shape(x.tensor), "int64")[slice(start, end)]


@OPS.op("Size", narrow=True)
def size(x: Value) -> Any:
    """The number of entries."""
    if x.shape is not None and None not in x.shape:
        return np.array(math.prod(each or 0 for each in x.shape), np.int64)
    return paddle.prod(paddle.cast(paddle.shape(x.tensor), "int64"))


@OPS.op("Reshape", since=5, narrow=True)
def reshape(x: Value, shape: Value, *, allowzero: int = 0, node: Node) -> Tensor:
    """0 keeps a size unless `allowzero`, -1 is what is left; any size may be unknown before the run."""
    target, own = entries_of(shape, node), sizes_of(x)
    if allowzero:
        return shaped(x.tensor, target)
    if any(is_tensor(each) for each in target):
        target = [_nonzero(each, own[i]) if is_tensor(each) and i < len(own) else each for i, each in enumerate(target)]
    target = [own[i] if not is_tensor(each) and each == 0 else each for i, each in enumerate(target)]
    if -1 in [each for each in target if not is_tensor(each)] and 0 in (x.shape or ()):
        rest = math.prod(each for each in target if not is_tensor(each) and each > 0)
        target = [0 if not is_tensor(each) and each == -1 and rest else each for each in target]
    return shaped(x.tensor, target)


def _nonzero(wanted: Tensor, own: Any) -> Tensor:
    """What the run's shape says, or the size that is there where it says 0."""
    return paddle.where(wanted == 0, own if is_tensor(own) else paddle.full([], own, "int64"), wanted)


@OPS.op("Flatten", narrow=True)
def flatten(x: Value, *, axis: int = 1) -> Tensor:
    """Two axes: what lies before `axis`, and the rest."""
    own, rank = sizes_of(x), x.rank or 0
    axis = axis + rank if axis < 0 else axis
    return shaped(x.tensor, [_product(own[:axis]), _product(own[axis:])])


def _product(sizes: list[Any]) -> Any:
    return math.prod(sizes[1:], start=sizes[0]) if sizes else 1


@OPS.op("Squeeze", since=13, narrow=True)
def squeeze(x: Value, axes: Value | None = None, *, node: Node) -> Tensor:
    """The axes named, or all of size 1."""
    known = x.shape or ()
    if axes is None and None in known:
        raise node.unsupported("which of its axes are of size 1 is not known before the run")
    chosen = [axis for axis, each in enumerate(known) if each == 1] if axes is None else static(axes)
    if chosen is None:
        raise node.unsupported("its axes are not known before the run")
    gone = {axis % len(known) for axis in chosen}
    if not gone:
        return x.tensor
    return shaped(x.tensor, [each for axis, each in enumerate(sizes_of(x)) if axis not in gone])


@OPS.op("Squeeze", narrow=True)
def squeeze_attribute(x: Value, *, axes: list[int] | None = None, node: Node) -> Tensor:
    """With the axes as an attribute."""
    return squeeze(x, None if axes is None else node.value(np.array(axes)), node=node)


@OPS.op("Unsqueeze", since=13, narrow=True)
def unsqueeze(x: Value, axes: Value, *, node: Node) -> Tensor:
    """New axes of size 1, counted in the result."""
    places = static(axes)
    if places is None:
        raise node.unsupported("its axes are not known before the run")
    rank = (x.rank or 0) + len(places)
    return paddle.unsqueeze(x.tensor, sorted(axis % rank for axis in places)) if places else x.tensor


@OPS.op("Unsqueeze", narrow=True)
def unsqueeze_attribute(x: Value, *, axes: list[int], node: Node) -> Tensor:
    """With the axes as an attribute."""
    return unsqueeze(x, node.value(np.array(axes)), node=node)


@OPS.op("Concat", since=4, narrow=True)
def concat(*parts: Value, axis: int) -> Any:
    """One after another."""
    return parts[0] if len(parts) == 1 else paddle.concat([part.tensor for part in parts], axis)


@OPS.op("Split", since=13)
def split_(x: Value, sizes: Value | None = None, *, axis: int = 0, num_outputs: int | None = None, node: Node) -> Any:
    """Into the sizes given, or evenly with a smaller last part."""
    axis = axis % (x.rank or 1)
    total, count = sizes_of(x)[axis], num_outputs or node.outputs
    if sizes is not None:
        return tuple(pieces(x.tensor, entries_of(sizes, node), axis))
    each = -(-total // count) if not is_tensor(total) else (total + (count - 1)) // count
    return tuple(pieces(x.tensor, [each] * (count - 1) + [total - each * (count - 1)], axis))


def pieces(tensor: Tensor, sizes: list[Any], axis: int) -> list[Tensor]:
    """One after another along an axis, of sizes of which some may be scalar tensors."""
    found, start = [], 0
    for each in sizes:
        part = paddle.slice(tensor, [axis], [start], [start + each])
        known = [None if place == axis and is_tensor(each) else size for place, size in enumerate(part.shape)]
        known[axis] = None if is_tensor(each) else each
        found.append(told(part, [None if size is None or size < 0 else size for size in known]))
        start = start + each
    return found


@OPS.op("Split")
def split_attribute(x: Value, *, axis: int = 0, split: list[int] | None = None, node: Node) -> Any:
    """With the sizes as an attribute."""
    return split_(x, None if split is None else node.value(np.array(split)), axis=axis, node=node)


_FAR = 2**31 - 1  # beyond any axis
_SLICED_RANK = 6  # Paddle slices no tensor of more axes


@OPS.op("Slice", since=10)
def slice_(
    x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None, *, node: Node
) -> Tensor:
    """Bounds beyond the tensor are cut to it, negative ones count from its end."""
    begin, end, stride = static(starts), static(ends), None if steps is None else static(steps)
    count = (starts.shape or (None,))[0]
    chosen = list(range(count or 0)) if axes is None else static(axes)
    if chosen is None or count is None:
        raise node.unsupported("its axes are not known before the run")
    chosen = [axis % (x.rank or 1) for axis in chosen]
    too_many = (x.rank or 0) > _SLICED_RANK
    if begin is None or end is None or too_many or (stride is None and steps is not None):
        return _slice_dynamic(x, starts, ends, steps, chosen)
    sizes = x.shape or ()
    bounds = [
        _bounds(first, last, step, sizes[axis])
        for axis, first, last, step in zip(chosen, begin, end, stride or [1] * count, strict=False)
    ]
    first_, last_, step_ = ([bound[part] for bound in bounds] for part in range(3))
    if all(step == 1 for step in step_):
        return paddle.slice(x.tensor, chosen, first_, last_)
    return paddle.strided_slice(x.tensor, chosen, first_, last_, step_)


def _bounds(first: int, last: int, step: int, size: int | None) -> tuple[int, int, int]:
    """As Paddle understands them, which takes -1 for the end of the axis in either direction."""
    if size is None:
        return max(min(first, _FAR), -_FAR), max(min(last, _FAR), -_FAR), step
    start, stop, step = slice(first, last, step).indices(size)
    return start, -_FAR if stop < 0 else stop, step


def _slice_dynamic(x: Value, starts: Value, ends: Value, steps: Value | None, axes: list[int]) -> Tensor:
    """By bounds or steps that only the run knows: the entries are counted, and looked up."""
    first, last = (paddle.cast(each.tensor, "int64") for each in (starts, ends))
    stride = paddle.ones_like(first) if steps is None else paddle.cast(steps.tensor, "int64")
    tensor, sizes = x.tensor, sizes_of(x)
    for i, axis in enumerate(axes):
        total = sizes[axis] if is_tensor(sizes[axis]) else paddle.full([], sizes[axis], "int64")
        from_, to, step = first[i], last[i], stride[i]
        forward = paddle.cast(step > 0, "int64")  # backwards, the bounds lie one lower
        from_ = _clipped(from_ + total * paddle.cast(from_ < 0, "int64"), forward - 1, total - 1 + forward)
        to = _clipped(to + total * paddle.cast(to < 0, "int64"), forward - 1, total - 1 + forward)
        away = paddle.cast(step / paddle.abs(step), "int64")
        count = paddle.maximum((to - from_ + step - away) // step, paddle.zeros_like(total))
        tensor = paddle.index_select(tensor, from_ + paddle.arange(0, count, 1, "int64") * step, axis)
    return tensor


def _clipped(place: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return paddle.minimum(paddle.maximum(place, low), high)


@OPS.op("Slice")
def slice_attribute(
    x: Value, *, starts: list[int], ends: list[int], axes: list[int] | None = None, node: Node
) -> Tensor:
    """With the bounds as attributes."""
    first, last = (node.value(np.array(each)) for each in (starts, ends))
    return slice_(x, first, last, None if axes is None else node.value(np.array(axes)), node=node)


@OPS.op("Expand", since=8)
def expand(x: Value, shape: Value, *, node: Node) -> Any:
    """Broadcast in both directions: a size of 1 in `shape` keeps the tensor's own."""
    target, own = entries_of(shape, node), sizes_of(x)
    rank = max(len(target), len(own))
    target, own = [1] * (rank - len(target)) + target, [1] * (rank - len(own)) + own
    joined = [_joint(a, b) for a, b in zip(target, own, strict=True)]
    wide = x.widened(rank).tensor
    return paddle.expand(wide, joined) if rank else wide


def _joint(a: Any, b: Any) -> Any:
    if not is_tensor(a):
        return b if a == 1 else a
    if not is_tensor(b):
        return a if b == 1 else b
    return paddle.where(a == 1, b, a)


@OPS.op("Tile", since=6)
def tile(x: Value, repeats: Value, *, node: Node) -> Tensor:
    """Each axis, so many times."""
    return paddle.tile(x.tensor, entries_of(repeats, node))


@OPS.op("ConstantOfShape", since=9, narrow=True)
def constant_of_shape(shape: Value, *, value: np.ndarray | None = None, node: Node) -> Tensor:
    """One value, everywhere."""
    content = np.zeros(1, np.float32) if value is None else value
    sizes = entries_of(shape, node)
    fill = node.value(content.reshape(())).tensor
    return paddle.expand(fill, sizes) if sizes else fill


@OPS.op("Constant", narrow=True)
def constant(**attributes: Any) -> np.ndarray:
    """A tensor, or one of the short forms."""
    ((name, content),) = attributes.items()
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return dense(content) if name == "sparse_value" else np.asarray(content, kinds.get(name))


@OPS.op("Range", since=11)
def range_(start: Value, limit: Value, delta: Value) -> Tensor:
    """As Python's, for floats too."""
    first, last, step = (paddle.reshape(each.tensor, []) for each in (start, limit, delta))
    return paddle.arange(first, last, step, paddle_dtype(start.dtype))


@OPS.op("EyeLike", since=9)
def eye_like(x: Value, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on one diagonal."""
    rows, columns = sizes_of(x)
    return paddle.cast(_beyond(rows, columns) == k, paddle_dtype(x.dtype if dtype is None else dtype_of(dtype)))


def _beyond(rows: Any, columns: Any) -> Tensor:
    """How far each entry of a matrix lies right of the diagonal."""
    down, right = (paddle.arange(0, each, 1, "int64") for each in (rows, columns))
    return paddle.unsqueeze(right, 0) - paddle.unsqueeze(down, 1)


@OPS.op("Trilu", since=14)
def triangle(x: Value, k: Value | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of the last two axes, the rest zero."""
    beyond = _beyond(*sizes_of(x)[-2:])
    shift = 0 if k is None else paddle.reshape(k.tensor, [])
    kept = beyond >= shift if upper else beyond <= shift
    return paddle.where(kept, x.tensor, paddle.zeros_like(x.tensor))


@OPS.op("Pad", since=11)
def pad(
    x: Value, pads: Value, value: Value | None = None, axes: Value | None = None, *, mode: str = "constant", node: Node
) -> Any:
    """Negative amounts cut."""
    rank = x.rank or 0
    chosen = list(range(rank)) if axes is None else static(axes)
    if chosen is None:
        raise node.unsupported("its axes are not known before the run")
    amounts = entries_of(pads, node)
    sides: list[tuple[Any, Any]] = [(0, 0)] * rank
    for i, axis in enumerate(chosen):
        sides[axis] = (amounts[i], amounts[i + len(chosen)])
    fill = node.value(np.zeros((), x.dtype)) if value is None else value
    if mode != "constant" or any(map(is_tensor, amounts)) or fill.known is None or not np.isfinite(fill.known).all():
        return _looked_up(x.tensor, sides, paddle.reshape(fill.tensor, []), mode)
    return padded(x.tensor, sides, fill.known.item())


@OPS.op("Pad")
def pad_attribute(x: Value, *, pads: list[int], value: float = 0.0, mode: str = "constant", node: Node) -> Any:
    """With the amounts as an attribute."""
    return pad(x, node.value(np.array(pads)), node.value(np.array(value, x.dtype)), mode=mode, node=node)


def padded(tensor: Tensor, sides: list[tuple[int, int]], fill: float) -> Tensor:
    """Padded, and cut where an amount is negative, by what is known before the run and is finite."""
    if tensor.dtype == paddle.bool:
        return paddle.cast(padded(paddle.cast(tensor, "int32"), sides, int(fill)), "bool")
    cuts = [(axis, max(-before, 0), min(after, 0) or _FAR) for axis, (before, after) in enumerate(sides)]
    cuts = [cut for cut in cuts if cut[1:] != (0, _FAR)]
    if cuts:
        tensor = paddle.slice(tensor, *(list(part) for part in zip(*cuts, strict=True)))
    amounts = [(max(before, 0), max(after, 0)) for before, after in sides]
    return enlarged(tensor, amounts, fill) if any(map(any, amounts)) else tensor


def enlarged(tensor: Tensor, sides: list[tuple[int, int]], fill: float) -> Tensor:
    """Padded, each axis before and after by no less than nothing.

    The inference runtime has two kernels in oneDNN: one for the last three of five axes, and one for all axes, which
    takes the amounts in another order and writes beside the memory of its result (Paddle 3.2.2).
    """
    missing, last = 5 - len(sides), sides[-3:]
    if missing < 0 or any(map(any, sides[:-3])):
        flat = [each for side in sides for each in side]
        dtype, other = tensor.dtype, "float64" if tensor.dtype == paddle.float32 else tensor.dtype  # not for oneDNN
        return paddle.cast(F.pad(paddle.cast(tensor, other), flat, value=fill, pad_from_left_axis=True), dtype)
    flat = [each for side in [*reversed(last), *[(0, 0)] * (3 - len(last))] for each in side]
    wide = paddle.unsqueeze(tensor, list(range(missing))) if missing else tensor
    made = F.pad(wide, flat, value=fill, data_format="NCDHW")
    return paddle.squeeze(made, list(range(missing))) if missing else made


def source_of(size: Any, before: Any, after: Any, mode: str) -> Tensor:
    """Which entry of an axis each entry of the padded axis repeats."""
    place = paddle.arange(0 - before, size + after, 1, "int64")
    if mode == "wrap":
        return paddle.mod(place, vector([size]))
    if mode != "reflect":
        return _clipped(place, vector([0]), vector([size - 1]))
    turn = paddle.maximum(2 * (vector([size]) - 1), vector([1]))
    place = paddle.mod(place, turn)
    return paddle.minimum(place, turn - place)


def _looked_up(tensor: Tensor, sides: list[tuple[Any, Any]], fill: Tensor, mode: str) -> Tensor:
    """Each entry of the padded tensor by its place in the other; Paddle has such modes for few ranks only."""
    rank = len(sides)
    for axis, (before, after) in enumerate(sides):
        if not is_tensor(before) and not is_tensor(after) and not before and not after:
            continue
        size = tensor.shape[axis] if tensor.shape[axis] >= 0 else paddle.shape(tensor)[axis]
        tensor = paddle.index_select(tensor, source_of(size, before, after, mode), axis)
        if mode == "constant":
            place = paddle.reshape(paddle.arange(0 - before, size + after, 1, "int64"), [-1] + [1] * (rank - axis - 1))
            tensor = paddle.where(paddle.logical_and(place >= 0, place < size), tensor, fill)
    return tensor


@OPS.op("DepthToSpace")
def depth_to_space(x: Value, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels into blocks of pixels: depth first (DCR), or column and row first (CRD)."""
    batch, depth, height, width = sizes_of(x)
    b = blocksize
    parts = [batch, b, b, depth // (b * b)] if mode == "DCR" else [batch, depth // (b * b), b, b]
    moved = [0, 3, 4, 1, 5, 2] if mode == "DCR" else [0, 1, 4, 2, 5, 3]
    blocks = paddle.transpose(shaped(x.tensor, [*parts, height, width]), moved)
    return shaped(blocks, [batch, depth // (b * b), height * b, width * b])


@OPS.op("SpaceToDepth")
def space_to_depth(x: Value, *, blocksize: int) -> Tensor:
    """Blocks of pixels into channels."""
    batch, depth, height, width = sizes_of(x)
    b = blocksize
    blocks = shaped(x.tensor, [batch, depth, height // b, b, width // b, b])
    return shaped(paddle.transpose(blocks, [0, 3, 5, 1, 2, 4]), [batch, depth * b * b, height // b, width // b])


@OPS.op("ReverseSequence", since=10)
def reverse_sequence(x: Value, lengths: Value, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first entries of each sequence, the rest stays."""
    sizes, rank = sizes_of(x), x.rank or 2
    place = _line(paddle.arange(0, sizes[time_axis], 1, "int64"), time_axis, rank)
    length = _line(paddle.cast(lengths.tensor, "int64"), batch_axis, rank)
    source = paddle.where(place < length, length - 1 - place, place)
    return paddle.take_along_axis(x.tensor, source + paddle.zeros_like(x.tensor, "int64"), time_axis, broadcast=False)


def _line(tensor: Tensor, axis: int, rank: int) -> Tensor:
    return paddle.reshape(tensor, [1] * axis + [-1] + [1] * (rank - axis - 1))
