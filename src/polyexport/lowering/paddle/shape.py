"""Operators that handle sizes unknown before the run in Paddle's own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from polyexport.lowering.backend import Backend, Size, Tensor, is_known
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.shape import entries
from polyexport.lowering.paddle.backend import OPS
from polyexport.lowering.paddle.primitives import FAR, cast, line, sizes_of, transpose as transposed
from polyexport.lowering.paddle.weights import paddle_dtype
from polyexport.lowering.table import Ints
from polyexport.lowering.value import Value, static


@OPS.op("Transpose", narrow=True)
def transpose(x: Value, *, perm: list[int] | None = None) -> Any:
    """All axes reversed, if none is named."""
    order = list(range(x.rank or 0))[::-1] if perm is None else perm
    if x.known is not None:
        return x.permuted(order)
    return transposed(x.tensor, order)


@OPS.op("Shape", narrow=True)
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Any:
    """Known if the sizes are static; then no tensor is read."""
    wanted = (x.shape or ())[start:end]
    if None not in wanted:
        return np.array(wanted, np.int64)
    return cast(paddle.shape(x.tensor), "int64")[slice(start, end)]


_SLICED_RANK = 6  # the maximum rank that Paddle can slice


@OPS.op("Slice")
def slice_(
    x: Value, starts: Value, ends: Value, axes: Ints | None = None, steps: Value | None = None, *, node: Node
) -> Tensor:
    """Bounds are clamped to the tensor, negative ones count from its end."""
    begin, end, stride = static(starts), static(ends), None if steps is None else static(steps)
    count = (starts.shape or (None,))[0]
    if count is None:
        raise node.unsupported("the number of axes that it slices is not known before the run")
    chosen = [axis % (x.rank or 1) for axis in (range(count) if axes is None else axes)]
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
    """The bounds in Paddle's form, in which -1 is the end of the axis in either direction."""
    if size is None:
        return max(min(first, FAR), -FAR), max(min(last, FAR), -FAR), step
    start, stop, step = slice(first, last, step).indices(size)
    return start, -FAR if stop < 0 else stop, step


def _slice_dynamic(x: Value, starts: Value, ends: Value, steps: Value | None, axes: list[int]) -> Tensor:
    """By bounds or steps that only the run knows: the entries are counted, and looked up."""
    first, last = (cast(each.tensor, "int64") for each in (starts, ends))
    stride = paddle.ones_like(first) if steps is None else cast(steps.tensor, "int64")
    tensor, sizes = x.tensor, sizes_of(x)
    for i, axis in enumerate(axes):
        total = x.backend.scalar(sizes[axis], np.int64)
        from_, to, step = first[i], last[i], stride[i]
        forward = paddle.cast(step > 0, "int64")  # backwards, the bounds lie one lower
        from_ = _clipped(from_ + total * paddle.cast(from_ < 0, "int64"), forward - 1, total - 1 + forward)
        to = _clipped(to + total * paddle.cast(to < 0, "int64"), forward - 1, total - 1 + forward)
        away = paddle.cast(step / paddle.abs(step), "int64")
        count = paddle.maximum((to - from_ + step - away) // step, paddle.zeros_like(total))
        tensor = paddle.index_select(tensor, from_ + line(0, count) * step, axis)
    return tensor


def _clipped(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return paddle.minimum(paddle.maximum(position, low), high)


@OPS.op("Range")
def range_(start: Value, limit: Value, delta: Value) -> Tensor:
    """As Python's, for floats too."""
    first, last, step = (paddle.reshape(each.tensor, []) for each in (start, limit, delta))
    return paddle.arange(first, last, step, paddle_dtype(start.dtype))


@OPS.op("Expand")
def expand(ops: Backend, x: Value, shape: Value, *, node: Node) -> Any:
    """Broadcast in both directions: a size of 1 in `shape` keeps the tensor's own."""
    target, own = entries(ops, shape, node), ops.sizes(x)
    if len(target) <= len(own) and all(is_known(size) and size == 1 for size in target):
        return x
    rank = max(len(target), len(own))
    pairs = zip([1] * (rank - len(target)) + target, [1] * (rank - len(own)) + own, strict=True)
    return ops.broadcast(x.tensor, [_joint(ops, *pair) for pair in pairs])


def _joint(ops: Backend, a: Size, b: Size) -> Size:
    """What two sizes are broadcast to."""
    if is_known(a):
        return b if a == 1 else a
    if is_known(b):
        return a if b == 1 else b
    return ops.where(a == 1, b, a)


@OPS.op("ConstantOfShape", since=9, narrow=True)
def constant_of_shape(ops: Backend, shape: Value, *, value: np.ndarray | None = None, node: Node) -> Tensor:
    """One value, everywhere."""
    content = np.zeros(1, np.float32) if value is None else value
    return ops.full(entries(ops, shape, node), content.ravel()[0], content.dtype)
