"""PyTorch's functions that find distinct elements, as sorts and comparisons; registered by `composite_ops.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polyexport.coreml.patches.scatter_ops import _kind


def unique(context: Any, node: Any) -> None:
    """The sorted distinct elements, the index of each element among them, and how often each occurs.

    coremltools drops the axis of a single one, and counts those with a fraction as integers.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x = ops._get_inputs(context, node)[0]
    flat = mb.cast(x=mb.reshape(x=x, shape=[-1]), dtype="fp32")
    order, begins = _runs(flat)
    found = mb.gather(x=mb.gather(x=flat, indices=order), indices=begins)
    position, counts = _indices_of(flat, found)
    positions = mb.reshape(x=position, shape=mb.shape(x=x))
    _add_all(context, node, mb.cast(x=found, dtype=_kind(x)), positions, counts)


def unique_dim(context: Any, node: Any) -> None:
    """The same of slices along an axis, in the order of their first different elements.

    Raises:
        NotImplementedError: slices have an unknown size, or more elements than the powers of 2 that are exact.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    x, dim = ops._get_inputs(context, node)[:2]
    axis = int(dim.val) % x.rank
    order = [axis, *(each for each in range(x.rank) if each != axis)]
    rest = [x.shape[each] for each in order[1:]]
    width = 1 if not rest else 0 if any(map(is_symbolic, rest)) else math.prod(map(int, rest))
    if not 0 < width <= _EXACT_BITS:
        raise NotImplementedError(f"{node.kind} of slices of shape {rest}")
    moved = mb.transpose(x=x, perm=order)
    rows = mb.cast(x=mb.reshape(x=moved, shape=[-1, width]), dtype="fp32")
    apart = mb.sign(x=mb.sub(x=mb.expand_dims(x=rows, axes=[1]), y=mb.expand_dims(x=rows, axes=[0])))
    weights = np.array([[[2 ** (width - 1 - each) for each in range(width)]]], np.float32)
    above = mb.greater(x=mb.reduce_sum(x=mb.mul(x=apart, y=weights), axes=[2]), y=np.float32(0))
    rank = mb.reduce_sum(x=mb.cast(x=above, dtype="fp32"), axes=[1])  # how many are smaller
    ordered, begins = _runs(rank)
    chosen = mb.gather(x=ordered, indices=begins)
    position, counts = _indices_of(rank, mb.gather(x=rank, indices=chosen))
    found = mb.gather(x=mb.cast(x=moved, dtype="fp32"), indices=chosen, axis=0)
    values = mb.transpose(x=found, perm=[int(each) for each in np.argsort(order)])
    _add_all(context, node, mb.cast(x=values, dtype=_kind(x)), position, counts)


_EXACT_BITS = 24


def unique_consecutive(context: Any, node: Any) -> None:
    """The first of each run of equal elements, the number of each element's run, and how long each is.

    Raises:
        NotImplementedError: they are slices along an axis.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    x, *more = ops._get_inputs(context, node)
    (dim,) = ops._get_kwinputs(context, node, "dim", default=[more[2] if len(more) > 2 else None])
    if dim is not None and x.rank > 1:
        raise NotImplementedError(f"{node.kind} along an axis")
    flat = mb.cast(x=mb.reshape(x=x, shape=[-1]), dtype="fp32")
    is_new = _is_new(flat)
    found = mb.gather(x=flat, indices=_indices(is_new))
    total = mb.cumsum(x=mb.cast(x=is_new, dtype="fp32"), axis=0)  # with one more at the end
    number = mb.slice_by_index(x=mb.sub(x=total, y=np.float32(1)), begin=[0], end=[-1])
    _, counts = _indices_of(number, mb.gather(x=number, indices=_indices(is_new)))
    positions = mb.reshape(x=mb.cast(x=number, dtype="int32"), shape=mb.shape(x=x))
    _add_all(context, node, mb.cast(x=found, dtype=_kind(x)), positions, counts)


def _runs(keys: Any) -> tuple[Any, Any]:
    """The order of keys of one axis, and where in it each run of equal ones begins."""
    from coremltools.converters.mil import Builder as mb

    order = mb.argsort(x=keys, ascending=True)
    return order, _indices(_is_new(mb.gather_along_axis(x=keys, indices=order)))


def _is_new(keys: Any) -> Any:
    """1 where a key differs from the one before, as the first one does, and 0 elsewhere and behind the last one."""
    from coremltools.converters.mil import Builder as mb

    before = mb.pad(x=keys, pad=[1, 0], constant_val=np.float32(-np.inf))
    after = mb.pad(x=keys, pad=[0, 1], mode="replicate")
    return mb.cast(x=mb.not_equal(x=after, y=before), dtype="int32")


def _indices(is_set: Any) -> Any:
    from coremltools.converters.mil import Builder as mb

    return mb.squeeze(x=mb.non_zero(x=is_set), axes=[1])


def _indices_of(keys: Any, found: Any) -> tuple[Any, Any]:
    """The index of each key among distinct ones, and how often each of these occurs."""
    from coremltools.converters.mil import Builder as mb

    same = mb.equal(x=mb.expand_dims(x=found, axes=[1]), y=mb.expand_dims(x=keys, axes=[0]))
    position = mb.reduce_argmax(x=mb.cast(x=same, dtype="fp32"), axis=0)
    return position, mb.reduce_sum(x=mb.cast(x=same, dtype="int32"), axes=[1])


def _add_all(context: Any, node: Any, *values: Any) -> None:
    """All results of a node with several; a trace names each one, and `torch.export` the tuple."""
    from coremltools.converters.mil.frontend.torch.ops import TorchFrontend

    if context.frontend == TorchFrontend.TORCHSCRIPT:
        for name, made in zip(node.outputs, values, strict=True):
            context.add(made, torch_name=name)
    else:
        context.add(values, torch_name=node.name)


COMPOSITES = {"_unique2": unique, "unique_dim": unique_dim, "unique_consecutive": unique_consecutive}
