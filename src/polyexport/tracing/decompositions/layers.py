"""Layers and their functions: embeddings, pools, convolutions, distances, sparse products, fake quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    import torch

    return {
        torch.nn.functional.embedding_bag: embedding_bag,
        torch.nn.functional.adaptive_avg_pool1d: adaptive_avg_pool1d,
        torch.nn.functional.adaptive_avg_pool2d: adaptive_avg_pool2d,
        torch.adaptive_avg_pool1d: adaptive_avg_pool1d,
        torch.conv_transpose3d: conv_transpose3d,
        torch.cdist: cdist,
        torch.fake_quantize_per_tensor_affine: fake_quantize,
        torch.fake_quantize_per_channel_affine: fake_quantize_channels,
        torch.sparse.mm: sparse_product,
        torch.Tensor.coalesce: lambda x: x.coalesce() if x.is_sparse else x,  # sparse tensors are dense in a trace
        torch.Tensor.to_dense: lambda x: x if x.layout is torch.strided else x.to_dense(),
    }


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.embedding_bag` by lookup and reduction; bags are rows, or begin at `offsets`."""
    import torch

    if max_norm is not None:  # it changes the weights in place
        return torch.nn.functional.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    rows = torch.nn.functional.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    member = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        member = input != padding_idx % weight.shape[0]
    if offsets is not None:  # the bag of each row, then each row once per bag
        starts = offsets[:-1] if include_last_offset else offsets
        bag = (torch.arange(input.shape[0]).unsqueeze(1) >= starts).sum(1) - 1
        member = member & (bag == torch.arange(starts.shape[0]).unsqueeze(1))
        rows = rows.unsqueeze(0)
    kept = member.unsqueeze(-1)
    if mode == "max":
        greatest = torch.where(kept, rows, torch.full_like(rows, -torch.inf)).amax(1)
        return torch.where(member.any(1, keepdim=True), greatest, torch.zeros_like(greatest))
    total = torch.where(kept, rows, torch.zeros_like(rows)).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp(min=1).to(total.dtype)


def fake_quantize(x: torch.Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> torch.Tensor:
    """`torch.fake_quantize_per_tensor_affine`, which `torch.export` refuses for dynamic sizes."""
    steps = (x * (1 / scale) + zero_point).round().clamp(quant_min, quant_max)
    return (steps - zero_point) * scale  # type: ignore[no-any-return]  # the scale is a number or a tensor


def fake_quantize_channels(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, quant_min: int, quant_max: int
) -> torch.Tensor:
    """`torch.fake_quantize_per_channel_affine`."""
    shape = [-1 if index == axis % x.dim() else 1 for index in range(x.dim())]
    return fake_quantize(x, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)


_MANY = 25  # number of rows above which PyTorch uses a matrix product for Euclidean distances


def cdist(
    x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> torch.Tensor:
    """`torch.cdist`, by differences, or for many rows by a matrix product as PyTorch does."""
    import torch

    counts = (x1.shape[-2], x2.shape[-2])
    many = any(isinstance(count, int) and count > _MANY for count in counts) and compute_mode != _NEVER
    if p == 2 and (many or compute_mode == "use_mm_for_euclid_dist"):
        squares = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1).unsqueeze(-2)
        return (squares - 2 * (x1 @ x2.transpose(-1, -2))).clamp(min=0).sqrt()
    away = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p in (1, 2):
        return away.sum(-1) if p == 1 else away.square().sum(-1).sqrt()
    if p == float("inf"):
        return away.amax(-1)
    return torch.cdist(x1, x2, p, compute_mode)


_NEVER = "donot_use_mm_for_euclid_dist"


def sparse_product(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.sparse.mm`, also of dense tensors."""
    import torch

    dense = x.layout is torch.strided and other.layout is torch.strided
    return x @ other if dense else torch.sparse.mm(x, other)


def adaptive_avg_pool1d(x: torch.Tensor, output_size: Any) -> torch.Tensor:
    """`torch.nn.functional.adaptive_avg_pool1d` as a matrix product, if a known size is no multiple of the new one."""
    import torch

    wanted = output_size if isinstance(output_size, list | tuple) else [output_size]
    if not _are_uneven(x.shape[-1:], wanted):
        return torch.nn.functional.adaptive_avg_pool1d(x, output_size)
    return x @ _means(x.shape[-1], wanted[0]).to(x).t()


def adaptive_avg_pool2d(x: torch.Tensor, output_size: Any) -> torch.Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d` as two, along rows and columns."""
    import torch

    wanted = output_size if isinstance(output_size, list | tuple) else [output_size] * 2
    if not _are_uneven(x.shape[-2:], wanted):
        return torch.nn.functional.adaptive_avg_pool2d(x, output_size)
    rows, columns = (_means(*pair).to(x) for pair in zip(x.shape[-2:], wanted, strict=True))
    return rows @ (x @ columns.t())


def _are_uneven(sizes: Any, wanted: Any) -> bool:
    """Whether parts overlap, which converters write as lookups of many axes; not for sizes known only at run time."""
    known = all(type(size) is int for size in (*sizes, *wanted))
    return known and any(size % count for size, count in zip(sizes, wanted, strict=True))


def _means(size: int, wanted: int) -> torch.Tensor:
    """The matrix `(wanted, size)` of means of nearly equal parts, as a constant of the graph."""
    import torch

    parts = [(part * size // wanted, -(-(part + 1) * size // wanted)) for part in range(wanted)]
    return torch.tensor([[(start <= at < end) / (end - start) for at in range(size)] for start, end in parts])


def conv_transpose3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor:
    """`torch.conv_transpose3d` with its output cropped by slices, where Core ML's converter cannot crop otherwise."""
    import torch

    cut, more = ((sizes,) * 3 if isinstance(sizes, int) else tuple(sizes) for sizes in (padding, output_padding))
    if not any(more) or any(extra > edge for edge, extra in zip(cut, more, strict=True)):
        return torch.conv_transpose3d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    whole = torch.conv_transpose3d(x, weight, bias, stride, 0, 0, groups, dilation)
    for axis, (edge, extra) in enumerate(zip(cut, more, strict=True), x.dim() - 3):
        whole = whole.narrow(axis, edge, whole.shape[axis] - 2 * edge + extra)
    return whole
