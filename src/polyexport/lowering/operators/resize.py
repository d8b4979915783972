"""Resize and Upsample in all of ONNX's modes, for any framework.

Every mode is a weighted sum of a few source elements for each result element, one axis after the other. Known sizes are
computed now by numpy; others at run time by the framework.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor, is_float, is_known
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """Functions that numpy computes if their inputs are known before the run, else the framework.

    Attributes:
        floor: Element by element, as are ceil, maximum and minimum.
        ceil: See floor.
        maximum: See floor; of two tensors, or of a tensor and a number.
        minimum: See maximum.
        where: The second where the first is true, else the third, which may be a number.
        line: The float32 numbers from 0 up to a size.
        real: In float32.
        whole: In integers, as `gather` takes them.
        total: The sum along axis 1, which stays.
    """

    floor: Callable[[Any], Any]
    ceil: Callable[[Any], Any]
    maximum: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    line: Callable[[Any], Any]
    real: Callable[[Any], Any]
    whole: Callable[[Any], Any]
    total: Callable[[Any], Any]


_NUMPY = _Arithmetic(
    floor=np.floor,
    ceil=np.ceil,
    maximum=np.maximum,
    minimum=np.minimum,
    where=lambda condition, this, that: np.where(condition, this, np.float32(that)),
    line=lambda count: np.arange(count, dtype=np.float32),
    real=np.float32,
    whole=lambda x: np.asarray(x).astype(np.int32),
    total=lambda x: x.sum(1, keepdims=True),
)


def _arithmetic(ops: Backend) -> _Arithmetic:
    single = np.dtype(np.float32)

    def real(number: Any) -> Tensor:
        return ops.scalar(number, single)

    return _Arithmetic(
        floor=ops.floor,
        ceil=ops.ceil,
        maximum=ops.maximum,
        minimum=ops.minimum,
        where=ops.where,
        line=lambda count: ops.cast(ops.range(0, count), single),
        real=real,
        whole=lambda x: ops.cast(x, ops.index),
        total=lambda x: ops.sum(x, [1], True),
    )


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
    of = _arithmetic(ops)
    own = [ops.sizes(x)[axis] for axis in chosen]
    if scales is not None:
        factors = [
            of.real(scales.tensor[position]) if scales.known is None else float(scales.known[position])
            for position in range(len(chosen))
        ]
        wanted = [(_floored(size, scale, of), scale) for size, scale in zip(own, factors, strict=True)]
    else:
        wanted = _kept_aspect(own, sizes, policy, of)
    regions = _regions(roi, len(chosen), of)
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


def _floored(size: Any, scale: Any, of: _Arithmetic) -> Any:
    if is_known(size) and is_known(scale):
        return int(np.floor(size * scale))
    if is_known(scale) and scale == int(scale):
        return size * int(scale)
    return of.whole(of.floor(of.real(size) * scale))


def _kept_aspect(own: list[Any], sizes: Value | None, policy: str, of: _Arithmetic) -> list[tuple[Any, Any]]:
    """Target and scale of each axis for the sizes asked for."""
    if sizes is None:
        return []
    entries = [None] * len(own) if sizes.sizes is None else list(sizes.sizes)
    wanted = [of.whole(sizes.tensor[i]) if each is None else int(each) for i, each in enumerate(entries)]
    factors = [_ratio(target, size, of) for target, size in zip(wanted, own, strict=True)]
    if policy == "stretch":
        return list(zip(wanted, factors, strict=True))
    if all(is_known(each) for each in factors):
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [(int(np.floor(size * factor + 0.5)), factor) for size in own]
    reduce = of.minimum if policy == "not_larger" else of.maximum
    shared = functools.reduce(reduce, [of.real(each) for each in factors])
    return [(of.whole(of.floor(of.real(size) * shared + 0.5)), shared) for size in own]


def _ratio(target: Any, size: Any, of: _Arithmetic) -> Any:
    return target / size if is_known(target) and is_known(size) else of.real(target) / of.real(size)


def _regions(roi: Value | None, count: int, of: _Arithmetic) -> list[tuple[Any, Any] | None]:
    if roi is None or roi.shape == (0,):
        return [None] * count
    bounds = [of.real(roi.tensor[i]) if roi.known is None else float(roi.known[i]) for i in range(2 * count)]
    return [(bounds[i], bounds[i + count]) for i in range(count)]


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
    indices, weights, outside = _taps(axis, how, _NUMPY if axis.is_known else _arithmetic(ops))
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


def _taps(axis: Axis, how: Mode, of: _Arithmetic) -> tuple[Any, Any, Any]:
    """Source entries and weights `(target, taps)` of one axis, and which entries lie outside; None for not at all."""
    source = _source(axis, how.coordinate_transformation_mode, of)
    size = of.real(axis.size)
    outside = (source < 0) | (source > size - 1) if how.coordinate_transformation_mode == "tf_crop_and_resize" else None
    if how.mode == "nearest":
        return _within(_rounded(source, how.nearest_mode, of), size, of)[:, None], None, outside
    stretch = _stretch(axis, how, of)
    reach = _reach(1 if how.mode == "linear" else 2, stretch)
    offsets = of.line(2 * reach) + of.real(1 - reach)
    column = source[:, None]
    positions = of.floor(column) + offsets[None, :]
    distance = (positions - column) * stretch
    weights = (
        of.maximum(1 - abs(distance), 0.0) if how.mode == "linear" else cubic(distance, how.cubic_coeff_a, of.where)
    )
    if how.exclude_outside:
        weights = of.where((positions >= 0) & (positions <= size - 1), weights, 0.0)
    if how.exclude_outside or how.antialias:
        weights = weights / of.total(weights)
    return _within(positions, size, of), weights, outside


def _within(positions: Any, size: Any, of: _Arithmetic) -> Any:
    return of.whole(of.minimum(of.maximum(positions, 0.0), size - 1))


def _stretch(axis: Axis, how: Mode, of: _Arithmetic) -> Any:
    """How much wider the filter gets when it shrinks without aliasing."""
    if not how.antialias:
        return 1.0
    return min(axis.scale, 1.0) if is_known(axis.scale) else of.minimum(axis.scale, 1.0)


def _reach(support: int, stretch: Any) -> int:
    if not is_known(stretch):
        raise NotImplementedError("Resize with antialias needs a height and a width that are known before the run")
    return int(np.ceil(support / stretch))


def _source(axis: Axis, coordinates: str, of: _Arithmetic) -> Any:
    """Where in the source each entry of the target lies."""
    position = of.line(axis.target)
    scale, size, target = of.real(axis.scale), of.real(axis.size), of.real(axis.target)
    if coordinates == "half_pixel":
        return (position + 0.5) / scale - 0.5
    if coordinates == "half_pixel_symmetric":
        return size / 2 * (1 - target / (scale * size)) + (position + 0.5) / scale - 0.5
    if coordinates == "pytorch_half_pixel":
        return of.where(target > 1, (position + 0.5) / scale - 0.5, 0.0)
    if coordinates == "align_corners":
        return of.where(target > 1, position * (size - 1) / of.maximum(target - 1, 1.0), 0.0)
    if coordinates == "asymmetric":
        return position / scale
    if coordinates == "tf_crop_and_resize":
        first, end = (of.real(each) for each in axis.region or (0.0, 1.0))
        inside = first * (size - 1) + position * (end - first) * (size - 1) / of.maximum(target - 1, 1.0)
        return of.where(target > 1, inside, 0.5 * (first + end) * (size - 1))
    raise NotImplementedError(f"Resize with coordinate_transformation_mode {coordinates!r}")


def _rounded(source: Any, how: str, of: _Arithmetic) -> Any:
    found: Mapping[str, Callable[[], Any]] = {
        "round_prefer_floor": lambda: of.ceil(source - 0.5),
        "round_prefer_ceil": lambda: of.floor(source + 0.5),
        "floor": lambda: of.floor(source),
        "ceil": lambda: of.ceil(source),
    }
    return found[how]()


def cubic(distance: Any, a: float, where: Callable[[Any, Any, Any], Any]) -> Any:
    """Keys' kernel with the parameter `a`."""
    d = abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return where(d <= 1, near, where(d < 2, far, 0.0))
