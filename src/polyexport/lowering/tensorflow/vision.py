"""Operators of detection, and DeformConv.

TensorFlow suppresses boxes class by class by its own operator, and has none for RoiAlign and DeformConv; Paddle has one
for each of those two and none for boxes, so that the two files have little in common but the signatures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.vision import corners, sampled
from polyexport.lowering.tensorflow.backend import OPS
from polyexport.lowering.tensorflow.primitives import last, sizes_of
from polyexport.lowering.value import Value


@OPS.op("NonMaxSuppression", since=10)
def non_max_suppression(
    boxes: Value,
    scores: Value,
    most: Value | None = None,
    iou: Value | None = None,
    score: Value | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Rows of (batch, class, box); a box is suppressed if it overlaps a better one of its class by more than `iou`."""
    count = tf.cast(tf.shape(scores.tensor)[2], tf.int64)
    limit = tf.cast(tf.minimum(_scalar(most, 0, tf.int64), count), tf.int32)
    overlap, least = _scalar(iou, 0.0, tf.float32), _scalar(score, -np.inf, tf.float32)
    rows = _picked(_as_corners(boxes.tensor, bool(center_point_box)), scores.tensor, limit, overlap, least)
    return tf.cast(rows, tf.int64)


def _scalar(value: Value | None, default: float, dtype: tf.DType) -> Tensor:
    return tf.constant(default, dtype) if value is None else tf.cast(tf.reshape(value.tensor, []), dtype)


def _as_corners(boxes: Tensor, is_centered: bool) -> Tensor:
    """Boxes as two corners; they are given so, or as a center and a size."""
    if not is_centered:
        return boxes
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return tf.concat([center - half, center + half], -1)


def _picked(boxes: Tensor, scores: Tensor, limit: Tensor, overlap: Tensor, least: Tensor) -> Tensor:
    """The remaining boxes of each class of each image, one class after another."""
    batch, classes = tf.shape(scores)[0], tf.shape(scores)[1]

    def step(i: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        b, c = i // classes, i % classes
        kept = tf.image.non_max_suppression(boxes[b], scores[b, c], limit, overlap, least)
        head = tf.broadcast_to(tf.stack([b, c])[None], [tf.shape(kept)[0], 2])
        return i + 1, tf.concat([rows, tf.concat([head, kept[:, None]], 1)], 0)

    start = [tf.constant(0), tf.zeros([0, 3], tf.int32)]
    shapes = [tf.TensorShape([]), tf.TensorShape([None, 3])]
    return tf.while_loop(lambda i, _: i < batch * classes, step, start, shape_invariants=shapes)[1]


@OPS.op("RoiAlign", since=10)
def roi_align(
    x: Value,
    rois: Value,
    batch: Value,
    *,
    coordinate_transformation_mode: str | None = None,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
    node: Node,
) -> Value:
    """Samples on a grid in each bin of each region, averaged or their maximum."""
    images, bins, offset = (
        x.in_order(last(4)),
        (output_height, output_width),
        _offset(coordinate_transformation_mode, node),
    )

    def aligned(rois: Tensor, batch: Tensor, samples: tuple[Any, Any]) -> Tensor:
        return _aligned(images, rois, batch, mode, bins, samples, spatial_scale, offset, node)

    if sampling_ratio > 0:
        return node.value(aligned(rois.tensor, batch.tensor, (sampling_ratio, sampling_ratio)), last(4))
    # the number of samples depends on a region's pixels per bin, so regions are computed one by one
    _, size = _extent(rois.tensor, spatial_scale, offset)
    counts = tf.maximum(tf.cast(tf.math.ceil(size / tf.constant(bins, size.dtype)), tf.int32), 1)
    made = tf.map_fn(
        lambda given: aligned(given[0][None], given[1][None], (given[2][0], given[2][1]))[0],
        (rois.tensor, batch.tensor, counts),
        fn_output_signature=tf.TensorSpec([*bins, images.shape[-1]], images.dtype),
    )
    return node.value(made, last(4))


def _offset(mode: str | None, node: Node) -> float:
    if mode is None:
        mode = "half_pixel" if node.version >= 16 else "output_half_pixel"
    return 0.5 if mode == "half_pixel" else 0.0


def _extent(rois: Tensor, scale: float, offset: float) -> tuple[Tensor, Tensor]:
    """Upper left corner and size of each region, `(regions, 2)` as (y, x)."""
    corners = tf.reverse(tf.reshape(rois, [-1, 2, 2]), [2]) * scale - offset
    size = corners[:, 1] - corners[:, 0]
    return corners[:, 0], size if offset else tf.maximum(size, 1.0)


def _aligned(
    images: Tensor,
    rois: Tensor,
    batch: Tensor,
    mode: str,
    bins: tuple[int, int],
    samples: tuple[int, int],
    scale: float,
    offset: float,
    node: Node,
) -> Tensor:
    start, size = _extent(rois, scale, offset)
    axes = []
    for axis in (0, 1):
        step = size[:, axis, None, None] / bins[axis]
        positions = tf.range(bins[axis], dtype=images.dtype)[None, :, None]
        inner = (tf.range(samples[axis], dtype=images.dtype)[None, None, :] + 0.5) / samples[axis]
        axes.append(start[:, axis, None, None] + (positions + inner) * step)
    ys = axes[0][:, :, None, :, None] + tf.zeros_like(axes[1])[:, None, :, None, :]
    xs = axes[1][:, None, :, None, :] + tf.zeros_like(axes[0])[:, :, None, :, None]
    weighed = corners(node.ops, images, batch, ys, xs)
    if mode == "max":
        return tf.reduce_max(tf.stack(weighed), [0, 4, 5])
    return tf.reduce_mean(tf.add_n(weighed), [3, 4])


@OPS.op("DeformConv", since=19)
def deformable_convolution(
    x: Value,
    weight: Value,
    offset: Value,
    bias: Value | None = None,
    mask: Value | None = None,
    *,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    node: Node,
) -> Tensor:
    """A convolution whose kernel's positions are moved, each by an offset of its own, and weighed by a mask."""
    if x.rank != 4:
        raise node.unsupported("a deformable convolution with a number of spatial axes other than two")
    dilations, strides, pads = dilations or [1, 1], strides or [1, 1], pads or [0] * 4
    outputs, depth, *kernel = (int(each) for each in weight.shape or ())  # type: ignore[arg-type]  # static
    batch, channels, height, width = sizes_of(x)
    rows, columns = sizes_of(offset)[2:]
    taps = kernel[0] * kernel[1]
    # (batch and offset group, tap and y or x, row, column): TFLite slices five axes at most
    moved = tf.reshape(offset.tensor, tf.stack([batch * offset_group, taps * 2, rows, columns]))
    if mask is not None:
        weighed = tf.reshape(mask.tensor, tf.stack([batch * offset_group, taps, rows, columns, 1]))
    images = tf.reshape(x.tensor, tf.stack([batch * offset_group, channels // offset_group, height, width]))
    images = tf.transpose(images, [0, 2, 3, 1])
    sizes = [tf.cast(each, images.dtype) for each in (height, width)]
    found = []
    for tap in range(taps):
        own = (tap // kernel[1], tap % kernel[1])
        at = [
            moved[:, 2 * tap + axis]
            + _lattice(
                (rows, columns)[axis], strides[axis], own[axis] * dilations[axis] - pads[axis], axis, images.dtype
            )
            for axis in (0, 1)
        ]
        sample = sampled(node.ops, images, at, sizes, "linear", "zeros", False)
        if mask is not None:
            sample *= weighed[:, tap]
        sample = tf.reshape(sample, tf.stack([batch, offset_group, rows, columns, channels // offset_group]))
        found.append(tf.reshape(tf.transpose(sample, [0, 1, 4, 2, 3]), tf.stack([batch, group, depth, rows, columns])))
    kernels = tf.reshape(weight.tensor, [group, outputs // group, depth, taps])
    made = tf.einsum("bgcthw,goct->bgohw", tf.stack(found, 3), kernels)
    made = tf.reshape(made, tf.stack([batch, outputs, rows, columns]))
    return made if bias is None else made + bias.tensor[:, None, None]


def _lattice(count: Any, stride: int, start: int, axis: int, dtype: Any) -> Tensor:
    """Where the windows begin, shaped to be added along its axis."""
    line = tf.cast(tf.range(count) * stride + start, dtype)
    return line[:, None] if axis == 0 else line[None, :]
