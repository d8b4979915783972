"""Operators of detection and sampling."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.resizing import cubic
from polyexport.lowering.tensorflow.convolution import last
from polyexport.lowering.tensorflow.resize import where
from polyexport.lowering.tensorflow.target import OPS, sizes_of
from polyexport.lowering.value import Tensor, Value


@OPS.op("NonMaxSuppression", since=10)
def non_max_suppression(
    boxes: Value, scores: Value, most: Value | None = None, iou: Value | None = None, score: Value | None = None,
    *, center_point_box: int = 0,
) -> Tensor:  # fmt: skip  # the inputs on one line
    """Rows of (batch, class, box); a box falls away when it overlaps a better one of its class by more than `iou`."""

    def scalar(value: Value | None, default: float, dtype: Any) -> Tensor:
        return tf.constant(default, dtype) if value is None else tf.cast(tf.reshape(value.tensor, []), dtype)

    corners, points = boxes.tensor, scores.tensor
    if center_point_box:
        centre, half = corners[..., :2], corners[..., 2:] / 2
        corners = tf.concat([centre - half, centre + half], -1)
    batch, classes = tf.shape(points)[0], tf.shape(points)[1]
    limit = tf.cast(tf.minimum(scalar(most, 0, tf.int64), tf.cast(tf.shape(points)[2], tf.int64)), tf.int32)
    overlap, least = scalar(iou, 0.0, tf.float32), scalar(score, -np.inf, tf.float32)

    def step(i: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        b, c = i // classes, i % classes
        kept = tf.image.non_max_suppression(corners[b], points[b, c], limit, overlap, least)
        head = tf.broadcast_to(tf.stack([b, c])[None], [tf.shape(kept)[0], 2])
        return i + 1, tf.concat([rows, tf.concat([head, kept[:, None]], 1)], 0)

    start = [tf.constant(0), tf.zeros([0, 3], tf.int32)]
    shapes = [tf.TensorShape([]), tf.TensorShape([None, 3])]
    _, rows = tf.while_loop(lambda i, _: i < batch * classes, step, start, shape_invariants=shapes)
    return tf.cast(rows, tf.int64)


@OPS.op("RoiAlign", since=10)
def roi_align(
    x: Value, rois: Value, batch: Value,
    *, coordinate_transformation_mode: str | None = None, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0, node: Node,
) -> Value:  # fmt: skip  # the inputs on one line, the attributes on two
    """Samples on a grid in each bin of each region, averaged or their maximum."""
    if sampling_ratio <= 0:
        return _adaptive(
            x,
            rois,
            batch,
            mode,
            output_height,
            output_width,
            spatial_scale,
            _offset(coordinate_transformation_mode, node),
            node,
        )
    pooled = _aligned(
        x.in_order(last(4)), rois.tensor, batch.tensor, mode, (output_height, output_width),
        (sampling_ratio, sampling_ratio), spatial_scale, _offset(coordinate_transformation_mode, node),
    )  # fmt: skip  # the data on one line
    return node.value(pooled, last(4))


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
    images: Tensor, rois: Tensor, batch: Tensor, mode: str, bins: tuple[int, int], samples: tuple[int, int],
    scale: float, offset: float,
) -> Tensor:  # fmt: skip  # the data on one line
    start, size = _extent(rois, scale, offset)
    axes = []
    for axis in (0, 1):
        step = size[:, axis, None, None] / bins[axis]
        places = tf.range(bins[axis], dtype=images.dtype)[None, :, None]
        inner = (tf.range(samples[axis], dtype=images.dtype)[None, None, :] + 0.5) / samples[axis]
        axes.append(start[:, axis, None, None] + (places + inner) * step)
    ys = axes[0][:, :, None, :, None] + tf.zeros_like(axes[1])[:, None, :, None, :]
    xs = axes[1][:, None, :, None, :] + tf.zeros_like(axes[0])[:, :, None, :, None]
    weighed = _corners(images, batch, ys, xs)
    if mode == "max":
        return tf.reduce_max(_greatest(weighed), [3, 4])
    return tf.reduce_mean(tf.add_n(weighed), [3, 4])


def _greatest(parts: list[Tensor]) -> Tensor:
    return tf.reduce_max(tf.stack(parts), 0)


def _corners(images: Tensor, batch: Tensor, ys: Tensor, xs: Tensor) -> list[Tensor]:
    """The four neighbours of each sample, weighed; a sample further out than one pixel counts as zero."""
    height, width = (tf.cast(tf.shape(images)[i], images.dtype) for i in (1, 2))
    inside = tf.logical_and(tf.logical_and(ys >= -1, ys <= height), tf.logical_and(xs >= -1, xs <= width))
    ys, xs = tf.clip_by_value(ys, 0, height - 1), tf.clip_by_value(xs, 0, width - 1)
    top, left = tf.floor(ys), tf.floor(xs)
    down, right = tf.minimum(top + 1, height - 1), tf.minimum(left + 1, width - 1)
    dy, dx = ys - top, xs - left
    rows = tf.reshape(tf.cast(batch, tf.int32), [-1, 1, 1, 1, 1]) + tf.zeros_like(tf.cast(top, tf.int32))
    found = []
    for y, x, weight in (
        (top, left, (1 - dy) * (1 - dx)),
        (top, right, (1 - dy) * dx),
        (down, left, dy * (1 - dx)),
        (down, right, dy * dx),
    ):
        places = tf.stack([rows, tf.cast(y, tf.int32), tf.cast(x, tf.int32)], -1)
        weight = tf.where(inside, weight, tf.zeros_like(weight))
        # a slice with a new axis is one of six axes, and TFLite has five
        found.append(tf.gather_nd(images, places) * tf.expand_dims(weight, -1))
    return found


def _adaptive(
    x: Value, rois: Value, batch: Value, mode: str, height: int, width: int, scale: float, offset: float, node: Node
) -> Value:
    """As many samples as a region has pixels in a bin: another number for each region, so one after another."""
    images = x.in_order(last(4))
    _, size = _extent(rois.tensor, scale, offset)
    counts = tf.maximum(tf.cast(tf.math.ceil(size / tf.constant([height, width], size.dtype)), tf.int32), 1)

    def one(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        roi, index, count = inputs
        return _aligned(images, roi[None], index[None], mode, (height, width), (count[0], count[1]), scale, offset)[0]

    spec = tf.TensorSpec([height, width, images.shape[-1]], images.dtype)
    made = tf.map_fn(one, (rois.tensor, batch.tensor, counts), fn_output_signature=spec)
    return node.value(made, last(4))


@OPS.op("GridSample", since=16)
def grid_sample(
    x: Value, grid: Value, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros", node: Node
) -> Value:
    """The tensor at places between -1 and 1, the last axis of the grid counting the axes from the last."""
    rank = x.rank or 0
    images = x.in_order(last(rank))
    sizes = [tf.cast(each, images.dtype) for each in tf.unstack(tf.shape(images), rank)[1:-1]]
    axes = []
    for place, size in enumerate(sizes):
        at = tf.cast(grid.tensor[..., rank - 3 - place], images.dtype)
        at = (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
        axes.append(_inside(at, size, padding_mode, bool(align_corners)) if "cubic" not in mode else at)
    return node.value(_sampled(images, axes, sizes, mode, padding_mode, bool(align_corners)), last(rank))


@OPS.op("AffineGrid", since=20)
def affine_grid(theta: Value, size: Value, *, align_corners: int = 0) -> Tensor:
    """Places between -1 and 1, the axes counted from the last, each moved by its sample's matrix `(n, n + 1)`."""
    count = (theta.shape or (None, None))[1] or (size.shape or (4,))[0] - 2  # type: ignore[operator]  # one is static
    sizes = tf.cast(size.tensor, tf.int32)[2:]
    lines = []
    for axis in range(count):
        steps = tf.cast(sizes[axis], tf.float32)
        place = tf.cast(tf.range(sizes[axis]), tf.float32)
        even = place * 2 / tf.maximum(steps - 1, 1) - 1
        lines.append(even if align_corners else (2 * place + 1) / steps - 1)
    mesh = tf.meshgrid(*lines, indexing="ij")
    places = tf.stack([*mesh[::-1], tf.ones_like(mesh[0])], -1)
    flat = tf.cast(tf.reshape(places, [-1, count + 1]), tf.as_dtype(theta.dtype))
    moved = tf.einsum("nij,pj->npi", theta.tensor, flat)
    return tf.reshape(moved, tf.concat([tf.shape(moved)[:1], sizes, [count]], 0))


def _inside(at: Tensor, size: Tensor, mode: str, align_corners: bool) -> Tensor:
    """Places beyond the tensor, moved into it as `padding_mode` says."""
    if mode == "border":
        return tf.clip_by_value(at, 0, size - 1)
    if mode == "reflection":
        low, high = (tf.zeros_like(size), size - 1) if align_corners else (tf.zeros_like(size) - 0.5, size - 0.5)
        span = high - low
        turn = tf.math.floormod(at - low, tf.maximum(2 * span, 1e-6))
        mirrored = tf.where(turn > span, 2 * span - turn, turn) + low
        return tf.clip_by_value(mirrored, 0, size - 1)
    return at


def _sampled(
    images: Tensor, axes: list[Tensor], sizes: list[Tensor], mode: str, padding_mode: str, align_corners: bool
) -> Tensor:

    taps = [_taps(at, mode) for at in axes]
    total = None
    for corner in itertools.product(*taps):
        weight: Any = 1
        places, valid = [], tf.constant(True)
        for (place, share), size in zip(corner, sizes, strict=True):
            if "cubic" in mode:
                place = _inside(place, size, padding_mode, align_corners)
            valid = tf.logical_and(valid, tf.logical_and(place >= 0, place <= size - 1))
            places.append(tf.cast(tf.clip_by_value(place, 0, size - 1), tf.int32))
            weight = weight * share
        found = tf.gather_nd(images, tf.stack(places, -1), batch_dims=1)
        share = tf.where(valid, weight, tf.zeros_like(weight))[..., None]
        total = found * share if total is None else total + found * share
    return total


def _taps(at: Tensor, mode: str) -> list[tuple[Tensor, Tensor]]:
    """The entries that count at a place, with their weights."""
    if mode == "nearest":
        return [(tf.round(at), tf.ones_like(at))]
    low = tf.floor(at)
    part = at - low
    if "cubic" not in mode:
        return [(low, 1 - part), (low + 1, part)]
    return [(low + i, cubic(part - i, -0.75, where)) for i in (-1, 0, 1, 2)]


@OPS.op("DeformConv", since=19)
def deformable_convolution(
    x: Value, weight: Value, offset: Value, bias: Value | None = None, mask: Value | None = None,
    *, dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    offset_group: int = 1, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next two
    """A convolution whose kernel's places are moved, each by an offset of its own, and weighed by a mask."""
    if x.rank != 4:
        raise node.unsupported("a deformable convolution over other than two axes")
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
        sample = _sampled(images, at, sizes, "linear", "zeros", False)
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
