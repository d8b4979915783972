"""Resize and Upsample, in all of ONNX's modes.

Every mode is a few source entries for each result entry, with weights, one axis after the other; what is known of the
sizes is computed now. The few cases that TensorFlow's own image operators do exactly are left to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.convolution import last
from polyexport.lowering.tensorflow.target import OPS, sizes_of
from polyexport.lowering.value import Tensor, Value


@dataclass(frozen=True)
class Axis:
    """One axis that is resized; what only the run knows is a tensor. `scale` is the nominal one."""

    index: int
    size: Any
    target: Any
    scale: Any
    region: tuple[Any, Any] | None


@dataclass(frozen=True)
class Mode:
    """ONNX's attributes of how entries are found and weighed."""

    kind: str
    coordinates: str
    nearest: str
    cubic: float
    antialias: bool
    exclude_outside: bool
    outside: float


@OPS.op("Resize", since=11)
def resize(
    x: Value, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None,
    *, mode: str = "nearest", coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor", cubic_coeff_a: float = -0.75, antialias: int = 0,
    exclude_outside: int = 0, extrapolation_value: float = 0.0,
    axes: list[int] | None = None, keep_aspect_ratio_policy: str = "stretch", node: Node,
) -> Value:  # fmt: skip  # the inputs on one line, the attributes on four
    """By scales or by sizes."""
    chosen = [axis % (x.rank or 1) for axis in axes] if axes else list(range(x.rank or 0))
    how = Mode(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(antialias), bool(exclude_outside),
        extrapolation_value,
    )  # fmt: skip  # the attributes in their order
    if scales is not None and scales.shape == (0,):
        scales = None
    plan = _plan(x, chosen, roi, scales, sizes, keep_aspect_ratio_policy)
    return _resized(x, plan, how, node)


@OPS.op("Resize", "Upsample", since=9)
def upsample(x: Value, scales: Value, *, mode: str = "nearest", node: Node) -> Value:
    """Before opset 11 a place is scaled without any shift, and rounded down."""
    plan = _plan(x, list(range(x.rank or 0)), None, scales, None, "stretch")
    return _resized(x, plan, Mode(mode, "asymmetric", "floor", -0.75, False, False, 0.0), node)


@OPS.op("Upsample", since=7)
def upsample_attribute(x: Value, *, scales: list[float], mode: str = "nearest", node: Node) -> Value:
    """With the scales as an attribute."""
    return upsample(x, node.value(np.array(scales, np.float32)), mode=mode, node=node)


def _plan(
    x: Value, chosen: list[int], roi: Value | None, scales: Value | None, sizes: Value | None, policy: str
) -> list[Axis]:
    own = sizes_of(x)
    regions = _regions(roi, len(chosen))
    plan = []
    wanted = _kept_aspect([own[axis] for axis in chosen], sizes, policy)
    for place, axis in enumerate(chosen):
        size = own[axis]
        if scales is not None:
            scale: Any = (
                float(scales.known[place]) if scales.known is not None else tf.cast(scales.tensor[place], tf.float32)
            )
            target = _floored(size, scale)
        else:
            target, scale = wanted[place]
        plan.append(Axis(axis, size, target, scale, regions[place]))
    return plan


def _floored(size: Any, scale: Any) -> Any:
    if isinstance(size, int) and isinstance(scale, float):
        return int(np.floor(size * scale))
    if isinstance(scale, float) and scale == int(scale):
        return size * int(scale)
    return tf.cast(tf.floor(tf.cast(size, tf.float32) * scale), tf.int32)


def _kept_aspect(own: list[Any], sizes: Value | None, policy: str) -> list[tuple[Any, Any]]:
    """Target and scale of each axis for the sizes asked for."""
    if sizes is None:
        return []
    entries = [None] * len(own) if sizes.sizes is None else list(sizes.sizes)
    wanted = [tf.cast(sizes.tensor[i], tf.int32) if each is None else int(each) for i, each in enumerate(entries)]
    factors = [_ratio(target, size) for target, size in zip(wanted, own, strict=True)]
    if policy == "stretch":
        return list(zip(wanted, factors, strict=True))
    if all(isinstance(each, float) for each in factors):
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [(int(np.floor(size * factor + 0.5)), factor) for size in own]
    reduce = tf.reduce_min if policy == "not_larger" else tf.reduce_max
    shared = reduce(tf.stack([tf.cast(each, tf.float32) for each in factors]))
    return [(tf.cast(tf.floor(tf.cast(size, tf.float32) * shared + 0.5), tf.int32), shared) for size in own]


def _ratio(target: Any, size: Any) -> Any:
    if isinstance(target, int) and isinstance(size, int):
        return target / size
    return tf.cast(target, tf.float32) / tf.cast(size, tf.float32)


def _regions(roi: Value | None, count: int) -> list[tuple[Any, Any] | None]:
    if roi is None or roi.shape == (0,):
        return [None] * count
    bounds = (
        [float(each) for each in roi.known]
        if roi.known is not None
        else tf.unstack(tf.cast(roi.tensor, tf.float32), 2 * count)
    )
    return [(bounds[i], bounds[i + count]) for i in range(count)]


def _resized(x: Value, plan: list[Axis], how: Mode, node: Node) -> Value:
    plan = [each for each in plan if not _stays(each, how)]
    native = _native(x, plan, how, node)
    if native is not None:
        return native
    tensor = x.stored
    kept = tf.as_dtype(x.dtype)
    if how.kind != "nearest" and not kept.is_floating:
        tensor = tf.cast(tensor, tf.float32)
    for each in plan:
        tensor = _along(tensor, x.placed(each.index), each, how)
    if tensor.dtype != kept:
        # integers are cut as ONNX's reference does: towards zero
        tensor = tf.cast(tensor, kept)
    return node.value(tensor, x.order)


def _stays(axis: Axis, how: Mode) -> bool:
    same = isinstance(axis.size, int) and isinstance(axis.target, int) and axis.size == axis.target
    unscaled = isinstance(axis.scale, float) and axis.scale == 1.0
    return (same or unscaled) and unscaled and how.coordinates != "tf_crop_and_resize"


def _native(x: Value, plan: list[Axis], how: Mode, node: Node) -> Value | None:
    """By TensorFlow's own image operators, where they compute the same."""
    if x.rank != 4 or not plan or not {each.index for each in plan} <= {2, 3} or how.antialias or how.outside:
        return None
    if not all(isinstance(each.size, int) and isinstance(each.target, int) for each in plan):
        return None
    if x.dtype != np.float32:
        return None
    sizes = {each.index: each.target for each in plan}
    target: list[Any] = [sizes.get(axis, size) for axis, size in zip((2, 3), (x.shape or ())[2:], strict=True)]
    scaled = all(isinstance(each.scale, float) for each in plan)
    if (
        not all(isinstance(each, int) for each in target)
        or not scaled
        or not all(abs(each.size * each.scale - each.target) < 1e-4 for each in plan)
    ):
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


@contextlib.contextmanager
def _now(*numbers: Any) -> Iterator[None]:
    """Outside of the graph, if all that is computed is known."""
    if any(tf.is_tensor(number) for number in numbers):
        yield
    else:
        with tf.init_scope():
            yield


def _along(tensor: Tensor, place: int, axis: Axis, how: Mode) -> Tensor:
    """Resize one axis."""
    region = axis.region or (0.0, 1.0)
    with _now(axis.size, axis.target, axis.scale, *region):
        indices, weights, outside = _taps(axis, how)
        if not any(tf.is_tensor(each) for each in (axis.size, axis.target, axis.scale, *region)):
            indices, weights = indices.numpy(), None if weights is None else weights.numpy()
            outside = None if outside is None else outside.numpy()
    rank = tensor.shape.rank
    taps = indices.shape[1]
    wide = [-1] + [1] * (rank - place - 1)
    if weights is None:
        made = tf.gather(tensor, indices[:, 0], axis=place)
    else:
        parts = [
            tf.gather(tensor, indices[:, i], axis=place) * tf.cast(tf.reshape(weights[:, i], wide), tensor.dtype)
            for i in range(taps)
        ]
        made = tf.add_n(parts)
    if outside is not None:
        made = tf.where(tf.reshape(outside, wide), tf.cast(how.outside, made.dtype), made)
    return made


def _taps(axis: Axis, how: Mode) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Source entries and weights `(target, taps)` of one axis, and which entries lie outside; None for not at all."""
    source = _source(axis, how.coordinates)
    outside = None
    size = tf.cast(axis.size, tf.float32)
    if how.coordinates == "tf_crop_and_resize":
        outside = tf.logical_or(source < 0, source > size - 1)
    highest = tf.cast(axis.size, tf.int32) - 1
    if how.kind == "nearest":
        rounded = _ROUNDING[how.nearest](source)
        return tf.clip_by_value(tf.cast(rounded, tf.int32), 0, highest)[:, None], None, outside
    stretch = _stretch(axis, how)
    support = 1 if how.kind == "linear" else 2
    reach = _reach(support, stretch)
    low = tf.floor(source)
    offsets = tf.range(1 - reach, reach + 1, dtype=tf.float32)
    places = low[:, None] + offsets[None, :]
    distance = (places - source[:, None]) * stretch
    weights = _triangle(distance) if how.kind == "linear" else cubic(distance, how.cubic)
    if how.exclude_outside:
        weights = tf.where(tf.logical_or(places < 0, places > size - 1), tf.zeros_like(weights), weights)
    if how.exclude_outside or how.antialias:
        weights /= tf.reduce_sum(weights, 1, keepdims=True)
    return tf.clip_by_value(tf.cast(places, tf.int32), 0, highest), weights, outside


def _stretch(axis: Axis, how: Mode) -> Any:
    """How much wider the filter gets when it shrinks without aliasing."""
    if not how.antialias:
        return 1.0
    return min(axis.scale, 1.0) if isinstance(axis.scale, float) else tf.minimum(axis.scale, 1.0)


def _reach(support: int, stretch: Any) -> int:
    if not isinstance(stretch, float):
        raise NotImplementedError("Resize with antialias needs sizes that are known before the run")
    return int(np.ceil(support / stretch))


def _source(axis: Axis, coordinates: str) -> Tensor:
    """Where in the source each entry of the target lies."""
    place = tf.cast(tf.range(axis.target), tf.float32)
    scale, size = tf.cast(axis.scale, tf.float32), tf.cast(axis.size, tf.float32)
    target = tf.cast(axis.target, tf.float32)
    if coordinates == "half_pixel":
        return (place + 0.5) / scale - 0.5
    if coordinates == "half_pixel_symmetric":
        adjustment = target / (scale * size)
        return size / 2 * (1 - adjustment) + (place + 0.5) / scale - 0.5
    if coordinates == "pytorch_half_pixel":
        return tf.where(target > 1, (place + 0.5) / scale - 0.5, tf.zeros_like(place))
    if coordinates == "align_corners":
        return tf.where(target > 1, place * (size - 1) / tf.maximum(target - 1, 1), tf.zeros_like(place))
    if coordinates == "asymmetric":
        return place / scale
    if coordinates == "tf_crop_and_resize":
        first, end = axis.region or (0.0, 1.0)
        inside = first * (size - 1) + place * (end - first) * (size - 1) / tf.maximum(target - 1, 1)
        return tf.where(target > 1, inside, tf.zeros_like(place) + 0.5 * (first + end) * (size - 1))
    raise NotImplementedError(f"Resize with coordinate_transformation_mode {coordinates!r}")


_ROUNDING: Mapping[str, Any] = {
    "round_prefer_floor": lambda x: tf.math.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: tf.floor(x + 0.5),
    "floor": tf.floor,
    "ceil": tf.math.ceil,
}


def _triangle(distance: Tensor) -> Tensor:
    return tf.maximum(1 - tf.abs(distance), 0)


def cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel with the parameter `a`."""
    d = tf.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return tf.where(d <= 1, near, tf.where(d < 2, far, tf.zeros_like(d)))
