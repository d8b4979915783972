"""Resize and Upsample in all of ONNX's modes, for any framework.

Every mode is a weighted sum of a few source elements for each result element, one axis after the other. Which elements,
and their weights, are constants where an axis is known before the run; else they are part of the graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Size, Tensor, is_float, is_known
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value

_SINGLE = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Axis:
    """One resized axis; values that are not known before the run are tensors. `scale` is the nominal one."""

    index: int
    size: Any
    target: Any
    scale: Any
    region: tuple[Any, Any] | None

    @property
    def is_known(self) -> bool:
        """Whether all of it is known before the run."""
        return all(is_known(each) for each in (self.size, self.target, self.scale, *(self.region or ())))


@dataclass(frozen=True, slots=True)
class Mode:
    """Resize's attributes on coordinates and weights, by ONNX's names."""

    mode: str = "nearest"
    coordinate_transformation_mode: str = "half_pixel"
    nearest_mode: str = "round_prefer_floor"
    cubic_coeff_a: float = -0.75
    antialias: int = 0
    exclude_outside: int = 0
    extrapolation_value: float = 0.0


def native_kind(x: Value, plan: list[Axis], how: Mode) -> tuple[list[int], str] | None:
    """The last two sizes of the result, and how a framework's own operator may compute it; None if it cannot.

    That is "nearest" by whole factors, or linear with "half_pixel", "align_corners" or "asymmetric" coordinates, of
    float32 images whose sizes are known before the run and scaled by exactly their ratio.
    """
    if x.rank != 4 or not plan or not {each.index for each in plan} <= {2, 3}:
        return None
    if x.dtype != np.float32 or not all(each.is_known for each in plan) or how.antialias or how.extrapolation_value:
        return None
    if not all(abs(each.size * each.scale - each.target) < 1e-4 for each in plan):
        return None
    sizes: dict[int, Any] = {each.index: each.target for each in plan}
    target: list[Any] = [sizes.get(axis, size) for axis, size in zip((2, 3), (x.shape or ())[2:], strict=True)]
    coordinates = how.coordinate_transformation_mode
    if None in target:
        return None
    if how.mode == "nearest":
        whole = all(each.target % each.size == 0 for each in plan)
        return (target, "nearest") if whole and (coordinates, how.nearest_mode) == ("asymmetric", "floor") else None
    if coordinates == "pytorch_half_pixel" and min(target) > 1:
        coordinates = "half_pixel"
    is_native = how.mode == "linear" and coordinates in ("half_pixel", "align_corners", "asymmetric")
    return (target, coordinates) if is_native else None


@SHARED.op("Resize", since=11)
def resize(
    ops: Backend,
    x: Value,
    roi: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
    *,
    axes: list[int] | None = None,
    keep_aspect_ratio_policy: str = "stretch",
    node: Node,
    **attributes: Any,
) -> Value:
    """By scales or by sizes."""
    chosen = [axis % (x.rank or 1) for axis in axes] if axes else list(range(x.rank or 0))
    if scales is not None and scales.shape == (0,):
        scales = None
    plan = _plan(ops, x, chosen, roi, scales, sizes, keep_aspect_ratio_policy)
    return _resized(ops, x, plan, Mode(**attributes), node)


@SHARED.op("Resize", "Upsample", since=7)
def upsample(ops: Backend, x: Value, scales: Value, *, mode: str = "nearest", node: Node) -> Value:
    """Before opset 11 a position is scaled without any shift, and rounded down."""
    plan = _plan(ops, x, list(range(x.rank or 0)), None, scales, None, "stretch")
    return _resized(ops, x, plan, Mode(mode, "asymmetric", "floor"), node)


# --- what becomes of each axis ----------------------------------------------------------------------------------------


def _plan(
    ops: Backend,
    x: Value,
    chosen: list[int],
    roi: Value | None,
    scales: Value | None,
    sizes: Value | None,
    policy: str,
) -> list[Axis]:
    own = [ops.sizes(x)[axis] for axis in chosen]
    if scales is not None:
        factors = _numbers(ops, scales, len(chosen))
        wanted = [(_floored(ops, size, scale), scale) for size, scale in zip(own, factors, strict=True)]
    else:
        wanted = _kept_aspect(ops, own, sizes, policy)
    regions = _regions(ops, roi, len(chosen))
    plan = zip(chosen, own, wanted, regions, strict=True)
    return [
        Axis(axis, size, *pair, region) for axis, size, pair, region in plan if not _is_batch(axis, size, sizes, x.rank)
    ]


def _is_batch(axis: int, size: Any, sizes: Value | None, rank: int | None) -> bool:
    """Whether it is an axis before the image's whose size and target are both unknown, unlike other targets.

    Exporters write the whole shape, and never resize batch or channels.
    """
    if is_known(size) or sizes is None or sizes.sizes is None or len(sizes.sizes) != rank:
        return False
    return axis < min(2, rank - 1) and sizes.sizes[axis] is None


def _floored(ops: Backend, size: Size, scale: Any) -> Size:
    if is_known(size) and is_known(scale):
        return int(np.floor(size * scale))
    if is_known(scale) and scale == int(scale):
        return size * int(scale)
    return ops.cast(ops.floor(ops.scalar(size, _SINGLE) * scale), ops.index)


def _kept_aspect(ops: Backend, own: list[Size], sizes: Value | None, policy: str) -> list[tuple[Size, Any]]:
    """Target and scale of each axis for the sizes asked for."""
    if sizes is None:
        return []
    entries = [None] * len(own) if sizes.sizes is None else list(sizes.sizes)
    wanted = [ops.cast(sizes.tensor[i], ops.index) if each is None else int(each) for i, each in enumerate(entries)]
    factors = [_ratio(ops, target, size) for target, size in zip(wanted, own, strict=True)]
    if policy == "stretch":
        return list(zip(wanted, factors, strict=True))
    if all(is_known(each) for each in factors):
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [(int(np.floor(size * factor + 0.5)), factor) for size in own]
    reduce = ops.minimum if policy == "not_larger" else ops.maximum
    shared = functools.reduce(reduce, [ops.scalar(each, _SINGLE) for each in factors])
    return [(ops.cast(ops.floor(ops.scalar(size, _SINGLE) * shared + 0.5), ops.index), shared) for size in own]


def _ratio(ops: Backend, target: Size, size: Size) -> Any:
    is_static = is_known(target) and is_known(size)
    return target / size if is_static else ops.scalar(target, _SINGLE) / ops.scalar(size, _SINGLE)


def _regions(ops: Backend, roi: Value | None, count: int) -> list[tuple[Any, Any] | None]:
    if roi is None or roi.shape == (0,):
        return [None] * count
    bounds = _numbers(ops, roi, 2 * count)
    return [(bounds[i], bounds[i + count]) for i in range(count)]


def _numbers(ops: Backend, vector: Value, count: int) -> list[Any]:
    """The elements of a vector of real numbers, each a scalar tensor if it is not known before the run."""
    if vector.known is not None:
        return [float(each) for each in vector.known]
    return [ops.cast(vector.tensor[i], _SINGLE) for i in range(count)]


# --- one axis after the other -----------------------------------------------------------------------------------------


def _resized(ops: Backend, x: Value, plan: list[Axis], how: Mode, node: Node) -> Value:
    plan = [each for each in plan if not _stays(each, how)]
    native: Value | None = ops.resize(x, plan, how)
    if native is not None:
        return native
    tensor, is_cast = x.stored, how.mode != "nearest" and not is_float(x.dtype)
    tensor = ops.cast(tensor, np.dtype(np.float32)) if is_cast else tensor
    for each in plan:
        tensor = _along(ops, tensor, x.placed(each.index), each, how)
    # integers are truncated towards zero, as ONNX's reference does
    return node.value(ops.cast(tensor, x.dtype) if is_cast else tensor, x.order)


def _stays(axis: Axis, how: Mode) -> bool:
    return is_known(axis.scale) and axis.scale == 1.0 and how.coordinate_transformation_mode != "tf_crop_and_resize"


def _along(ops: Backend, tensor: Tensor, position: int, axis: Axis, how: Mode) -> Tensor:
    indices, weights, outside = _constants(ops, axis, how) if axis.is_known else _taps(ops, axis, how)
    rank = len(ops.shape(tensor) or ())

    def spread(vector: Any, dtype: np.dtype[Any]) -> Tensor:
        is_array = isinstance(vector, np.ndarray)
        line = ops.constant(np.ascontiguousarray(vector.astype(dtype))) if is_array else ops.cast(vector, dtype)
        return ops.reshape(line, [-1] + [1] * (rank - position - 1))

    if weights is None:
        made = ops.gather(tensor, indices[:, 0], position)
    else:
        parts = [
            ops.gather(tensor, indices[:, i], position) * spread(weights[:, i], ops.dtype(tensor))
            for i in range(indices.shape[1])
        ]
        made = sum(parts[1:], parts[0])
    return made if outside is None else ops.where(spread(~outside, np.dtype(bool)), made, how.extrapolation_value)


def _constants(ops: Backend, axis: Axis, how: Mode) -> tuple[Any, Any, Any]:
    """The same as `_taps` of an axis that is known before the run, as numpy arrays."""
    indices, weights, outside = ops.evaluate(lambda: _taps(ops, axis, how))
    return indices.astype(np.int32), weights, outside


def _taps(ops: Backend, axis: Axis, how: Mode) -> tuple[Any, Any, Any]:
    """Source elements and weights `(target, taps)` of one axis, and which elements lie outside; None for not at all."""
    source = _source(ops, axis, how.coordinate_transformation_mode)
    size = ops.scalar(axis.size, _SINGLE)
    outside = (source < 0) | (source > size - 1) if how.coordinate_transformation_mode == "tf_crop_and_resize" else None
    if how.mode == "nearest":
        return _within(ops, _rounded(ops, source, how.nearest_mode), size)[:, None], None, outside
    stretch = _stretch(ops, axis, how)
    reach = _reach(1 if how.mode == "linear" else 2, stretch)
    offsets = ops.cast(ops.range(1 - reach, 1 + reach), _SINGLE)
    column = source[:, None]
    positions = ops.floor(column) + offsets[None, :]
    distance = (positions - column) * stretch
    weights = ops.maximum(1 - abs(distance), 0.0) if how.mode == "linear" else cubic(ops, distance, how.cubic_coeff_a)
    if how.exclude_outside:
        weights = ops.where((positions >= 0) & (positions <= size - 1), weights, 0.0)
    if how.exclude_outside or how.antialias:
        weights = weights / ops.sum(weights, [1], True)
    return _within(ops, positions, size), weights, outside


def _within(ops: Backend, positions: Tensor, size: Tensor) -> Tensor:
    return ops.cast(ops.minimum(ops.maximum(positions, 0.0), size - 1), ops.index)


def _stretch(ops: Backend, axis: Axis, how: Mode) -> Any:
    """How much wider the filter gets when it shrinks without aliasing."""
    if not how.antialias:
        return 1.0
    return min(axis.scale, 1.0) if is_known(axis.scale) else ops.minimum(axis.scale, 1.0)


def _reach(support: int, stretch: Any) -> int:
    if not is_known(stretch):
        raise NotImplementedError("Resize with antialias needs a height and a width that are known before the run")
    return int(np.ceil(support / stretch))


def _source(ops: Backend, axis: Axis, coordinates: str) -> Tensor:
    """Where in the source each element of the target lies."""
    position = ops.cast(ops.range(0, axis.target), _SINGLE)
    scale, size, target = (ops.scalar(each, _SINGLE) for each in (axis.scale, axis.size, axis.target))
    if coordinates == "half_pixel":
        return (position + 0.5) / scale - 0.5
    if coordinates == "half_pixel_symmetric":
        return size / 2 * (1 - target / (scale * size)) + (position + 0.5) / scale - 0.5
    if coordinates == "pytorch_half_pixel":
        return ops.where(target > 1, (position + 0.5) / scale - 0.5, 0.0)
    if coordinates == "align_corners":
        return ops.where(target > 1, position * (size - 1) / ops.maximum(target - 1, 1.0), 0.0)
    if coordinates == "asymmetric":
        return position / scale
    if coordinates == "tf_crop_and_resize":
        first, end = (ops.scalar(each, _SINGLE) for each in axis.region or (0.0, 1.0))
        inside = first * (size - 1) + position * (end - first) * (size - 1) / ops.maximum(target - 1, 1.0)
        return ops.where(target > 1, inside, 0.5 * (first + end) * (size - 1))
    raise NotImplementedError(f"Resize with coordinate_transformation_mode {coordinates!r}")


def _rounded(ops: Backend, source: Tensor, how: str) -> Tensor:
    match how:
        case "round_prefer_floor":
            return ops.ceil(source - 0.5)
        case "round_prefer_ceil":
            return ops.floor(source + 0.5)
        case "floor":
            return ops.floor(source)
        case "ceil":
            return ops.ceil(source)
    raise NotImplementedError(f"Resize with nearest_mode {how!r}")


def cubic(ops: Backend, distance: Tensor, a: float) -> Tensor:
    """Keys' kernel with the parameter `a`."""
    d = abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return ops.where(d <= 1, near, ops.where(d < 2, far, 0.0))
