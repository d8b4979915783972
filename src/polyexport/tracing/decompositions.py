"""Functions that tracers or converters do not support, decomposed into supported ones while a module is traced.

Requirements:
* The reference is computed without these decompositions, so that parity judges them too.
* A call is decomposed only if the result stays the same; every other call is left unchanged.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.errors import line
from polyexport.tracing import bits, packed
from polyexport.tracing.einsum import einsum
from polyexport.tracing.reads import caller_site, named, note_frozen

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Disable the fused inference path of `torch.nn`'s transformers, which only PyTorch supports.

    Results are the same except at positions that `src_key_padding_mask` masks: the fused path fills them with zeros,
    and training does not. Masks are not compared with the causal one either, which a trace cannot follow.
    """
    import torch
    from torch.nn.modules import transformer

    fused, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask

    def given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = given
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """Plain attention, and every function of the table below decomposed."""
    import torch
    from torch.overrides import TorchFunctionMode

    functions: Mapping[Any, Callable[..., Any]] = {
        torch.Tensor.data.__get__: lambda x: x.detach(),  # type: ignore[attr-defined]  # of a property; no trace follows it
        torch.nn.functional.embedding_bag: embedding_bag,
        torch.cdist: cdist,
        torch.fake_quantize_per_tensor_affine: fake_quantize,
        torch.fake_quantize_per_channel_affine: fake_quantize_channels,
        torch.eye: eye,
        torch.linspace: linspace,
        torch.diag_embed: diag_embed,
        torch.Tensor.diag_embed: diag_embed,
        torch.scatter_reduce: scatter_reduce,
        torch.Tensor.scatter_reduce: scatter_reduce,
        torch.Tensor.scatter_reduce_: lambda x, *rest, **more: x.copy_(scatter_reduce(x, *rest, **more)),
        torch.Tensor.unfold: unfold,
        torch.bucketize: bucketize,
        torch.searchsorted: searchsorted,
        torch.nn.functional.one_hot: one_hot,
        torch.sparse.mm: sparse_product,
        torch.Tensor.coalesce: lambda x: x.coalesce() if x.is_sparse else x,  # sparse tensors are dense in a trace
        torch.Tensor.to_dense: lambda x: x if x.layout is torch.strided else x.to_dense(),
        torch.diagonal: diagonal,
        torch.Tensor.diagonal: diagonal,
        torch.cumprod: cumprod,
        torch.Tensor.cumprod: cumprod,
        torch.cummax: cummax,
        torch.Tensor.cummax: cummax,
        torch.cummin: cummin,
        torch.Tensor.cummin: cummin,
        torch.masked_scatter: masked_scatter,
        torch.Tensor.masked_scatter: masked_scatter,
        torch.Tensor.masked_scatter_: lambda x, *rest, **more: x.copy_(masked_scatter(x, *rest, **more)),
        torch.quantile: quantile,
        torch.Tensor.quantile: quantile,
        torch.median: median,
        torch.Tensor.median: median,
        **bits.functions(),
        **{function: truth(function) for name, truth in _TRUTHS.items() for function in _both_ways(name)},
        torch.Tensor.bool: lambda x: as_type(x, torch.bool),
        torch.Tensor.to: as_type,
        torch.argsort: argsort,
        torch.Tensor.argsort: argsort,
        torch.mode: mode,
        torch.Tensor.mode: mode,
        torch.topk: topk,
        torch.Tensor.topk: topk,
        torch.kthvalue: kthvalue,
        torch.Tensor.kthvalue: kthvalue,
        torch.movedim: movedim,
        torch.Tensor.movedim: movedim,
        torch.nn.functional.pad: pad,
        torch.nn.functional.adaptive_avg_pool1d: adaptive_avg_pool1d,
        torch.nn.functional.adaptive_avg_pool2d: adaptive_avg_pool2d,
        torch.adaptive_avg_pool1d: adaptive_avg_pool1d,
        torch.take_along_dim: take_along_dim,
        torch.Tensor.take_along_dim: take_along_dim,
        torch.conv_transpose3d: conv_transpose3d,
        **dict.fromkeys((torch.atan2, torch.arctan2, torch.Tensor.atan2, torch.Tensor.arctan2), atan2),
        **dict.fromkeys((torch.heaviside, torch.Tensor.heaviside), heaviside),
        **dict.fromkeys((torch.copysign, torch.Tensor.copysign), copysign),
        **dict.fromkeys((torch.fmax, torch.Tensor.fmax), lambda x, other: _without_nan(torch.maximum, x, other)),
        **dict.fromkeys((torch.fmin, torch.Tensor.fmin), lambda x, other: _without_nan(torch.minimum, x, other)),
        **dict.fromkeys((torch.nansum, torch.Tensor.nansum), nansum),
        **dict.fromkeys((torch.nanmean, torch.Tensor.nanmean), nanmean),
        **dict.fromkeys((torch.count_nonzero, torch.Tensor.count_nonzero), count_nonzero),
        **{function: _of_truth(function) for function in (torch.any, torch.Tensor.any, torch.all, torch.Tensor.all)},
        torch.hypot: lambda x, other: (x * x + other * other).sqrt(),
        torch.einsum: einsum,
        **packed.functions(),
        torch.sum: total,
        torch.Tensor.sum: total,
        **{made: _of_long_sizes(made, 0, None) for made in (torch.zeros, torch.ones, torch.empty, torch.rand)},
        torch.full: _of_long_sizes(torch.full, 0, 1),
        torch.Tensor.new_full: _of_long_sizes(torch.Tensor.new_full, 1, 2),
        **{
            method: _of_long_sizes(method, 1, None)
            for method in (
                torch.Tensor.new_zeros,
                torch.Tensor.new_ones,
                torch.Tensor.new_empty,
                torch.Tensor.view,
                torch.Tensor.reshape,
                torch.Tensor.expand,
                torch.Tensor.repeat,
            )
        },
    }

    class Decomposed(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            note_frozen(function)
            written, given = functions.get(function, function), dict(kwargs or {})
            if written is not function:
                signature = inspect.signature(written)
                named = {
                    "x" if name == "input" and "x" in signature.parameters else name: given[name] for name in given
                }
                with contextlib.suppress(TypeError):  # called with arguments that are not supported below
                    signature.bind(*args, **named)
                    return written(*args, **named)
            with _errors_end_a_trace(function):
                return function(*args, **given)

    with plain_attention(), packed.sizes_unchecked(), Decomposed():
        try:
            yield
        except _TraceEnded as error:
            raise RuntimeError(str(error)) from error.__cause__


class _TraceEnded(BaseException):
    """An error ended a trace; no Exception, so that forward does not catch it."""


@contextlib.contextmanager
def _errors_end_a_trace(function: Any) -> Iterator[None]:
    """Raise `_TraceEnded` for an error in an operator while torch.jit traces, since it kills the process later."""
    import torch

    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
    try:
        yield
    except Exception as error:  # operators raise many types
        if is_traced and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # as above
            name, site = getattr(function, "__name__", "an operator"), named({caller_site()})
            raise _TraceEnded(
                f"{name} raises at {site} ({line(error, 200)}), which ends a trace also where forward catches it; use "
                "a function that does not raise, such as torch.linalg.cholesky_ex, and torch.where"
            ) from error
        raise


# --- the functions, each with PyTorch's own signature -----------------------------------------------------------------


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


def diag_embed(x: torch.Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> torch.Tensor:
    """`torch.diag_embed` on the main diagonal of two last axes by `where`, which needs no shape."""
    import torch

    if offset or (dim1, dim2) != (-2, -1):
        return torch.diag_embed(x, offset, dim1, dim2)
    rows = x.unsqueeze(-1).expand(*x.shape, x.shape[-1])
    return torch.where(torch.eye(x.shape[-1], dtype=torch.bool), rows, torch.zeros_like(rows))


def eye(n: Any, m: Any = None, *, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
    """`torch.eye` of a dynamic size by a comparison of indices."""
    import torch

    if all(type(size) is int for size in (n, n if m is None else m)):
        return torch.eye(n, n if m is None else m, dtype=dtype, **more)
    rows, columns = torch.arange(n), torch.arange(n if m is None else m)
    return (rows.unsqueeze(1) == columns).to(dtype or torch.get_default_dtype())


def linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
    """`torch.linspace` of a dynamic size, which `torch.export` makes a constant, as multiples of the distance."""
    import torch

    if type(steps) is int:
        return torch.linspace(start, end, steps, dtype=dtype, **more)
    greatest: Callable[..., Any] = torch.sym_max
    last = greatest(steps - 1, 1) if isinstance(steps, torch.SymInt) else (steps - 1).clamp(min=1)
    places = torch.arange(steps, dtype=dtype or torch.get_default_dtype())
    return torch.add(places * ((end - start) / last), start)


def atan2(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.atan2` by `atan`; exporters to ONNX, which lacks it, turn by -π where `x` is 0 and `other` negative."""
    import torch

    upright = torch.where(x > 0, math.pi / 2, torch.where(x < 0, -math.pi / 2, 0.0))
    angle = torch.atan(x / torch.where(other == 0, 1.0, other))
    turned = angle + torch.where(x < 0, -math.pi, math.pi)
    return torch.where(other == 0, upright, torch.where(other < 0, turned, angle))


def heaviside(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`torch.heaviside`, which converters lack."""
    import torch

    return torch.where(x == 0, values, (x > 0).to(values.dtype))


def copysign(x: torch.Tensor, other: Any) -> torch.Tensor:
    """`torch.copysign` of a tensor without negative zeros, of which most runtimes cannot see the sign."""
    import torch

    if not isinstance(other, torch.Tensor) or not x.is_floating_point():
        return torch.copysign(x, other)
    return torch.where(other < 0, -x.abs(), x.abs())


def _without_nan(greater: Callable[..., torch.Tensor], x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.fmax` or `torch.fmin`: of a number and NaN the number."""
    import torch

    return torch.where(torch.isnan(x), other, torch.where(torch.isnan(other), x, greater(x, other)))


def nansum(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """`torch.nansum` as the sum with 0 in place of NaN."""
    import torch

    return torch.where(torch.isnan(x), torch.zeros_like(x), x).sum(*rest, **more)


def nanmean(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """`torch.nanmean` as the sum over the count of what is not NaN."""
    import torch

    counted = torch.where(torch.isnan(x), torch.zeros_like(x), torch.ones_like(x))
    return nansum(x, *rest, **more) / counted.sum(*rest, **more)


def count_nonzero(x: torch.Tensor, dim: Any = None) -> torch.Tensor:
    """`torch.count_nonzero` as a sum."""
    import torch

    other = (x != 0).to(torch.int64)
    return other.sum() if dim is None else other.sum(dim)


def _of_truth(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.any` or `torch.all` of booleans; Core ML's converter takes other elements for them as they are."""

    def apply(x: torch.Tensor, *rest: Any, **more: Any) -> Any:
        import torch

        kept = x.dtype in (torch.bool, torch.uint8)  # of uint8 the result is not a boolean
        return function(x if kept else x != 0, *rest, **more)

    return apply


def scatter_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor, reduce: str, *, include_self: bool = True
) -> torch.Tensor:
    """`torch.scatter_reduce` without mean, and with each element among its own sources, as in ONNX."""
    import torch

    if reduce == "prod" or not x.is_floating_point():
        return torch.scatter_reduce(x, dim, index, src, reduce, include_self=include_self)
    count = torch.zeros_like(x).scatter_add(dim, index, torch.ones_like(src))
    least = {"amax": -torch.inf, "amin": torch.inf}.get(reduce, 0.0)
    own = x if include_self else torch.where(count > 0, torch.full_like(x, least), x)
    if reduce in ("amax", "amin"):
        return torch.scatter_reduce(own, dim, index, src, reduce)
    total = own.scatter_add(dim, index, src)
    if reduce == "sum":
        return total
    return total / (count + 1 if include_self else count.clamp(min=1))


def unfold(x: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    """`Tensor.unfold` by lookup: windows in place of an axis, their elements in a new last axis."""
    import torch

    axis = dimension % x.dim()
    starts = torch.arange(0, x.shape[axis] - size + 1, step)
    places = starts.unsqueeze(1) + torch.arange(size)
    return movedim(movedim(x, axis, -1)[..., places], -2, axis)


def bucketize(
    input: torch.Tensor, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False
) -> torch.Tensor:
    """`torch.bucketize` by counting the smaller boundaries."""
    return searchsorted(boundaries, input, out_int32=out_int32, right=right)


def searchsorted(
    sorted_sequence: torch.Tensor,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.searchsorted` by counting the smaller elements, or for `right` those not greater; NaN is last."""
    import torch

    if sorter is not None or not isinstance(input, torch.Tensor):
        return torch.searchsorted(sorted_sequence, input, out_int32=out_int32, right=right, side=side, sorter=sorter)
    entries = sorted_sequence if sorted_sequence.dim() == 1 else sorted_sequence.unsqueeze(-2)
    value = input.unsqueeze(-1)
    above = entries > value if right or side == "right" else entries >= value
    count = above.logical_not().to(torch.int64).sum(-1)  # NaN comes last
    return count.to(torch.int32) if out_int32 else count


def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`torch.nn.functional.one_hot`; without a count of classes it is one more than the greatest of the data."""
    import torch

    if num_classes != -1:
        return torch.nn.functional.one_hot(tensor, num_classes)
    size: Any = tensor.max() + 1  # as a tensor, or the tracer would take it for a constant
    return (tensor.unsqueeze(-1) == torch.arange(size)).to(torch.int64)


def sparse_product(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.sparse.mm`, also of dense tensors."""
    import torch

    dense = x.layout is torch.strided and other.layout is torch.strided
    return x @ other if dense else torch.sparse.mm(x, other)


def diagonal(x: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    """`torch.diagonal` by lookup, if the sizes are known."""
    import torch

    sizes = x.shape[dim1], x.shape[dim2]
    if not all(type(size) is int for size in sizes):  # dynamic, or a traced value
        return torch.diagonal(x, offset, dim1, dim2)
    rows = torch.arange(max(0, -offset), max(0, -offset, min(sizes[0], sizes[1] - offset)))
    return movedim(x, (dim1, dim2), (-2, -1))[..., rows, rows + offset]


_LONGEST = 512  # elements; the decomposition needs a square matrix of this size


def cumprod(x: torch.Tensor, dim: int, **more: Any) -> torch.Tensor:
    """`torch.cumprod` as products of the first, the first two … elements; the TorchScript exporter lacks it."""
    import torch

    count = int(x.shape[dim]) if not isinstance(x.shape[dim], torch.SymInt) else _LONGEST + 1
    if more or count > _LONGEST or not x.is_floating_point():
        return torch.cumprod(x, dim, **more)
    first = torch.ones(count, count, dtype=torch.bool).tril()
    moved = movedim(x, dim, -1).unsqueeze(-2)
    return movedim(torch.where(first, moved, torch.ones_like(moved)).prod(-1), -1, dim)


def cummax(x: torch.Tensor, dim: int) -> Any:
    """`torch.cummax` as the maximum of the first, the first two … elements, and the index of its last occurrence."""
    import torch

    count = int(x.shape[dim]) if not isinstance(x.shape[dim], torch.SymInt) else _LONGEST + 1
    if count > _LONGEST or not x.is_floating_point():
        return torch.cummax(x, dim)
    first = torch.ones(count, count, dtype=torch.bool).tril()
    moved = movedim(x, dim, -1).unsqueeze(-2)
    values = torch.where(first, moved, torch.full_like(moved, -torch.inf)).amax(-1)
    greatest = torch.logical_and(first, moved == values.unsqueeze(-1))
    indices = torch.where(greatest, torch.arange(count), torch.zeros(count, dtype=torch.int64)).amax(-1)
    return torch.return_types.cummax((movedim(values, -1, dim), movedim(indices, -1, dim)))


def cummin(x: torch.Tensor, dim: int) -> Any:
    """`torch.cummin` as `cummax` of the negated tensor."""
    import torch

    if not x.is_floating_point():
        return torch.cummin(x, dim)
    values, indices = cummax(-x, dim)
    return torch.return_types.cummin((-values, indices))


def masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`torch.masked_scatter` by lookup: the nth position where the mask is set gets the nth element of `source`."""
    import torch

    x, mask = torch.broadcast_tensors(x, mask)  # type: ignore[no-untyped-call]  # untyped in torch
    index = (mask.flatten().to(torch.int64).cumsum(0) - 1).clamp(min=0)
    return torch.where(mask, source.flatten()[index].reshape(mask.shape), x)


def quantile(
    x: torch.Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> torch.Tensor:
    """`torch.quantile` by interpolation between two sorted elements, without NaN."""
    import torch

    if isinstance(q, torch.Tensor) or interpolation != "linear":
        return torch.quantile(x, q, dim, keepdim, interpolation=interpolation)
    moved = x.flatten() if dim is None else movedim(x, dim, -1)
    place = q * (int(moved.shape[-1]) - 1)
    ordered, low = moved.sort(-1).values, int(place)
    high = min(low + 1, int(moved.shape[-1]) - 1)
    found = torch.lerp(ordered[..., low], ordered[..., high], place - low)
    if not keepdim:
        return found
    return found.unsqueeze(dim) if dim is not None else found.reshape([1] * x.dim())


def median(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """`torch.median`: the lower middle of the sorted elements, and along an axis its index."""
    import torch

    if dim is None:
        return kthvalue(x.flatten(), (x.numel() + 1) // 2).values
    return torch.return_types.median(tuple(kthvalue(x, (int(x.shape[dim]) + 1) // 2, dim, keepdim)))


def kthvalue(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """`torch.kthvalue`: the `k`th of the sorted elements, and its index."""
    import torch

    values, places = (movedim(each, dim, -1)[..., k - 1] for each in x.sort(dim))
    if keepdim:
        values, places = values.unsqueeze(dim), places.unsqueeze(dim)
    return torch.return_types.kthvalue((values, places))


def argsort(x: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> torch.Tensor:
    """`torch.argsort` by `torch.sort`, whose stable form exporters are told about."""
    import torch

    return torch.sort(x, stable=stable, dim=dim, descending=descending)[1] if stable else x.argsort(dim, descending)


def mode(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """`torch.mode` by comparing all pairs: the least of the most frequent elements, and the index of its last one."""
    import torch

    size = x.shape[dim]
    if type(size) is int and size > _LONGEST:
        return torch.mode(x, dim, keepdim)
    moved = movedim(x, dim, -1)
    count = (moved.unsqueeze(-1) == moved.unsqueeze(-2)).to(torch.int64).sum(-1)
    most = count == count.amax(-1, keepdim=True)
    values = torch.where(most, moved, moved.amax(-1, keepdim=True)).amin(-1, keepdim=True)
    places = torch.arange(moved.shape[-1])
    indices = torch.where(moved == values, places, torch.zeros_like(places)).amax(-1, keepdim=True)
    values, indices = movedim(values, -1, dim), movedim(indices, -1, dim)
    return torch.return_types.mode((values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim)))


def topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """`torch.topk`, always sorted, since Core ML before iOS 16 has nothing else."""
    import torch

    return torch.topk(x, k, dim, largest, sorted=True)


def movedim(x: torch.Tensor, source: Any, destination: Any) -> torch.Tensor:
    """`torch.movedim` as a permutation, which every converter supports."""
    pairs = zip(*([each] if isinstance(each, int) else each for each in (source, destination)), strict=True)
    placed = {to % x.dim(): from_ % x.dim() for from_, to in pairs}
    rest = iter([axis for axis in range(x.dim()) if axis not in placed.values()])
    return x.permute([placed[axis] if axis in placed else next(rest) for axis in range(x.dim())])


def pad(x: torch.Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> torch.Tensor:
    """`torch.nn.functional.pad` in circular mode by concatenating slices; few converters support that mode."""
    import torch

    if mode != "circular" or any(not isinstance(each, int) or each < 0 for each in pad):
        return torch.nn.functional.pad(x, pad, mode, value)
    for place in range(len(pad) // 2):
        axis, before, after = x.dim() - 1 - place, pad[2 * place], pad[2 * place + 1]
        ends = (x.narrow(axis, x.shape[axis] - before, before), x, x.narrow(axis, 0, after))
        x = torch.cat([part for part, size in zip(ends, (before, 1, after), strict=True) if size], axis)
    return x


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
    known = all(type(each) is int for each in (*sizes, *wanted))
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

    cut, more = ((each,) * 3 if isinstance(each, int) else tuple(each) for each in (padding, output_padding))
    if not any(more) or any(extra > edge for edge, extra in zip(cut, more, strict=True)):
        return torch.conv_transpose3d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    whole = torch.conv_transpose3d(x, weight, bias, stride, 0, 0, groups, dilation)
    for axis, (edge, extra) in enumerate(zip(cut, more, strict=True), x.dim() - 3):
        whole = whole.narrow(axis, edge, whole.shape[axis] - 2 * edge + extra)
    return whole


def take_along_dim(x: torch.Tensor, indices: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """`torch.take_along_dim` as a gather, which does not broadcast; axes of size 1 are repeated."""
    import torch

    if dim is None:
        return x.flatten().gather(0, indices.flatten())
    if x.dim() != indices.dim():
        return torch.take_along_dim(x, indices, dim)
    pairs = [list(pair) for pair in zip(x.shape, indices.shape, strict=True)]
    pairs[dim] = [-1, -1]
    mine, theirs = ([b if type(a) is int and a == 1 else -1 for a, b in each] for each in (pairs, map(reversed, pairs)))
    return x.expand(mine).gather(dim, indices.expand(theirs))


def as_type(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Tensor.to` a dtype; numbers are truth values by a comparison, since some runtimes take NaN for 0."""
    import torch

    return x != 0 if dtype is torch.bool and not _is_whole(x) else x.to(dtype)


def _is_whole(x: torch.Tensor) -> bool:
    """Whether it can have neither fractions nor NaN."""
    return not (x.is_floating_point() or x.is_complex())


def _both_ways(name: str) -> list[Any]:
    """A function of torch, and the method of its name."""
    import torch

    return [getattr(torch, name), getattr(torch.Tensor, name)]


def _of_truths(function: Callable[..., Any]) -> Callable[..., Any]:
    """A logical function of truth values."""

    def apply(x: torch.Tensor, *rest: Any) -> Any:
        return function(*(each if _is_whole(each) else each != 0 for each in (x, *rest)))

    return apply


_TRUTHS: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = dict.fromkeys(
    ("logical_and", "logical_or", "logical_xor", "logical_not"), _of_truths
)


def _of_long_sizes(function: Callable[..., Any], first: int, last: int | None) -> Callable[..., Any]:
    """A function with its sizes, the arguments from `first` to `last`, as int64: ONNX needs one type to join them."""

    def long(size: Any) -> Any:
        import torch

        if isinstance(size, list | tuple):
            return type(size)(map(long, size)) if type(size) in (list, tuple) else size
        number = isinstance(size, torch.Tensor) and size.dim() == 0 and not size.is_floating_point()
        return size.to(torch.int64) if number else size

    def apply(*args: Any, **kwargs: Any) -> Any:
        sizes = tuple(map(long, args[first:last]))
        rest = () if last is None else args[last:]
        return function(*args[:first], *sizes, *rest, **kwargs)

    return apply


def total(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """`torch.sum`, of booleans as integers; Core ML's converter returns floats."""
    import torch

    return torch.sum(x.to(torch.int64) if x.dtype == torch.bool else x, *rest, **more)
