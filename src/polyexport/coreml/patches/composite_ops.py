"""PyTorch ops that coremltools cannot translate, or only with static shapes, composed of MIL ops.

https://apple.github.io/coremltools/docs-guides/source/composite-operators.html
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from polyexport.coreml.patches import arithmetic_ops, elementwise_ops, pooling_ops, scatter_ops, size_ops, unique_ops
from polyexport.coreml.patches.unique_ops import _add_all


def new_ones(context: Any, node: Any) -> None:
    """`tensor.new_ones(shape, dtype=…)`."""
    _new(context, node, 1.0)


def new_zeros(context: Any, node: Any) -> None:
    """`tensor.new_zeros(shape, dtype=…)`."""
    _new(context, node, 0.0)


def _new(context: Any, node: Any, value: float) -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import NUM_TO_DTYPE_STRING, _get_inputs

    values = _get_inputs(context, node)
    like, shape = values[0], _as_vector(values[1])
    number = values[2].val if len(values) > 2 and values[2] is not None else None
    dtype = NUM_TO_DTYPE_STRING[number] if number is not None else _cast_name(like)
    scalar = getattr(shape, "val", shape) is not None and len(getattr(shape, "val", shape)) == 0
    filled = mb.const(val=value) if scalar else mb.fill(shape=shape, value=value)
    context.add(mb.cast(x=filled, dtype=dtype, name=node.name))


def _cast_name(like: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(like.dtype))


def _as_vector(shape: Any) -> Any:
    """A shape of tensors and numbers; a dynamic size keeps its symbol, or its axis would count as another one."""
    from coremltools.converters.mil import Builder as mb

    if not isinstance(shape, list | tuple):
        return shape
    whole = [mb.cast(x=s, dtype="int32") if hasattr(s, "dtype") and _cast_name(s) != "int32" else s for s in shape]
    if any(getattr(size, "rank", 0) for size in whole):
        whole = [mb.expand_dims(x=s, axes=[0]) if getattr(s, "rank", 1) == 0 else s for s in whole]
    return mb.concat(values=whole, axis=0)


def group_norm(context: Any, node: Any) -> None:
    """Each group of channels normalized over its channels and all spatial axes; any axis may be dynamic."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, groups, weight, bias, epsilon = _get_inputs(context, node)[:5]
    shape = mb.shape(x=x)
    rows = mb.slice_by_size(x=shape, begin=[0], size=[1])
    grouped = mb.reshape(x=x, shape=mb.concat(values=[rows, [int(groups.val)], [-1]], axis=0))
    centred = mb.sub(x=grouped, y=mb.reduce_mean(x=grouped, axes=[2], keep_dims=True))
    variance = mb.reduce_mean(x=mb.square(x=centred), axes=[2], keep_dims=True)
    scaled = mb.mul(x=centred, y=mb.rsqrt(x=variance, epsilon=float(epsilon.val)))
    result = mb.reshape(x=scaled, shape=shape)
    for vector, combine in ((weight, mb.mul), (bias, mb.add)):
        if vector is not None:
            result = combine(x=result, y=mb.reshape(x=vector, shape=[1, -1, *[1] * (x.rank - 2)]))
    context.add(mb.identity(x=result, name=node.name))


def instance_norm(context: Any, node: Any) -> None:
    """With running statistics if the layer has them, which coremltools ignores."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, weight, bias, mean, variance, of_input, _, epsilon = ops._get_inputs(context, node)[:8]
    if mean is None or of_input.val:
        ops.instance_norm(context, node)
        return
    # both are given, since the pass that fuses it with a convolution before it expects them
    scale = np.ones(mean.shape, np.float32) if weight is None else weight
    shift = np.zeros(mean.shape, np.float32) if bias is None else bias
    context.add(
        mb.batch_norm(x=x, mean=mean, variance=variance, gamma=scale, beta=shift, epsilon=epsilon, name=node.name)
    )


def rms_norm(context: Any, node: Any) -> None:
    """Scaled by the root of the mean square over the last axes; weight and epsilon may be left out."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, shape, weight, epsilon = [*_get_inputs(context, node), None, None][:4]
    axes = list(range(-len(shape if isinstance(shape, list) else shape.val), 0))
    least = float(np.finfo(np.float32).eps if epsilon is None else epsilon.val)
    mean = mb.reduce_mean(x=mb.square(x=x), axes=axes, keep_dims=True)
    result = mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=least))
    result = result if weight is None else mb.mul(x=result, y=weight)
    context.add(mb.identity(x=result, name=node.name))


def affine_grid(context: Any, node: Any) -> None:
    """Sampling positions transformed by a matrix per image; coremltools supports only a static batch."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    theta, size, corners = _get_inputs(context, node)
    sizes: list[Any] = [getattr(each, "val", each) for each in (size if isinstance(size, list) else size.val)][2:]
    if None in sizes or len(sizes) != 2:
        raise NotImplementedError("affine_grid over axes other than two of known size")
    lines = [_positions(int(count), bool(corners.val)) for count in sizes]
    rows, columns = np.meshgrid(*lines, indexing="ij")
    positions = np.stack([columns, rows, np.ones_like(rows)], -1).reshape(-1, 3).astype(np.float32)
    moved = mb.matmul(x=positions, y=theta, transpose_y=True)
    context.add(mb.reshape(x=moved, shape=[-1, *map(int, sizes), 2], name=node.name))


def _positions(count: int, corners: bool) -> np.ndarray:
    """From -1 to 1, the centers of the first and the last pixel (`corners`) or their outer sides."""
    if corners:
        return np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    return (2 * np.arange(count) + 1) / count - 1


def unfold(context: Any, node: Any) -> None:
    """The blocks of an image as columns, by a convolution per position of a block; all but the channels is dynamic."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.mil.types.symbolic import any_symbolic

    x, *blocks = _get_inputs(context, node)
    kernel, dilations, padding, strides = (_pair(each) for each in blocks)
    channels = int(x.shape[1])
    made = mb.conv(
        x=x,
        weight=_picking(channels, kernel),
        strides=strides,
        dilations=dilations,
        groups=channels,
        pad_type="custom",
        pad=[padding[0], padding[0], padding[1], padding[1]],
    )
    depth, counts = channels * kernel[0] * kernel[1], made.shape[2:]
    if not any_symbolic(counts):
        shape: Any = [-1, depth, math.prod(map(int, counts))]
    elif any_symbolic(x.shape[:1]):
        shape = mb.concat(values=[mb.slice_by_size(x=mb.shape(x=x), begin=[0], size=[1]), [depth, -1]], axis=0)
    else:
        shape = [int(x.shape[0]), depth, -1]
    context.add(mb.reshape(x=made, shape=shape, name=node.name))


def fold(context: Any, node: Any) -> None:
    """Columns put back as blocks of an image, added where they overlap, by the transposed convolution."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, *blocks = _get_inputs(context, node)
    sizes, kernel, dilations, padding, strides = (_pair(each) for each in blocks)
    depth = int(x.shape[1])
    channels = depth // (kernel[0] * kernel[1])
    counts = [(sizes[i] + 2 * padding[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)]
    image = mb.conv_transpose(
        x=mb.reshape(x=x, shape=[-1, depth, *counts]),
        weight=_picking(channels, kernel),
        strides=strides,
        dilations=dilations,
        groups=channels,
        pad_type="valid",
    )
    wide = [(counts[i] - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    missing = [max(sizes[i] + padding[i] - wide[i], 0) for i in (0, 1)]
    if any(missing):  # pixels outside of all blocks
        image = mb.pad(x=image, pad=[0, 0, 0, 0, 0, missing[0], 0, missing[1]], mode="constant", constant_val=0.0)
    begin, end = [0, 0, *padding], [0, 0, *(size + before for size, before in zip(sizes, padding, strict=True))]
    context.add(mb.slice_by_index(x=image, begin=begin, end=end, end_mask=[True, True, False, False], name=node.name))


def _pair(sizes: Any) -> list[int]:
    values = [each.val for each in sizes] if isinstance(sizes, list) else list(sizes.val)
    return [int(each) for each in values]


def _picking(channels: int, kernel: list[int]) -> np.ndarray:
    """One-hot kernels `(channels * positions, 1, *kernel)`."""
    positions = kernel[0] * kernel[1]
    return np.tile(np.eye(positions, dtype=np.float32).reshape(positions, 1, *kernel), (channels, 1, 1, 1))


def diff(context: Any, node: Any) -> None:
    """Differences along one axis, `n` times, of what is joined from `prepend`, the tensor and `append`."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    values = _get_inputs(context, node)
    x = values[0]
    count, axis = (values[index].val if len(values) > index else None for index in (1, 2))
    axis = (int(axis) if axis is not None else -1) % x.rank
    ends = [values[index] if len(values) > index else None for index in (3, 4)]
    if ends != [None, None]:
        x = mb.concat(values=[each for each in (ends[0], x, ends[1]) if each is not None], axis=axis)
    for _ in range(int(count) if count is not None else 1):
        there = [each == axis for each in range(x.rank)]
        later = mb.slice_by_index(x=x, begin=[int(each) for each in there], end=[0] * x.rank, end_mask=[True] * x.rank)
        earlier = mb.slice_by_index(
            x=x, begin=[0] * x.rank, end=[-int(each) for each in there], end_mask=[not each for each in there]
        )
        x = mb.sub(x=later, y=earlier)
    context.add(mb.identity(x=x, name=node.name))


def prod(context: Any, node: Any) -> None:
    """The product along one axis, or of all."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    values = _get_inputs(context, node)
    axes = [int(values[1].val)] if len(values) > 2 and values[1] is not None else None
    keep = bool(values[2].val) if axes and values[2] is not None else False
    context.add(mb.reduce_prod(x=values[0], axes=axes, keep_dims=keep, name=node.name))


def where(context: Any, node: Any) -> None:
    """A choice whose result has the shape of all three inputs; MIL's has only that of the two choices."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.types.symbolic import any_symbolic

    values = ops._get_inputs(context, node)
    shapes = [tuple(value.shape) for value in values if value is not None]
    scalars = len(values) == 3 and not any(shapes[1:])
    if len(shapes) == 3 and not any(shapes):  # for which coremltools joins no sizes
        first, second = ops.promote_input_dtypes(values[1:])
        context.add(mb.select(cond=mb.cast(x=values[0], dtype="bool"), a=first, b=second, name=node.name))
        return
    if len(shapes) != 3 or len(set(shapes)) == 1 or not (scalars or any(map(any_symbolic, shapes))):
        ops.where(context, node)
        return
    condition, first, second = values
    wanted = "fp32" if "fp" in _cast_name(first) + _cast_name(second) else "int32"
    nothing = mb.mul(x=mb.cast(x=condition, dtype=wanted), y=mb.cast(x=0, dtype=wanted))
    for value in (first, second):
        same = mb.equal(x=mb.cast(x=value, dtype=wanted), y=mb.cast(x=value, dtype=wanted))
        nothing = mb.mul(x=nothing, y=mb.cast(x=same, dtype=wanted))  # of its shape, and still zero
    a, b = (mb.add(x=nothing, y=mb.cast(x=value, dtype=wanted)) for value in (first, second))
    wide = mb.not_equal(x=mb.add(x=nothing, y=mb.cast(x=condition, dtype=wanted)), y=mb.cast(x=0, dtype=wanted))
    booleans = _cast_name(first) == _cast_name(second) == "bool"
    chosen = mb.select(cond=wide, a=a, b=b, name=node.name + ("_number" if booleans else ""))
    context.add(mb.cast(x=chosen, dtype="bool", name=node.name) if booleans else chosen, torch_name=node.name)


def clone(context: Any, node: Any) -> None:
    """A copy of a value under its own name, for outputs that are the same tensor, or an input."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    context.add(mb.identity(x=_get_inputs(context, node)[0], name=node.name))


def unsafe_chunk(context: Any, node: Any) -> None:
    """Equal parts along an axis, as cells of recurrent layers need them."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, count, axis = _get_inputs(context, node)
    context.add(mb.split(x=x, num_splits=count, axis=axis), torch_name=node.name)


def bilinear(context: Any, node: Any) -> None:
    """By coremltools, or by matrices for sizes that the scale does not divide, which it refuses."""
    from coremltools.converters.mil.frontend.torch import ops

    try:
        ops.upsample_bilinear2d(context, node)
    except NotImplementedError:
        resampled(context, node)


def resampled(context: Any, node: Any) -> None:
    """A separable resize as two matrix products; the matrices are its results for the identity."""
    import torch
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, size, corners, *scales = _get_inputs(context, node)
    counts = x.shape[-2:]
    if not all(isinstance(count, int | np.integer) for count in counts):
        raise NotImplementedError(f"{node.kind} of an image of dynamic size")
    scales = _numbers(scales[0] if len(scales) == 1 else scales) or [None, None]
    sizes = _numbers(size) or [math.floor(count * scale) for count, scale in zip(counts, scales, strict=True)]
    resize = getattr(torch.ops.aten, node.kind.split(".")[0])
    rows, columns = (
        resize(torch.eye(int(count))[None, None], [int(wanted), int(count)], bool(corners.val), scale, None)[0, 0]
        for count, wanted, scale in zip(counts, sizes, scales, strict=True)
    )
    tall = mb.matmul(x=rows.numpy(), y=x)
    context.add(mb.matmul(x=tall, y=columns.numpy(), transpose_y=True, name=node.name))


def nearest(context: Any, node: Any) -> None:
    """By coremltools where factors are whole; else by PyTorch's indices along each axis, since MIL documents none."""
    import torch
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, size, *scales = ops._get_inputs(context, node)
    kind, counts = node.kind.split(".")[0], x.shape[2:]
    scales = _numbers(scales[0] if len(scales) == 1 else scales) or [None] * len(counts)
    wanted = _numbers(size) or [count * (scale or math.nan) for count, scale in zip(counts, scales, strict=True)]
    known = all(isinstance(each, int | np.integer | float) for each in (*counts, *wanted))
    if hasattr(ops, kind) and not (known and any(many % count for many, count in zip(wanted, counts, strict=True))):
        getattr(ops, kind)(context, node)
        return
    if not known:
        raise NotImplementedError(f"{node.kind} of an image of dynamic size")
    along = getattr(torch.ops.aten, f"{kind[:-2]}1d")
    for axis, (count, many, scale) in enumerate(zip(counts, wanted, scales, strict=True), 2):
        index = along(torch.arange(float(count))[None, None], [math.floor(many)], scale)[0, 0]
        x = mb.gather(x=x, indices=index.numpy().astype(np.int32), axis=axis)
    context.add(mb.identity(x=x, name=node.name))


def _numbers(values: Any) -> list[Any]:
    """Of a constant or a list of constants; empty where there is none, and as written where float32 was rounded."""
    listed = values if isinstance(values, list) else getattr(values, "val", None)
    found = [getattr(each, "val", each) for each in (listed if listed is not None else [])]
    return [each if each is None else float(str(each)) for each in found]


# --- adaptive pooling -------------------------------------------------------------------------------------------------


def adaptive_avg_pool(context: Any, node: Any) -> None:
    """Means of nearly equal parts, over one to three axes; the batch may be dynamic."""
    from coremltools.converters.mil import Builder as mb

    _adaptive(context, node, mb.reduce_mean)


def adaptive_max_pool(context: Any, node: Any) -> None:
    """The same for maxima, without indices."""
    from coremltools.converters.mil import Builder as mb

    _adaptive(context, node, mb.reduce_max)


def _adaptive(context: Any, node: Any, reduce: Any) -> None:
    """One axis after the other, which for means and maxima is the same as all at once."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, sizes = _get_inputs(context, node)[:2]
    wanted = [int(size) for size in sizes.val]
    for axis, count in enumerate(wanted, x.rank - len(wanted)):
        if count == x.shape[axis]:
            continue
        x = reduce(x=x, axes=[axis], keep_dims=True) if count == 1 else _parts(x, axis, count, reduce)
    context.add(mb.identity(x=x, name=node.name))


def _parts(x: Any, axis: int, count: int, reduce: Any) -> Any:
    from coremltools.converters.mil import Builder as mb

    size, parts = int(x.shape[axis]), []
    for part in range(count):
        begin, end = [0] * x.rank, [0] * x.rank
        begin[axis], end[axis] = part * size // count, -(-(part + 1) * size // count)
        rest = [each != axis for each in range(x.rank)]
        parts.append(reduce(x=mb.slice_by_index(x=x, begin=begin, end=end, end_mask=rest), axes=[axis], keep_dims=True))
    return mb.concat(values=parts, axis=axis)


def stable_sort(context: Any, node: Any) -> None:
    """Sorted elements and their indices, or the indices alone, where `stable` is given, which coremltools lacks."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, *more = ops._get_inputs(context, node)
    if len(more) == 3:  # in a trace: stable, dim, descending
        more = more[1:]
    elif context.frontend == ops.TorchFrontend.TORCHSCRIPT:
        getattr(ops, node.kind)(context, node)
        return
    given = zip(("dim", "descending"), [*more, None, None], strict=False)
    dim, descending = (ops._get_kwinputs(context, node, name, default=[value])[0] for name, value in given)
    axis = -1 if dim is None else int(getattr(dim, "val", dim))
    ascending = descending is None or not getattr(descending, "val", descending)
    indices = mb.argsort(x=x, axis=axis, ascending=ascending)
    if node.kind.startswith("argsort"):
        context.add(indices, torch_name=node.name)
        return
    values = mb.gather_along_axis(x=x, indices=indices, axis=axis)
    _add_all(context, node, values, indices)


# --- their table ------------------------------------------------------------------------------------------------------

_SEPARABLE = ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_bicubic2d")
_NEAREST = ("upsample_nearest", "_upsample_nearest_exact")

_COMPOSITES = {
    "new_ones": new_ones,
    "new_zeros": new_zeros,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "rms_norm": rms_norm,
    "affine_grid_generator": affine_grid,
    "im2col": unfold,
    "col2im": fold,
    "diff": diff,
    "prod": prod,
    **unique_ops.COMPOSITES,
    **dict.fromkeys(("sort", "sort.stable", "argsort", "argsort.stable"), stable_sort),
    **dict.fromkeys(("where", "where.self", "where.scalarself"), where),
    "clone": clone,
    "unsafe_chunk": unsafe_chunk,
    **scatter_ops.COMPOSITES,
    **arithmetic_ops.COMPOSITES,
    **elementwise_ops.COMPOSITES,
    **pooling_ops.COMPOSITES,
    **size_ops.COMPOSITES,
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bilinear2d.vec"), bilinear),
    **{f"{name}{rank}d{of}": nearest for name in _NEAREST for rank in (1, 2, 3) for of in ("", ".vec")},
    **{f"{name}{of}": resampled for name in _SEPARABLE for of in ("", ".vec")},
    **{f"adaptive_avg_pool{rank}d": adaptive_avg_pool for rank in (1, 2, 3)},
    **{f"_adaptive_avg_pool{rank}d": adaptive_avg_pool for rank in (2, 3)},
    **{f"adaptive_max_pool{rank}d": adaptive_max_pool for rank in (1, 2, 3)},
}


def register() -> None:
    """Add them to coremltools' table of this process, in place of its own."""
    from coremltools.converters.mil import register_torch_op

    for name, composite in _COMPOSITES.items():

        def translate(context: Any, node: Any, composite: Callable[[Any, Any], None] = composite) -> None:
            composite(context, node)

        translate.__name__ = name  # the name that it is registered by
        register_torch_op(_func=translate, override=True)
