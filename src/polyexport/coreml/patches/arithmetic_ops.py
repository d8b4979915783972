"""PyTorch's arithmetic where coremltools drops a factor, a dtype or a promotion; registered by `composite_ops.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polyexport.coreml.patches.scatter_ops import _kind

Binary = Callable[[Any, Any, Any], Any]
"""MIL's builder and two arguments of one dtype, to a result."""


def _arguments(context: Any, node: Any, name: str, default: Any = None) -> tuple[Any, Any, Any]:
    """Both arguments, and the value of the third, which may be given by its `name`."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs

    x, y, *more = _get_inputs(context, node)
    (third,) = _get_kwinputs(context, node, name, default=[more[0] if more else None])
    return x, y, default if third is None else getattr(third, "val", third)


def _promoted(*values: Any) -> list[Any]:
    from coremltools.converters.mil.frontend.torch.ops import promote_input_dtypes

    return list(promote_input_dtypes(list(values)))


def add(context: Any, node: Any) -> None:
    """`x + alpha * y`."""
    from coremltools.converters.mil.frontend.torch import ops

    _scaled(context, node, ops.add, lambda mb, x, y: mb.add(x=x, y=y))


def sub(context: Any, node: Any) -> None:
    """`x - alpha * y`."""
    from coremltools.converters.mil.frontend.torch import ops

    _scaled(context, node, ops.sub, lambda mb, x, y: mb.sub(x=x, y=y))


def rsub(context: Any, node: Any) -> None:
    """`y - alpha * x`."""
    from coremltools.converters.mil.frontend.torch import ops

    _scaled(context, node, ops.sub, lambda mb, x, y: mb.sub(x=y, y=x), scales_first=True)


def _scaled(context: Any, node: Any, plain: Any, combine: Binary, *, scales_first: bool = False) -> None:
    """By coremltools if there is no factor, which it refuses or drops."""
    from coremltools.converters.mil import Builder as mb

    x, y, alpha = _arguments(context, node, "alpha", default=1)
    if alpha == 1:
        plain(context, node)
        return
    x, y = _promoted(*(mb.cast(x=each, dtype="int32") if _kind(each) == "bool" else each for each in (x, y)))
    scaled = mb.mul(**dict(zip("xy", _promoted(x if scales_first else y, alpha), strict=True)))
    x, y = _promoted(*((scaled, y) if scales_first else (x, scaled)))
    context.add(mb.identity(x=combine(mb, x, y), name=node.name))


def addcmul(context: Any, node: Any) -> None:
    """`x + value * y * z`."""
    _added(context, node, lambda mb, y, z: mb.mul(x=y, y=z))


def addcdiv(context: Any, node: Any) -> None:
    """`x + value * y / z`."""
    _added(context, node, lambda mb, y, z: mb.real_div(x=y, y=z))


def _added(context: Any, node: Any, combine: Binary) -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs

    x, y, z, *more = _get_inputs(context, node)
    (value,) = _get_kwinputs(context, node, "value", default=[more[0] if more else None])
    x, y, z, factor = _promoted(x, y, z, 1 if value is None else getattr(value, "val", value))
    context.add(mb.add(x=x, y=mb.mul(x=combine(mb, y, z), y=factor), name=node.name))


def mul(context: Any, node: Any) -> None:
    """A product, also of complex numbers, which coremltools does not multiply."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    factors = ops._get_inputs(context, node)
    if not any("complex" in _kind(factor) for factor in factors):
        ops.mul(context, node)
        return
    context.add(_complex_product(lambda x, y: mb.mul(x=x, y=y), *factors), torch_name=node.name)


def _complex_product(times: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    """By products of real and imaginary parts."""
    from coremltools.converters.mil import Builder as mb

    (a, b), (c, d) = map(_parts, (x, y))
    real = mb.sub(x=times(a, c), y=times(b, d))
    return mb.complex(real_data=real, imag_data=mb.add(x=times(a, d), y=times(b, c)))


def _parts(x: Any) -> tuple[Any, Any]:
    """The real and the imaginary part; a constant may be of complex numbers, which MIL does not take apart."""
    from coremltools.converters.mil import Builder as mb

    if "complex" in _kind(x) and x.val is not None:
        return x.val.real.astype(np.float32), x.val.imag.astype(np.float32)
    if "complex" in _kind(x):
        return mb.complex_real(data=x), mb.complex_imag(data=x)
    real = mb.cast(x=x, dtype="fp32")
    return real, mb.sub(x=real, y=real)


def view_as_complex(context: Any, node: Any) -> None:
    """Pairs in a last axis as complex numbers."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x = ops._get_inputs(context, node)[0]
    real, imaginary = (mb.gather(x=x, indices=part, axis=x.rank - 1) for part in (0, 1))
    context.add(mb.complex(real_data=real, imag_data=imaginary), torch_name=node.name)


def div(context: Any, node: Any) -> None:
    """A quotient, of two integers an integer where it is rounded, of a complex number by a real one."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, y, mode = _arguments(context, node, "rounding_mode")
    if mode is None and "complex" in _kind(x):
        parts = [mb.real_div(x=part, y=mb.cast(x=y, dtype="fp32")) for part in _parts(x)]
        context.add(mb.complex(real_data=parts[0], imag_data=parts[1]), torch_name=node.name)
        return
    if mode is None:
        ops.div(context, node)
        return
    _rounded(context, node, x, y, truncated if mode == "trunc" else floored)


def floor_divide(context: Any, node: Any) -> None:
    """The quotient, rounded down."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, y = _get_inputs(context, node)
    _rounded(context, node, x, y, floored)


def fmod(context: Any, node: Any) -> None:
    """What the truncated quotient leaves."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, y = _get_inputs(context, node)
    _rounded(context, node, x, y, lambda mb, x, y: mb.sub(x=x, y=mb.mul(x=truncated(mb, x, y), y=y)))


def _rounded(context: Any, node: Any, x: Any, y: Any, divide: Binary) -> None:
    from coremltools.converters.mil import Builder as mb

    context.add(mb.identity(x=divide(mb, *_promoted(x, y)), name=node.name))


def floored(mb: Any, x: Any, y: Any) -> Any:
    """Floats by division and floor: coremltools removes a `floor_div` by one."""
    return mb.floor_div(x=x, y=y) if "int" in _kind(x) else mb.floor(x=mb.real_div(x=x, y=y))


def truncated(mb: Any, x: Any, y: Any) -> Any:
    """The quotient, rounded to zero; MIL's floor is for floats only, and its integer division is not documented."""
    if "int" not in _kind(x):
        quotient = mb.real_div(x=x, y=y)
        return mb.mul(x=mb.sign(x=quotient), y=mb.floor(x=mb.abs(x=quotient)))
    size = mb.floor_div(x=mb.abs(x=x), y=mb.abs(x=y))
    negative = mb.logical_xor(x=mb.less(x=x, y=0), y=mb.less(x=y, y=0))
    return mb.select(cond=negative, a=mb.mul(x=size, y=-1), b=size)


def power(context: Any, node: Any) -> None:
    """A power; of two by `exp2`, since Core ML computes `pow` with a constant 2 on either side as a square.

    https://github.com/apple/coremltools/issues/2628
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, y = _promoted(*_get_inputs(context, node))
    if x.val is None or x.rank or x.val != 2:
        context.add(mb.pow(x=x, y=y, name=node.name))
        return
    if "int" not in _kind(y):
        context.add(mb.exp2(x=y, name=node.name))
        return
    whole = mb.round(x=mb.exp2(x=mb.cast(x=y, dtype="fp32")))
    context.add(mb.cast(x=whole, dtype="int32", name=node.name))


def matmul(context: Any, node: Any) -> None:
    """A product of matrices or vectors of one dtype; of integers never as a `linear`, which runs on no device.

    https://github.com/apple/coremltools/pull/2673
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    factors = ops._get_inputs(context, node)
    if any("complex" in _kind(factor) for factor in factors):
        context.add(_complex_product(lambda x, y: mb.matmul(x=x, y=y), *factors), torch_name=node.name)
        return
    x, y = _promoted(*factors)
    left = mb.expand_dims(x=x, axes=[0]) if x.rank == 1 else x
    right = mb.expand_dims(x=y, axes=[1]) if y.rank == 1 else y
    vectors = [axis for axis, factor in ((-2, x), (-1, y)) if factor.rank == 1]
    name = f"{node.name}_matrix" if vectors else node.name
    integers = "int" in _kind(x)
    product = mb.matmul(x=left, y=right, name=name) if integers else ops._construct_matmul(left, right, name)
    context.add(mb.squeeze(x=product, axes=vectors, name=node.name) if vectors else product, torch_name=node.name)


def outer(context: Any, node: Any) -> None:
    """The outer product of two vectors of one dtype."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, y = _promoted(*_get_inputs(context, node))
    context.add(mb.mul(x=mb.expand_dims(x=x, axes=[1]), y=mb.expand_dims(x=y, axes=[0]), name=node.name))


def mean(context: Any, node: Any) -> None:
    """A mean, over one or all axes, of what may be cast first."""
    from coremltools.converters.mil import Builder as mb

    _reduced(context, node, mb.reduce_mean)


def total(context: Any, node: Any) -> None:
    """A sum likewise; of booleans it is an integer."""
    from coremltools.converters.mil import Builder as mb

    _reduced(context, node, mb.reduce_sum, of_truth="int32")


def _reduced(context: Any, node: Any, reduce: Any, of_truth: str | None = None) -> None:
    """By coremltools, but for a `dtype`, which it takes for an axis or drops, and for that of a reduced truth value."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, *more = ops._get_inputs(context, node)
    (dtype,) = ops._get_kwinputs(context, node, "dtype", default=[None])
    if context.frontend == ops.TorchFrontend.TORCHSCRIPT:  # (x, dtype) or (x, dim, keepdim, dtype)
        *more, dtype = more or [None]
    into = ops.NUM_TO_DTYPE_STRING[getattr(dtype, "val", dtype)] if dtype is not None else None
    into = into or (of_truth if _kind(x) == "bool" else None)
    if into is None:
        ops.mean(context, node)
        return
    (keep,) = ops._get_kwinputs(context, node, "keepdim", default=[more[1] if len(more) > 1 else None])
    axes = None if not more or more[0] is None else [int(axis) for axis in np.ravel(more[0].val)] or None
    cast = mb.cast(x=x, dtype=into)
    context.add(reduce(x=cast, axes=axes, keep_dims=bool(getattr(keep, "val", keep)), name=node.name))


def argmax(context: Any, node: Any) -> None:
    """The index of the greatest or the least, by coremltools, but of all entries, for which it takes the last axis."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, *more = ops._get_inputs(context, node)
    given = zip(("dim", "keepdim"), [*more, None, None], strict=False)
    axis, keep = (ops._get_kwinputs(context, node, name, default=[value])[0] for name, value in given)
    if axis is not None:
        ops.argmax(context, node)
        return
    reduce = mb.reduce_argmax if node.kind == "argmax" else mb.reduce_argmin
    index = reduce(x=mb.reshape(x=x, shape=[-1]), axis=0)
    shape = [1] * x.rank if keep is not None and keep.val else []
    context.add(mb.reshape(x=index, shape=shape) if shape else mb.identity(x=index), torch_name=node.name)


def clamp(context: Any, node: Any) -> None:
    """Limits, by coremltools, but of integers, of which it makes floats where there is one limit only."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, *more = ops._get_inputs(context, node)
    given = zip(("min", "max"), [*more, None, None], strict=False)
    low, high = (ops._get_kwinputs(context, node, name, default=[value])[0] for name, value in given)
    if not all("int" in _kind(each) for each in (x, low, high) if each is not None):
        ops.clamp(context, node)
        return
    above = x if low is None else mb.maximum(x=x, y=low)
    below = above if high is None else mb.minimum(x=above, y=high)
    context.add(mb.identity(x=below, name=node.name))


COMPOSITES = {
    **dict.fromkeys(("argmax", "argmin"), argmax),
    "clamp": clamp,
    "add": add,
    "sub": sub,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    **dict.fromkeys(("rsub", "rsub.scalar"), rsub),
    "mul": mul,
    "view_as_complex": view_as_complex,
    **dict.fromkeys(("div", "true_divide"), div),
    "floor_divide": floor_divide,
    **dict.fromkeys(("fmod", "fmod.scalar"), fmod),
    **dict.fromkeys(("pow", "pow.tensor_tensor", "pow.scalar"), power),
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "outer": outer,
    **dict.fromkeys(("mean", "mean.dim"), mean),
    **dict.fromkeys(("sum", "sum.dim_intlist"), total),
}
