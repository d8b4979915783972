"""PyTorch's ops on sizes whose known axes coremltools forgets beside a dynamic one; registered by `composite_ops.py`.

Operators need some sizes, such as that of attention's last axis, which is known where those before it stay known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from polyexport.coreml.patches.scatter_ops import _kind


def _without_idle_casts(name: str) -> Callable[[Any, Any], None]:
    """The translation of coremltools, but a size that is cast to the type that it has stays the same symbol."""

    def composite(context: Any, node: Any) -> None:
        from coremltools.converters.mil.frontend.torch import ops

        getattr(ops, name)(context, node)
        made = context[node.name]
        cast = getattr(made, "op", None)
        if cast is not None and cast.op_type == "cast" and made.rank == 0 and cast.x.dtype == made.dtype:
            context.add(cast.x, torch_name=node.name, override=True)

    return composite


def expand(context: Any, node: Any) -> None:
    """Repeated along axes of size 1, so that all others keep their size; by coremltools where one may be either."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, sizes = ops._get_inputs(context, node)[:2]
    listed = sizes if isinstance(sizes, list | tuple) else []
    if not listed and tuple(getattr(sizes, "shape", (0,))) == (0,):  # a scalar to no axes
        context.add(mb.identity(x=x, name=node.name))
        return
    if not any(hasattr(size, "dtype") and size.val is None for size in listed):
        ops.expand(context, node)
        return
    wide = mb.expand_dims(x=x, axes=list(range(len(listed) - x.rank))) if len(listed) > x.rank else x
    counts = [_repeats(have, size) for have, size in zip(wide.shape, listed, strict=True)]
    if None in counts:
        ops.expand(context, node)
        return
    is_bool = _kind(x) == "bool"
    nothing = mb.cast(x=mb.fill(shape=mb.concat(values=counts, axis=0), value=0 if is_bool else 1), dtype=_kind(x))
    combine = mb.logical_or if is_bool else mb.mul  # whose results keep the symbol of a size, as a tile's do not
    context.add(combine(x=wide, y=nothing, name=node.name))


def _repeats(have: Any, wanted: Any) -> Any:
    """How often an axis of size `have` is repeated; None if that depends on its dynamic size."""
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    known = getattr(wanted, "val", wanted)
    if known is not None and int(known) == -1:
        return 1
    if is_symbolic(have):
        return 1 if getattr(wanted, "sym_val", None) == have else None
    return wanted if have == 1 else 1


def flatten(context: Any, node: Any) -> None:
    """A reshape to constants with one size left open, where that is enough; coremltools computes all from the shape."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    x, *ends = ops._get_inputs(context, node)
    given = [int(end.val) for end in ends]
    start, end = (each % max(x.rank, 1) for each in (*given, *(0, -1)[len(given) :]))
    merged = x.shape[start : end + 1]
    sizes = [*x.shape[:start], None if any(map(is_symbolic, merged)) else math.prod(merged), *x.shape[end + 1 :]]
    shape = [-1 if size is None or is_symbolic(size) else int(size) for size in sizes]
    if not any(map(is_symbolic, x.shape)) or shape.count(-1) > 1:
        ops.flatten(context, node)
        return
    context.add(mb.reshape(x=x, shape=shape, name=node.name))


def linspace(context: Any, node: Any) -> None:
    """Evenly spaced numbers; coremltools takes the traced size of an axis for a vector, and needs a known count."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    ends = [mb.squeeze(x=each) if each.rank else each for each in ops._get_inputs(context, node)[:3]]
    if all(each.val is not None for each in ends):
        first, last, steps = (each.val.item() for each in ends)
        context.add(mb.const(val=np.linspace(first, last, int(steps), dtype=np.float32), name=node.name))
        return
    first, last, steps = (mb.cast(x=each, dtype="fp32") for each in ends)
    gaps = mb.maximum(x=mb.sub(x=steps, y=1.0), y=1.0)
    step = mb.real_div(x=mb.sub(x=last, y=first), y=gaps)
    counted = mb.range_1d(start=0.0, end=steps, step=1.0)
    context.add(mb.add(x=mb.mul(x=counted, y=step), y=first, name=node.name))


COMPOSITES: Mapping[str, Callable[[Any, Any], None]] = {
    "to": _without_idle_casts("to"),
    "int": _without_idle_casts("_int"),
    "expand": expand,
    "flatten": flatten,
    "linspace": linspace,
}
