"""PyTorch's writes by index that coremltools lacks or gets wrong, as scatters; registered by `composite_ops.py`."""

from __future__ import annotations

import math
from typing import Any


def index_put(context: Any, node: Any) -> None:
    """`x[:, indices] = y` with adjacent indexed axes, as one scatter along their merged axis.

    coremltools does it if all axes or none have indices; other cases it gets wrong.

    Raises:
        NotImplementedError: the axes are not adjacent or are dynamic, or there is a mask or an index of several axes.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, indices, values, *more = ops._get_inputs(context, node)
    (adds,) = ops._get_kwinputs(context, node, "accumulate", default=[more[0] if more else None])
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    adding = adds is not None and bool(adds.val)
    if axes == [0] and _kind(indices[0]) == "bool" and not values.rank and not adding:
        _masked(context, node, x, indices[0], values)
        return
    if len(axes) == len(indices) or not any(indices[axis].rank for axis in axes):
        ops.index_put(context, node)
        return
    first, last = axes[0], axes[-1] + 1
    sizes = _sizes(x)
    other = any(indices[axis].rank > 1 or "int" not in _kind(indices[axis]) for axis in axes)
    if other or axes != list(range(first, last)) or -1 in sizes[first:last] or sizes.count(-1) > 1:
        raise NotImplementedError(f"{node.kind} at {[None if each is None else each.shape for each in indices]}")
    position = 0
    for axis in axes:
        inside = mb.mod(x=mb.cast(x=indices[axis], dtype="int32"), y=sizes[axis])  # an index may count from the end
        position = mb.add(x=mb.mul(x=position, y=sizes[axis]), y=inside)
    merged = mb.reshape(x=x, shape=[*sizes[:first], math.prod(sizes[first:last]), *sizes[last:]])
    updates = _spread(values, mb.gather(x=merged, indices=position, axis=first), _kind(x))
    mode = "add" if adding else "update"
    written = mb.scatter(data=merged, indices=position, updates=updates, axis=first, mode=mode)
    context.add(mb.reshape(x=written, shape=sizes, name=node.name))


def _masked(context: Any, node: Any, x: Any, mask: Any, value: Any) -> None:
    """One value where a mask over the first axes is set."""
    from coremltools.converters.mil import Builder as mb

    behind = list(range(mask.rank, x.rank))
    cond = mb.expand_dims(x=mask, axes=behind) if behind else mask
    context.add(mb.select(cond=cond, a=_spread(value, x, _kind(x)), b=x, name=node.name))


def index_add(context: Any, node: Any) -> None:
    """Slices added to those at indices along an axis."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, axis, index, updates, *more = ops._get_inputs(context, node)
    (alpha,) = ops._get_kwinputs(context, node, "alpha", default=[more[0] if more else None])
    if alpha is not None and alpha.val != 1:
        updates = mb.mul(x=updates, y=mb.cast(x=alpha, dtype=_kind(updates)))
    context.add(mb.scatter(data=x, indices=index, updates=updates, axis=axis, mode="add", name=node.name))


def index_copy(context: Any, node: Any) -> None:
    """Slices that replace those at indices along an axis."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, axis, index, updates = _get_inputs(context, node)
    context.add(mb.scatter(data=x, indices=index, updates=updates, axis=axis, mode="update", name=node.name))


def scatter(context: Any, node: Any) -> None:
    """Elements written at indices along an axis: also one value for all, for any batch, and booleans."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, axis, index, updates, *more = ops._get_inputs(context, node)
    if more or ops._get_kwinputs(context, node, "reduce"):
        ops.scatter(context, node)
        return
    kind = "int32" if _kind(x) == "bool" else _kind(x)
    positions = _beside(x, index, int(axis.val))
    updates = mb.cast(x=_like(updates, positions), dtype=kind) if updates.rank else _spread(updates, index, kind)
    given = {"data": mb.cast(x=x, dtype=kind), "indices": positions, "updates": updates, "axis": axis, "mode": "update"}
    context.add(mb.cast(x=mb.scatter_along_axis(**given), dtype=_kind(x), name=node.name))


def _spread(values: Any, like: Any, kind: str) -> Any:
    """`values` in the shape of another tensor, which may be dynamic."""
    from coremltools.converters.mil import Builder as mb

    nothing = mb.cast(x=mb.fill_like(ref_tensor=like, value=0), dtype=kind)
    return mb.add(x=nothing, y=mb.cast(x=values, dtype=kind))


def _beside(x: Any, index: Any, along: int) -> Any:
    """The index with the sizes of `x` except `along`, since dynamic sizes are compared by their symbols."""
    from coremltools.converters.mil import Builder as mb

    def size(axis: int) -> Any:
        own, its = _sizes(index)[axis], _sizes(x)[axis]
        if axis == along % x.rank:
            return own
        return mb.gather(x=mb.shape(x=x), indices=axis, axis=0) if its == -1 else its if own == -1 else own

    free = [axis for axis in range(x.rank) if -1 in (_sizes(x)[axis], _sizes(index)[axis]) and axis != along % x.rank]
    if all(index.shape[axis] == x.shape[axis] for axis in free):
        return index
    return mb.reshape(x=index, shape=mb.concat(values=[size(axis) for axis in range(x.rank)], axis=0))


def _like(updates: Any, index: Any) -> Any:
    """The sources with the symbols of their index's dynamic sizes, for the same reason."""
    from coremltools.converters.mil import Builder as mb

    pairs = zip(_sizes(updates), _sizes(index), updates.shape, index.shape, strict=True)
    if any(-1 in (ours, its) and one != other for ours, its, one, other in pairs):
        return mb.reshape(x=updates, shape=mb.shape(x=index))
    return updates


_MODES = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
"""MIL's name of a reduction, by PyTorch's."""


def scatter_add(context: Any, node: Any) -> None:
    """Each element plus the sources at its index."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, axis, index, updates = _get_inputs(context, node)[:4]
    _scattered(context, node, x, axis, index, updates, "sum")


def scatter_reduce(context: Any, node: Any) -> None:
    """Each element and the sources at its index: their sum, product, maximum or minimum.

    Raises:
        NotImplementedError: their mean, or without the element; `polyexport.tracing.decompositions` decomposes these.
    """
    from coremltools.converters.mil.frontend.torch import ops

    x, axis, index, updates, reduce, *more = ops._get_inputs(context, node)
    (own,) = ops._get_kwinputs(context, node, "include_self", default=[more[0] if more else None])
    if reduce.val not in _MODES or not (own is None or own.val):
        raise NotImplementedError(f"scatter_reduce of {reduce.val} with include_self={own is None or own.val}")
    _scattered(context, node, x, axis, index, updates, reduce.val)


def _scattered(context: Any, node: Any, x: Any, axis: Any, index: Any, updates: Any, reduce: str) -> None:
    """Computed here if all inputs are constant: coremltools would replace values in any mode."""
    import torch
    from coremltools.converters.mil import Builder as mb

    constants = [each.val for each in (x, index, updates)]
    if all(each is not None for each in constants):
        data, at, sources = map(torch.from_numpy, constants)
        context.add(mb.const(val=data.scatter_reduce(axis.val, at.long(), sources, reduce).numpy(), name=node.name))
        return
    positions = _beside(x, index, int(axis.val))
    given = {
        "data": x,
        "indices": positions,
        "updates": _like(updates, positions),
        "axis": axis,
        "mode": _MODES[reduce],
    }
    context.add(mb.scatter_along_axis(**given, name=node.name))


def _sizes(x: Any) -> list[int]:
    """Sizes of the axes, -1 for a dynamic one."""
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    return [-1 if is_symbolic(size) else int(size) for size in x.shape]


def _kind(x: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(x.dtype))


COMPOSITES = {
    "index_put": index_put,
    "index_add": index_add,
    "index_copy": index_copy,
    **dict.fromkeys(("scatter", "scatter.src", "scatter.value"), scatter),
    "scatter_add": scatter_add,
    **dict.fromkeys(("scatter_reduce", "scatter_reduce.two"), scatter_reduce),
}
