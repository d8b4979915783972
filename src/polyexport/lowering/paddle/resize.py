"""Resize and Upsample by gathered and weighed entries; what Paddle's own operator does exactly is left to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.target import OPS, is_tensor, numpy_dtype, paddle_dtype, sizes_of
from polyexport.lowering.resizing import Arithmetic, Axis, Images, Mode, declare, known_targets
from polyexport.lowering.value import Tensor, Value


def real(number: Any) -> Tensor:
    """In float32."""
    return paddle.cast(number, "float32") if is_tensor(number) else paddle.full([], float(number), "float32")


def where(condition: Tensor, this: Tensor, that: Any) -> Tensor:
    """The second where the first is true, else the third, a tensor or a number."""
    other = that if is_tensor(that) else paddle.full([], that, this.dtype)
    return paddle.where(condition, this, other)


ARITHMETIC = Arithmetic(
    floor=paddle.floor,
    ceil=paddle.ceil,
    maximum=lambda x, y: paddle.maximum(x, real(y)),
    minimum=lambda x, y: paddle.minimum(x, real(y)),
    where=where,
    line=lambda count: paddle.cast(paddle.arange(0, count, 1, dtype="int64"), "float32"),
    real=real,
    whole=lambda x: paddle.cast(x, "int64"),
    total=lambda x: paddle.sum(x, 1, keepdim=True),
)


def _spread(vector: Any, tensor: Tensor, place: int, dtype: np.dtype[Any]) -> Tensor:
    """A vector, shaped to be combined with a tensor along an axis of it."""
    is_known = isinstance(vector, np.ndarray)
    given = _tensor(vector.astype(dtype)) if is_known else paddle.cast(vector, paddle_dtype(dtype))
    return paddle.reshape(given, [-1] + [1] * (len(tensor.shape) - place - 1))


def _tensor(content: Any) -> Tensor:
    """A numpy array as a constant; a tensor as it is."""
    if not isinstance(content, np.ndarray):
        return content
    array = np.ascontiguousarray(content)
    return paddle.to_tensor(array) if paddle.in_dynamic_mode() else paddle.assign(array)


def _gather(tensor: Tensor, indices: Any, place: int) -> Tensor:
    return paddle.gather(tensor, _tensor(indices), axis=place)


def _weighed(tensor: Tensor, weights: Any, place: int) -> Tensor:
    return tensor * _spread(weights, tensor, place, numpy_dtype(tensor.dtype))


def _masked(tensor: Tensor, chosen: Any, place: int, number: float) -> Tensor:
    return where(paddle.logical_not(_spread(chosen, tensor, place, np.dtype(bool))), tensor, number)


def _native(x: Value, plan: list[Axis], how: Mode, node: Node) -> Value | None:
    target = known_targets(x, plan, how)
    if target is None:
        return None
    whole = all(each.target % each.size == 0 for each in plan)
    if how.kind == "nearest" and whole and (how.coordinates, how.nearest) == ("asymmetric", "floor"):
        return node.value(F.interpolate(x.tensor, target, mode="nearest"))
    if how.kind == "linear" and how.coordinates == "align_corners":
        return node.value(F.interpolate(x.tensor, target, mode="bilinear", align_corners=True))
    halves = how.coordinates == "half_pixel" or (how.coordinates == "pytorch_half_pixel" and min(target) > 1)
    if how.kind == "linear" and (halves or how.coordinates == "asymmetric"):
        mode = 0 if halves else 1
        return node.value(F.interpolate(x.tensor, target, mode="bilinear", align_corners=False, align_mode=mode))
    return None


declare(
    OPS,
    Images(
        arithmetic=ARITHMETIC,
        sizes=sizes_of,
        gather=_gather,
        weighed=_weighed,
        masked=_masked,
        cast=lambda tensor, dtype: paddle.cast(tensor, paddle_dtype(dtype)),
        native=_native,
    ),
)
