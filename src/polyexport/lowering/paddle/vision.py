"""Operators of detection, and DeformConv.

Paddle has its own operators for RoiAlign and DeformConv, and suppresses boxes in a loop over all classes at once;
TensorFlow has an operator for boxes and none for those two, so that the files have little in common but the signatures.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import paddle
from paddle.vision import ops as vision

from polyexport.lowering.backend import Tensor, static_of
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.vision import corners
from polyexport.lowering.paddle.backend import OPS
from polyexport.lowering.paddle.primitives import line, pad, sizes_of, vector, where
from polyexport.lowering.paddle.weights import set_shape
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
    node: Node,
) -> Tensor:
    """Rows of (batch, class, box); a box is suppressed if it overlaps a better one of its class by more than `iou`."""
    count = sizes_of(scores)[2]
    limit = paddle.minimum(_scalar(most, 0, "int64", node), vector([count])[0])
    least = _scalar(score, -np.inf, "float32", node)
    low, high = _corners(set_shape(boxes.tensor, [*(boxes.shape or ())[:2], 4]), bool(center_point_box))
    picked = _picked(low, high, scores, limit, _scalar(iou, 0.0, "float32", node), least, node)
    rows = paddle.transpose(picked, [1, 2, 0])
    positions = paddle.nonzero(rows >= 0)
    return paddle.concat([positions[:, :2], paddle.unsqueeze(paddle.gather_nd(rows, positions), 1)], 1)


def _scalar(value: Value | None, default: float, dtype: str, node: Node) -> Tensor:
    given = node.value(np.array(default, dtype)) if value is None else value
    return paddle.cast(paddle.reshape(given.tensor, []), dtype)


def _corners(boxes: Tensor, is_centered: bool) -> tuple[Tensor, Tensor]:
    """The lower and the upper corner of boxes, which are two corners or a center and a size."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if is_centered:
        first, second = first - second / 2, first + second / 2
    return paddle.minimum(first, second), paddle.maximum(first, second)


def _picked(
    low: Tensor, high: Tensor, scores: Value, limit: Tensor, overlap: Tensor, least: Tensor, node: Node
) -> Tensor:
    """The best remaining box in each step, `(step, batch, class)`; -1 if there is none.

    All classes of all images take their best box in the same step, and as many steps are made as boxes are asked for.
    """
    batch, classes, count = sizes_of(scores)
    lowest = node.value(np.array(-np.inf, scores.dtype)).tensor
    points, every = scores.tensor, line(0, count)

    def step(i: Tensor, picked: Tensor, open_: Tensor) -> list[Tensor]:
        best = paddle.argmax(where(open_, points, lowest), -1)  # (batch, class)
        found = paddle.any(open_, -1)
        shared = _overlap(low, high, best)
        left = paddle.logical_and(shared <= overlap, every != paddle.unsqueeze(best, -1))
        picked = paddle.concat([picked, paddle.unsqueeze(where(found, best, -1), 0)])
        return [i + 1, set_shape(picked, [None, *static_of([batch, classes])]), paddle.logical_and(open_, left)]

    nothing = set_shape(paddle.zeros(vector([0, batch, classes]), "int64"), [None, *static_of([batch, classes])])
    start = [paddle.zeros([], "int64"), nothing, points > least]
    return paddle.static.nn.while_loop(lambda i, *_: i < limit, step, start)[1]


def _overlap(low: Tensor, high: Tensor, best: Tensor) -> Tensor:
    """Of each class's best box with all boxes, their common area by that of both: `(batch, class, box)`."""
    index = paddle.stack([best, best], -1)
    near, far = (
        paddle.unsqueeze(paddle.take_along_axis(each, index, 1, broadcast=False), 2) for each in (low, high)
    )  # (batch, class, 1, 2)
    side = paddle.minimum(far, paddle.unsqueeze(high, 1)) - paddle.maximum(near, paddle.unsqueeze(low, 1))
    common = paddle.clip(side, min=0)
    inner = common[..., 0] * common[..., 1]
    own, all_ = ((b - a)[..., 0] * (b - a)[..., 1] for a, b in ((near, far), (low, high)))
    union = own + paddle.unsqueeze(all_, 1) - inner
    return where(union > 0, inner / union, 0.0)


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
) -> Tensor:
    """Samples on a grid in each bin of each region, averaged or their maximum."""
    half = (coordinate_transformation_mode or ("half_pixel" if node.version >= 16 else "")) == "half_pixel"
    bins = (output_height, output_width)
    if mode == "max":
        return _greatest(x, rois.tensor, batch.tensor, bins, sampling_ratio, spatial_scale, half)
    # Paddle needs the regions sorted by image, and their number for each
    images = line(0, sizes_of(x)[0])
    index = paddle.cast(batch.tensor, "int64")
    order = paddle.argsort(index, stable=True)
    counts = paddle.sum(paddle.cast(paddle.unsqueeze(images, 1) == index, "int32"), 1, dtype="int32")
    sorted_ = paddle.gather(rois.tensor, order)
    made = vision.roi_align(
        x.tensor, sorted_, counts, bins, spatial_scale, sampling_ratio if sampling_ratio > 0 else -1, half
    )
    return paddle.gather(made, paddle.argsort(order))


def _greatest(
    x: Value, rois: Tensor, batch: Tensor, bins: tuple[int, int], ratio: int, scale: float, half: bool
) -> Tensor:
    """The maximum of the weighed neighbors of all samples; what a region has no sample for does not count."""
    images = paddle.transpose(x.tensor, [0, 2, 3, 1])
    region = paddle.gather(rois, vector([1, 0, 3, 2]), axis=1).reshape([-1, 2, 2]) * scale - (0.5 if half else 0.0)
    size = region[:, 1] - region[:, 0]
    size = size if half else paddle.clip(size, min=1.0)
    (ys, rows), (xs, columns) = (_samples(region[:, 0, i], size[:, i] / bins[i], bins[i], ratio) for i in (0, 1))
    flat = paddle.zeros_like(ys).unsqueeze([3, 4]) + paddle.zeros_like(xs).unsqueeze([1, 2])
    ys, xs = flat + ys.unsqueeze([3, 4]), flat + xs.unsqueeze([1, 2])
    counted = paddle.logical_and(rows.unsqueeze([3, 4]), columns.unsqueeze([1, 2]))
    weighed = functools.reduce(paddle.maximum, corners(x.backend, images, batch, ys, xs))
    lowest = float(np.finfo(x.dtype).min)
    return paddle.transpose(paddle.amax(where(counted.unsqueeze(-1), weighed, lowest), [2, 4]), [0, 3, 1, 2])


def _samples(start: Tensor, step: Tensor, bins: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Where along one axis the samples of each region's bins lie, `(region, bin, sample)`, and which of them count."""
    start, step = (paddle.reshape(each, [-1, 1, 1]) for each in (start, step))
    counts = paddle.full_like(step, ratio) if ratio > 0 else paddle.clip(paddle.ceil(step), min=1.0)
    most = ratio if ratio > 0 else paddle.cast(paddle.amax(counts), "int64")
    samples, bin_ = (paddle.cast(line(0, end), step.dtype) for end in (most, bins))
    bin_ = paddle.reshape(bin_, [1, -1, 1])
    # no division of a smaller tensor by a larger one: oneDNN, in the inference runtime, swaps the two
    positions = start + (bin_ + (samples + 0.5) * paddle.reciprocal(counts)) * step
    return positions, paddle.logical_and(samples < counts, bin_ >= 0)


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
    pads = pads or [0] * 4
    # beyond its sides the tensor counts as zero, padded or not
    data = pad(x.tensor, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])], 0)
    outputs, depth, *kernel = (int(each) for each in weight.shape or ())  # type: ignore[arg-type]  # static
    # Paddle wants as many results as can be shared among the groups of offsets: ones of zeros are added, and cut
    own, unit = outputs // group, offset_group // math.gcd(group, offset_group)
    more = -own % unit
    kernels = weight.tensor
    if more:
        wide = pad(paddle.reshape(kernels, [group, own, -1]), [(0, 0), (0, more), (0, 0)], 0)
        kernels = paddle.reshape(wide, [group * (own + more), depth, *kernel])
    made = vision.deform_conv2d(
        data,
        offset.tensor,
        kernels,
        None,
        strides or [1, 1],
        [0, 0],
        dilations or [1, 1],
        offset_group,
        group,
        None if mask is None else mask.tensor,
    )
    if more:
        sizes = sizes_of(node.value(made))
        parts = paddle.reshape(made, vector([sizes[0], group, own + more, *sizes[2:]]))
        made = paddle.reshape(parts[:, :, :own], vector([sizes[0], outputs, *sizes[2:]]))
    return made if bias is None else made + paddle.reshape(bias.tensor, [-1, 1, 1])
