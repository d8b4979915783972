"""Compressed constants, and quantization at run time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from polyexport.coreml.ops.arguments import along, ints
from polyexport.errors import CannotRun


def _affine(x: Tensor, zero_point: Tensor | None, scale: Tensor, axis: Tensor | int | None) -> Tensor:
    dim = 0 if axis is None else int(axis)
    zero = 0 if zero_point is None else along(zero_point.float(), dim, x.ndim)
    return along(scale, dim, x.ndim) * (x.float() - zero)


def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    return _affine(quantized_data, zero_point, scale, axis)


def dequantize(
    input: Tensor,  # the op's own name
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    return _affine(input, zero_point, scale, axis)


def quantize(
    input: Tensor,  # the op's own name
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    dim = 0 if axis is None else int(axis)
    zero = 0 if zero_point is None else along(zero_point.float(), dim, input.ndim)
    low, high, dtype = (-128, 127, torch.int8) if output_dtype == "int8" else (0, 255, torch.uint8)
    return ((input / along(scale, dim, input.ndim)).round() + zero).clamp(low, high).to(dtype)


def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val.to({"fp32": torch.float32, "fp16": torch.float16}[output_dtype])


def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Each scale serves a block, whose sizes are those of the data over those of the scales."""
    zero = 0 if offset is None else _blown_up(offset.float(), data.shape)
    return _blown_up(scale, data.shape) * (data.float() - zero)


def _blown_up(x: Tensor, shape: torch.Size) -> Tensor:
    for axis, size in enumerate(shape):
        x = x.repeat_interleave(size // x.shape[axis], axis)
    return x


def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None
) -> Tensor:
    """Up to iOS 17 the indices are packed bits and `shape` tells theirs; later they are a tensor of one table each."""
    if shape is not None:
        sizes = ints(shape)
        bits = int(math.log2(lut.numel()))
        return lut[_unpacked(indices, bits, math.prod(sizes))].reshape(sizes)
    if lut.shape[-1] != 1:
        raise CannotRun("the MIL evaluator does not support lookup tables of vectors")
    tables = _blown_up_tables(lut.squeeze(-1), indices.shape)
    return torch.gather(tables, -1, indices.long().unsqueeze(-1)).squeeze(-1)


def _blown_up_tables(lut: Tensor, shape: torch.Size) -> Tensor:
    return _blown_up(lut, torch.Size([*shape, lut.shape[-1]]))


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of `bits` bits from bytes, least significant bits first."""
    single = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    return torch.from_numpy(single.astype(np.int64) @ (1 << np.arange(bits)))


def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Tensor | None = None) -> Tensor:
    """Up to iOS 17 the mask is packed bits and `shape` tells its shape; later it is a tensor."""
    if shape is not None:
        sizes = ints(shape)
        mask = _unpacked(mask, 1, math.prod(sizes)).reshape(sizes)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


OPS = {
    each.__name__: each
    for each in (
        constexpr_affine_dequantize,
        constexpr_blockwise_shift_scale,
        constexpr_cast,
        constexpr_lut_to_dense,
        constexpr_sparse_to_dense,
        dequantize,
        quantize,
    )
}
