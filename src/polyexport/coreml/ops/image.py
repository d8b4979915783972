"""Images: resizing and sampling the last two axes.

Each way to resize is a way to place the output's points on the input's axis; the reference gives the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyexport.coreml.ops.arguments import ints
from polyexport.errors import CannotRun

# --- resizing ---------------------------------------------------------------------------------------------------------


def _points(size: int, wanted: int, mode: str) -> Tensor:
    """Where on an axis of `size` the `wanted` output points lie."""
    steps = torch.arange(wanted, dtype=torch.float32)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if wanted == 1:
            return torch.full((1,), (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0)
        points = steps * ((size - 1) / (wanted - 1))
    elif mode == "DEFAULT":
        points = steps * (size / wanted)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / wanted
        points = 0.5 * delta + steps * delta
    elif mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * (size / wanted) - 0.5
    else:
        raise CannotRun(f"the MIL evaluator does not support the sampling mode {mode}")
    return points.clamp(0, size - 1)


def _linear(x: Tensor, axis: int, points: Tensor) -> Tensor:
    low = points.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    weight = (points - low).reshape([-1 if each == axis % x.ndim else 1 for each in range(x.ndim)])
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    across = _linear(x, -1, _points(x.shape[-1], width, mode))
    return _linear(across, -2, _points(x.shape[-2], height, mode))


def _nearest(x: Tensor, axis: int, wanted: int) -> Tensor:
    """By a whole factor up or down: for any other the reference does not say which pixel is the nearest."""
    size = x.shape[axis]
    if wanted % size and size % wanted:
        raise CannotRun(
            f"the MIL evaluator has no nearest resize of {size} to {wanted}, which is not by an integer factor"
        )
    return x.index_select(axis, torch.arange(wanted) * size // wanted)


def _scaled(x: Tensor, height: Tensor | float, width: Tensor | float) -> tuple[int, int]:
    return int(x.shape[-2] * float(height)), int(x.shape[-1] * float(width))


def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor | float = 1, scale_factor_width: Tensor | float = 1
) -> Tensor:
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return _nearest(_nearest(x, -2, height), -1, width)


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | float = 1,
    scale_factor_width: Tensor | float = 1,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | bool | None = None,
) -> Tensor:
    half = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    return _bilinear(x, *_scaled(x, scale_factor_height, scale_factor_width), mode)


def resize_nearest_neighbor(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
    return _nearest(_nearest(x, -2, int(target_size_height)), -1, int(target_size_width))


def resize_bilinear(
    x: Tensor,
    target_size_height: Tensor | int = 1,
    target_size_width: Tensor | int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    return _bilinear(x, int(target_size_height), int(target_size_width), sampling_mode)


def resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: Tensor,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes to the last sizes of `shape`; 0 keeps a size."""
    count = int(resized_dims)
    for axis, wanted in zip(range(-count, 0), ints(shape)[-count:], strict=True):
        size = x.shape[axis]
        if wanted in (0, size):
            continue
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, _points(size, wanted, sampling_mode))
        elif sampling_mode == "DEFAULT":
            x = _nearest(x, axis, wanted)
        else:
            raise CannotRun(f"the MIL evaluator does not support a nearest resize in sampling mode {sampling_mode}")
    return x


def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


# --- sampling ---------------------------------------------------------------------------------------------------------

_GRID = {"constant": ("zeros", True), "border": ("border", True), "reflection": ("reflection", True)} | {
    "symmetric": ("reflection", False)
}
"""By MIL's padding: PyTorch's, and whether its corners must be aligned to mean the same."""


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Tensor,
    coordinates_mode: str,
    align_corners: Tensor,
) -> Tensor:
    sizes = torch.tensor([x.shape[-1], x.shape[-2]], dtype=torch.float32)
    positions = coordinates.float()
    if coordinates_mode != "unnormalized":
        share = (positions + 1) / 2 if coordinates_mode == "normalized_minus_one_to_one" else positions
        positions = share * (sizes - 1) if align_corners else share * sizes - 0.5
    padding, aligned = _GRID[padding_mode]
    grid = 2 * positions / (sizes - 1).clamp(min=1) - 1 if aligned else (2 * positions + 1) / sizes - 1
    outside = float(padding_value) if padding_mode == "constant" else 0.0
    return functional.grid_sample(x - outside, grid, sampling_mode, padding, aligned) + outside


OPS = {
    each.__name__: each
    for each in (
        crop,
        resample,
        resize,
        resize_bilinear,
        resize_nearest_neighbor,
        upsample_bilinear,
        upsample_nearest_neighbor,
    )
}
