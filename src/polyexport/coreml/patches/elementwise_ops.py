"""PyTorch's functions of single elements that coremltools lacks or gets wrong; registered by `composite_ops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from polyexport.coreml.patches.arithmetic_ops import truncated
from polyexport.coreml.patches.scatter_ops import _kind, _sizes


def _elementwise(build: Callable[..., Any]) -> Callable[[Any, Any], None]:
    """What `build` makes of MIL's ops and the arguments; integers come as floats."""

    def composite(context: Any, node: Any) -> None:
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.frontend.torch.ops import _get_inputs

        floats = [x if "fp" in _kind(x) else mb.cast(x=x, dtype="fp32") for x in _get_inputs(context, node)]
        context.add(mb.identity(x=build(mb, *floats), name=node.name))

    return composite


def _asinh(mb: Any, x: Any) -> Any:
    """By the magnitude, since the sum of a negative number and its root is lost to rounding."""
    size = mb.abs(x=x)
    return mb.mul(x=mb.sign(x=x), y=mb.log(x=mb.add(x=size, y=mb.sqrt(x=mb.add(x=mb.square(x=x), y=1.0)))))


_LANCZOS = (
    676.5203681218851,
    -1259.1392167224028,
    771.32342877765313,
    -176.61502916214059,
    12.507343278686905,
    -0.13857109526572012,
    9.9843695780195716e-6,
    1.5056327351493116e-7,
)
"""Coefficients of the approximation with g = 7: https://en.wikipedia.org/wiki/Lanczos_approximation."""


def _lgamma(mb: Any, x: Any) -> Any:
    """By Lanczos for one and above, and by log Γ(x) = log π - log |sin πx| - log Γ(1 - x) below a half."""
    small = mb.cast(x=mb.less(x=x, y=0.5), dtype="fp32")
    mirrored = mb.add(x=x, y=mb.mul(x=small, y=mb.sub(x=1.0, y=mb.mul(x=x, y=2.0))))
    shifted = mb.sub(x=mirrored, y=1.0)
    total = 0.99999999999980993
    for index, coefficient in enumerate(_LANCZOS, 1):
        total = mb.add(x=mb.real_div(x=coefficient, y=mb.add(x=shifted, y=float(index))), y=total)
    base = mb.add(x=shifted, y=7.5)
    power = mb.mul(x=mb.add(x=shifted, y=0.5), y=mb.log(x=base))
    above = mb.add(x=mb.sub(x=power, y=base), y=mb.add(x=mb.log(x=total), y=math.log(2 * math.pi) / 2))
    sine = mb.abs(x=mb.sin(x=mb.mul(x=x, y=math.pi)))
    below = mb.sub(x=math.log(math.pi), y=mb.add(x=mb.log(x=sine), y=above))
    return mb.select(cond=mb.less(x=x, y=0.5), a=below, b=above)


def _log(mb: Any, x: Any) -> Any:
    """The logarithm, which is -∞ at 0: MIL adds an epsilon first, and has -103 there."""
    return mb.real_div(x=mb.log(x=x), y=mb.cast(x=mb.not_equal(x=x, y=0.0), dtype="fp32"))


_FLOATS = (
    "acos",
    "asin",
    "atan",
    "atanh",
    "cos",
    "cosh",
    "erf",
    "exp",
    "exp2",
    "sigmoid",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
)
"""Functions that MIL has by PyTorch's name, but of floats only."""


def _of_floats(name: str) -> Callable[..., Any]:
    return lambda mb, x: getattr(mb, name)(x=x)


_ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    **{name: _of_floats(name) for name in _FLOATS},
    "log": _log,
    "log2": lambda mb, x: mb.mul(x=_log(mb, x), y=1 / math.log(2)),
    "log10": lambda mb, x: mb.mul(x=_log(mb, x), y=1 / math.log(10)),
    # MIL's own `inverse` adds an epsilon of 1e-4 first
    "reciprocal": lambda mb, x: mb.real_div(x=1.0, y=mb.cast(x=x, dtype="fp32")),
    "lerp": lambda mb, start, end, weight: mb.add(x=start, y=mb.mul(x=mb.sub(x=end, y=start), y=weight)),
    "trunc": lambda mb, x: truncated(mb, x, 1.0),
    "erfc": lambda mb, x: mb.sub(x=1.0, y=mb.erf(x=x)),
    "asinh": _asinh,
    "acosh": lambda mb, x: mb.log(x=mb.add(x=x, y=mb.sqrt(x=mb.sub(x=mb.square(x=x), y=1.0)))),
    "lgamma": _lgamma,
}


def relu(context: Any, node: Any) -> None:
    """What is above zero, of integers too."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    (x,) = _get_inputs(context, node)
    context.add(mb.relu(x=x, name=node.name) if "fp" in _kind(x) else mb.maximum(x=x, y=0, name=node.name))


def rounded(context: Any, node: Any) -> None:
    """Round half to even; with MIL's `round` it depends on the device.

    https://github.com/webmachinelearning/webnn/issues/817
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs

    x, *more = _get_inputs(context, node)
    (decimals,) = _get_kwinputs(context, node, "decimals", default=[more[0] if more else None])
    if "fp" not in _kind(x):
        context.add(mb.identity(x=x, name=node.name))
        return
    scale = 10.0 ** int(0 if decimals is None else decimals.val)
    scaled = x if scale == 1 else mb.mul(x=x, y=scale)
    low = mb.floor(x=scaled)
    rest = mb.sub(x=scaled, y=low)
    half_of_odd = mb.logical_and(x=mb.equal(x=rest, y=0.5), y=mb.equal(x=mb.mod(x=low, y=2.0), y=1.0))
    up = mb.cast(x=mb.logical_or(x=mb.greater(x=rest, y=0.5), y=half_of_odd), dtype=_kind(x))
    whole = mb.add(x=low, y=up)
    context.add(mb.identity(x=whole if scale == 1 else mb.real_div(x=whole, y=scale), name=node.name))


def log_softmax(context: Any, node: Any) -> None:
    """Not the logarithm of a softmax, which is -inf for elements far below the maximum."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, axis = _get_inputs(context, node)[:2]
    axes = [int(axis.val)]
    below = mb.sub(x=x, y=mb.reduce_max(x=x, axes=axes, keep_dims=True))
    total = mb.log(x=mb.reduce_sum(x=mb.exp(x=below), axes=axes, keep_dims=True))
    context.add(mb.sub(x=below, y=total, name=node.name))


def triu(context: Any, node: Any) -> None:
    """The upper triangle by `select`: coremltools subtracts the lower one, which turns infinities into NaN."""
    _triangle(context, node, upper=True)


def tril(context: Any, node: Any) -> None:
    """Likewise the lower one."""
    _triangle(context, node, upper=False)


def _triangle(context: Any, node: Any, *, upper: bool) -> None:
    """MIL's bands include the diagonal: a triangle without it is the complement of the other band."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, *more = _get_inputs(context, node)
    diagonal = int(more[0].val) if more and more[0] is not None else 0
    held = diagonal <= 0 if upper else diagonal >= 0
    of_upper, edge = (upper, diagonal) if held else (not upper, diagonal - 1 if upper else diagonal + 1)
    sizes = _sizes(x)[-2:]
    like = x if "fp" in _kind(x) else mb.cast(x=x, dtype="fp32")
    ones = mb.fill_like(ref_tensor=like, value=1.0) if -1 in sizes else np.ones(sizes, np.float32)
    band = mb.band_part(x=ones, **({"lower": -edge, "upper": -1} if of_upper else {"lower": -1, "upper": edge}))
    kept = mb.equal(x=band, y=1.0 if held else 0.0)
    context.add(mb.select(cond=kept, a=x, b=mb.cast(x=0.0, dtype=_kind(x)), name=node.name))


def prelu(context: Any, node: Any) -> None:
    """By two ReLUs where MIL has none: its own takes a slope per channel for images only."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, slope = _get_inputs(context, node, expected=2)
    if x.rank == 4 or slope.shape[0] == 1:
        ops.prelu(context, node)
        return
    slopes = mb.reshape(x=slope, shape=[1, -1, *[1] * (x.rank - 2)])
    below = mb.mul(x=slopes, y=mb.relu(x=mb.mul(x=x, y=-1.0)))
    context.add(mb.sub(x=mb.relu(x=x), y=below, name=node.name))


COMPOSITES = {
    "prelu": prelu,
    **{name: _elementwise(build) for name, build in _ELEMENTWISE.items()},
    "relu": relu,
    **dict.fromkeys(("round", "round.decimals"), rounded),
    **dict.fromkeys(("log_softmax", "_log_softmax"), log_softmax),
    "triu": triu,
    "tril": tril,
}
