"""Resize and Upsample by gathered and weighed entries; what TensorFlow's own operators do exactly is left to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.resizing import Arithmetic, Axis, Images, Mode, declare, known_targets
from polyexport.lowering.tensorflow.convolution import last
from polyexport.lowering.tensorflow.target import OPS, sizes_of
from polyexport.lowering.value import Tensor, Value


def where(condition: Tensor, this: Tensor, that: Any) -> Tensor:
    """The second where the first is true, else the third, a tensor or a number."""
    return tf.where(condition, this, tf.cast(that, this.dtype))


ARITHMETIC = Arithmetic(
    floor=tf.floor,
    ceil=tf.math.ceil,
    maximum=tf.maximum,
    minimum=tf.minimum,
    where=where,
    line=lambda count: tf.cast(tf.range(count), tf.float32),
    real=lambda x: tf.cast(x, tf.float32),
    whole=lambda x: tf.cast(x, tf.int32),
    total=lambda x: tf.reduce_sum(x, 1, keepdims=True),
)


def _spread(vector: Any, tensor: Tensor, place: int) -> Tensor:
    """A vector, shaped to be combined with a tensor along an axis of it."""
    return tf.reshape(vector, [-1] + [1] * (tensor.shape.rank - place - 1))


def _native(x: Value, plan: list[Axis], how: Mode, node: Node) -> Value | None:
    target = known_targets(x, plan, how)
    if target is None:
        return None
    images = x.in_order(last(4))
    whole = all(each.target % each.size == 0 for each in plan)
    if how.kind == "nearest" and whole and (how.coordinates, how.nearest) == ("asymmetric", "floor"):
        return node.value(tf.raw_ops.ResizeNearestNeighbor(images=images, size=target), last(4))
    if how.kind == "linear" and how.coordinates in ("half_pixel", "align_corners", "asymmetric"):
        flags = {
            "half_pixel_centers": how.coordinates == "half_pixel",
            "align_corners": how.coordinates == "align_corners",
        }
        return node.value(tf.raw_ops.ResizeBilinear(images=images, size=target, **flags), last(4))
    if how.kind == "linear" and how.coordinates == "pytorch_half_pixel" and min(target) > 1:
        return node.value(tf.raw_ops.ResizeBilinear(images=images, size=target, half_pixel_centers=True), last(4))
    return None


declare(
    OPS,
    Images(
        arithmetic=ARITHMETIC,
        sizes=sizes_of,
        gather=lambda tensor, indices, place: tf.gather(tensor, indices, axis=place),
        weighed=lambda tensor, weights, place: tensor * tf.cast(_spread(weights, tensor, place), tensor.dtype),
        masked=lambda tensor, chosen, place, number: where(_spread(~chosen, tensor, place), tensor, number),
        cast=lambda tensor, dtype: tf.cast(tensor, np.dtype(dtype)),
        native=_native,
    ),
)
