"""Operators of detection and sampling."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.vision import ops as vision

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.convolution import pad
from polyexport.lowering.paddle.math import round_
from polyexport.lowering.paddle.resize import real, where
from polyexport.lowering.paddle.shape import padded
from polyexport.lowering.paddle.target import OPS, paddle_dtype, sizes_of, told, vector
from polyexport.lowering.resizing import cubic
from polyexport.lowering.value import Tensor, Value


@OPS.op("NonMaxSuppression", since=10)
def non_max_suppression(
    boxes: Value, scores: Value, most: Value | None = None, iou: Value | None = None, score: Value | None = None,
    *, center_point_box: int = 0, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line
    """Rows of (batch, class, box); a box falls away when it overlaps a better one of its class by more than `iou`.

    All classes of all images take their best box in the same step, and as many steps are made as boxes are asked for.
    """

    def scalar(value: Value | None, default: float, dtype: str) -> Tensor:
        given = node.value(np.array(default, dtype)) if value is None else value
        return paddle.cast(paddle.reshape(given.tensor, []), dtype)

    corners, points = told(boxes.tensor, [*(boxes.shape or ())[:2], 4]), scores.tensor
    first, second = corners[..., :2], corners[..., 2:]
    if center_point_box:
        first, second = first - second / 2, first + second / 2
    low, high = paddle.minimum(first, second), paddle.maximum(first, second)
    batch, classes, count = sizes_of(scores)
    limit = paddle.minimum(scalar(most, 0, "int64"), vector([count])[0])
    overlap, least = scalar(iou, 0.0, "float32"), scalar(score, -np.inf, "float32")
    lowest = node.value(np.array(-np.inf, scores.dtype)).tensor
    line = paddle.arange(0, count, 1, dtype="int64")

    def step(i: Tensor, picked: Tensor, open_: Tensor) -> list[Tensor]:
        best = paddle.argmax(where(open_, points, lowest), -1)  # (batch, class)
        found = paddle.any(open_, -1)
        shared = _overlap(low, high, best)
        left = paddle.logical_and(shared <= overlap, line != paddle.unsqueeze(best, -1))
        best = where(found, best, -1)
        picked = paddle.concat([picked, paddle.unsqueeze(best, 0)])
        return [i + 1, told(picked, [None, *_static(batch, classes)]), paddle.logical_and(open_, left)]

    start = [
        paddle.zeros([], "int64"),
        told(paddle.zeros(vector([0, batch, classes]), "int64"), [None, *_static(batch, classes)]),
        points > least,
    ]
    _, picked, _ = paddle.static.nn.while_loop(lambda i, *_: i < limit, step, start)
    rows = paddle.transpose(picked, [1, 2, 0])
    places = paddle.nonzero(rows >= 0)
    return paddle.concat([places[:, :2], paddle.unsqueeze(paddle.gather_nd(rows, places), 1)], 1)


def _static(*sizes: Any) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in sizes]


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
    x: Value, rois: Value, batch: Value,
    *, coordinate_transformation_mode: str | None = None, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on two
    """Samples on a grid in each bin of each region, averaged or their maximum."""
    half = (coordinate_transformation_mode or ("half_pixel" if node.version >= 16 else "")) == "half_pixel"
    bins = (output_height, output_width)
    if mode == "max":
        return _greatest(x, rois.tensor, batch.tensor, bins, sampling_ratio, spatial_scale, half)
    # Paddle wants the regions image by image, and how many each has
    images = paddle.arange(0, sizes_of(x)[0], 1, dtype="int64")
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
    """The maximum of the weighed neighbours of all samples; what a region has no sample for does not count."""
    images = paddle.transpose(x.tensor, [0, 2, 3, 1])
    corners = paddle.gather(rois, vector([1, 0, 3, 2]), axis=1).reshape([-1, 2, 2]) * scale - (0.5 if half else 0.0)
    size = corners[:, 1] - corners[:, 0]
    size = size if half else paddle.clip(size, min=1.0)
    axes, valid = [], []
    for axis in (0, 1):
        step = paddle.reshape(size[:, axis], [-1, 1, 1]) / bins[axis]
        counts = paddle.full_like(step, ratio) if ratio > 0 else paddle.clip(paddle.ceil(step), min=1.0)
        most = ratio if ratio > 0 else paddle.cast(paddle.amax(counts), "int64")
        samples, line = (
            paddle.cast(paddle.arange(0, end, 1, dtype="int64"), rois.dtype) for end in (most, bins[axis])
        )  # fmt: skip  # two lines of numbers
        places = paddle.reshape(line, [1, -1, 1])
        # no division of a smaller tensor by a larger one: oneDNN, in the inference runtime, swaps the two
        axes.append(
            paddle.reshape(corners[:, 0, axis], [-1, 1, 1])
            + (places + (samples + 0.5) * paddle.reciprocal(counts)) * step
        )
        valid.append(paddle.logical_and(samples < counts, places >= 0))
    flat = paddle.zeros_like(axes[0]).unsqueeze([3, 4]) + paddle.zeros_like(axes[1]).unsqueeze([1, 2])
    ys, xs = flat + axes[0].unsqueeze([3, 4]), flat + axes[1].unsqueeze([1, 2])
    counted = paddle.logical_and(valid[0].unsqueeze([3, 4]), valid[1].unsqueeze([1, 2]))
    weighed = functools.reduce(paddle.maximum, _corners(images, batch, ys, xs))
    lowest = float(np.finfo(x.dtype).min)
    return paddle.transpose(paddle.amax(where(counted.unsqueeze(-1), weighed, lowest), [2, 4]), [0, 3, 1, 2])


def _corners(images: Tensor, batch: Tensor, ys: Tensor, xs: Tensor) -> list[Tensor]:
    """The four neighbours of each sample, weighed; a sample further out than one pixel counts as zero."""
    height, width = (paddle.cast(paddle.shape(images)[i], images.dtype) for i in (1, 2))
    inside = (ys >= -1) & (ys <= height) & (xs >= -1) & (xs <= width)
    ys, xs = _within(ys, height), _within(xs, width)
    top, left = paddle.floor(ys), paddle.floor(xs)
    down, right = paddle.minimum(top + 1, height - 1), paddle.minimum(left + 1, width - 1)
    dy, dx = ys - top, xs - left
    rows = paddle.reshape(paddle.cast(batch, "int64"), [-1, 1, 1, 1, 1]) + paddle.zeros_like(top, "int64")
    found = []
    for y, x, weight in (
        (top, left, (1 - dy) * (1 - dx)),
        (top, right, (1 - dy) * dx),
        (down, left, dy * (1 - dx)),
        (down, right, dy * dx),
    ):
        places = paddle.stack([rows, paddle.cast(y, "int64"), paddle.cast(x, "int64")], -1)
        found.append(paddle.gather_nd(images, places) * paddle.unsqueeze(where(inside, weight, 0.0), -1))
    return found


def _within(at: Tensor, size: Tensor) -> Tensor:
    return paddle.minimum(paddle.clip(at, min=0.0), size - 1)


@OPS.op("GridSample", since=16)
def grid_sample(
    x: Value, grid: Value, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """The tensor at places between -1 and 1, the last axis of the grid counting the axes from the last."""
    rank = x.rank or 0
    if mode in ("linear", "bilinear") and rank in (4, 5) and x.dtype == grid.dtype:
        return F.grid_sample(x.tensor, grid.tensor, "bilinear", padding_mode, bool(align_corners))
    images = paddle.transpose(x.tensor, [0, *range(2, rank), 1])
    sizes = [vector([each])[0].astype(images.dtype) for each in sizes_of(x)[2:]]
    axes = []
    for place, size in enumerate(sizes):
        at = paddle.cast(grid.tensor[..., rank - 3 - place], images.dtype)
        at = (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
        axes.append(_moved(at, size, padding_mode, bool(align_corners)) if "cubic" not in mode else at)
    made = _sampled(images, axes, sizes, mode, padding_mode, bool(align_corners))
    return paddle.transpose(made, [0, rank - 1, *range(1, rank - 1)])


def _moved(at: Tensor, size: Tensor, mode: str, align_corners: bool) -> Tensor:
    """Places beyond the tensor, moved into it as `padding_mode` says."""
    if mode == "border":
        return _within(at, size)
    if mode == "reflection":
        beyond = 0.0 if align_corners else 0.5
        low, high = paddle.full_like(size, -beyond), size - 1 + beyond
        span = high - low
        turn = paddle.floor_mod(at - low, paddle.clip(2 * span, min=1e-6))
        return _within(paddle.where(turn > span, 2 * span - turn, turn) + low, size)
    return at


def _sampled(
    images: Tensor, axes: list[Tensor], sizes: list[Tensor], mode: str, padding_mode: str, align_corners: bool
) -> Tensor:
    rows = paddle.arange(0, paddle.cast(paddle.shape(images)[0], "int64"), 1, dtype="int64")
    rows = paddle.reshape(rows, [-1] + [1] * len(sizes)) + paddle.zeros_like(axes[0], "int64")
    total = None
    for corner in itertools.product(*(_taps(at, mode) for at in axes)):
        places, share = [rows], paddle.ones_like(axes[0])
        for (place, weight), size in zip(corner, sizes, strict=True):
            if "cubic" in mode:
                place = _moved(place, size, padding_mode, align_corners)
            share = where((place >= 0) & (place <= size - 1), share * weight, 0.0)
            places.append(paddle.cast(_within(place, size), "int64"))
        found = paddle.gather_nd(images, paddle.stack(places, -1)) * paddle.unsqueeze(share, -1)
        total = found if total is None else total + found
    return total


def _taps(at: Tensor, mode: str) -> list[tuple[Tensor, Tensor]]:
    """The entries that count at a place, with their weights."""
    if mode == "nearest":
        return [(round_(at), paddle.ones_like(at))]
    low = paddle.floor(at)
    part = at - low
    if "cubic" not in mode:
        return [(low, 1 - part), (low + 1, part)]
    return [(low + i, cubic(part - i, -0.75, where)) for i in (-1, 0, 1, 2)]


@OPS.op("AffineGrid", since=20)
def affine_grid(theta: Value, size: Value, *, align_corners: int = 0) -> Tensor:
    """Places between -1 and 1, the axes counted from the last, each moved by its sample's matrix `(n, n + 1)`."""
    count = (theta.shape or (None, None))[1] or (size.shape or (4,))[0] - 2  # type: ignore[operator]  # one is static
    known = [None] * (count + 2) if size.sizes is None else list(size.sizes)
    sizes = [
        paddle.cast(size.tensor[i + 2], "int64") if each is None else int(each) for i, each in enumerate(known[2:])
    ]
    lines = []
    for each in sizes:
        place, steps = paddle.cast(paddle.arange(0, each, 1, dtype="int64"), "float32"), real(each)
        even = place * 2 / paddle.clip(steps - 1, min=1.0) - 1
        lines.append(even if align_corners else (2 * place + 1) / steps - 1)
    mesh = paddle.meshgrid(*lines) if count > 1 else lines
    places = paddle.stack([*mesh[::-1], paddle.ones_like(mesh[0])], -1)
    flat = paddle.cast(paddle.reshape(places, [-1, count + 1]), paddle_dtype(theta.dtype))
    moved = paddle.matmul(flat, paddle.transpose(theta.tensor, [0, 2, 1]))
    made = paddle.reshape(moved, vector([sizes_of(theta)[0], *sizes, count]))
    return told(made, [*_static(sizes_of(theta)[0], *sizes), count])


@OPS.op("DeformConv", since=19)
def deformable_convolution(
    x: Value, weight: Value, offset: Value, bias: Value | None = None, mask: Value | None = None,
    *, dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    offset_group: int = 1, pads: list[int] | None = None, strides: list[int] | None = None, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next two
    """A convolution whose kernel's places are moved, each by an offset of its own, and weighed by a mask."""
    if x.rank != 4:
        raise node.unsupported("a deformable convolution over other than two axes")
    pads = pads or [0] * 4
    # beyond its sides the tensor counts as zero, padded or not
    data = pad(x.tensor, [(pads[0], pads[2]), (pads[1], pads[3])])
    outputs, depth, *kernel = (int(each) for each in weight.shape or ())  # type: ignore[arg-type]  # static
    # Paddle wants as many results as can be shared among the groups of offsets: ones of zeros are added, and cut
    own, unit = outputs // group, offset_group // math.gcd(group, offset_group)
    more = -own % unit
    kernels = weight.tensor
    if more:
        wide = padded(paddle.reshape(kernels, [group, own, -1]), [(0, 0), (0, more), (0, 0)], 0.0)
        kernels = paddle.reshape(wide, [group * (own + more), depth, *kernel])
    made = vision.deform_conv2d(
        data, offset.tensor, kernels, None, strides or [1, 1], [0, 0], dilations or [1, 1], offset_group, group,
        None if mask is None else mask.tensor,
    )  # fmt: skip  # one call on two lines
    if more:
        sizes = sizes_of(node.value(made))
        parts = paddle.reshape(made, vector([sizes[0], group, own + more, *sizes[2:]]))
        made = paddle.reshape(parts[:, :, :own], vector([sizes[0], outputs, *sizes[2:]]))
    return made if bias is None else made + paddle.reshape(bias.tensor, [-1, 1, 1])
