"""Operators that normalize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.graph import Node
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value, align


def _normal(ops: Backend, x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """To mean 0 and variance 1 over axes; and the mean, and 1 / deviation."""
    mean = ops.mean(x, axes, True)
    centered = x - mean
    inverse = ops.rsqrt(ops.mean(centered * centered, axes, True) + epsilon)
    return centered * inverse, mean, inverse


@SHARED.op("LayerNormalization")
def layer_norm(
    ops: Backend,
    x: Value,
    scale: Value,
    bias: Value | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    node: Node,
) -> Any:
    """Over the axes from `axis` on, in the type that `stash_type` names; and the mean and 1 / deviation."""
    rank, statistics = x.rank or 0, node.wants(1) or node.wants(2)
    over_last = axis % rank == rank - 1
    if over_last and not statistics and (own := ops.layer_norm(x, scale, bias, epsilon)) is not None:
        return own
    normal, mean, inverse = _normal(ops, _stashed(ops, x.tensor, stash_type), range(axis % rank, rank), epsilon)
    made = ops.cast(normal, x.dtype) * scale.tensor
    made = made if bias is None else made + bias.tensor
    return (made, mean, inverse) if statistics else made


def _stashed(ops: Backend, tensor: Tensor, stash_type: int) -> Tensor:
    """In the type that the operator computes in, which is never a narrower one than the tensor's."""
    own, wanted = ops.dtype(tensor), ops.type_of(stash_type)
    return tensor if own.itemsize >= wanted.itemsize else ops.cast(tensor, wanted)


@SHARED.op("RMSNormalization")
def rms_norm(
    ops: Backend, x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """By the root of the mean square over the axes from `axis` on."""
    rank = x.rank or 0
    data = _stashed(ops, x.tensor, stash_type)
    square = ops.mean(data * data, range(axis % rank, rank), True)
    return ops.cast(data * ops.rsqrt(square + epsilon), x.dtype) * scale.tensor


def _scaled(ops: Backend, x: Value, scale: Value, bias: Value, node: Node) -> Value:
    """Each channel by its own factor, plus its own offset."""
    sizes = [-1] + [1] * ((x.rank or 2) - 2)
    parts = [
        node.value(ops.reshape(each.tensor, sizes) if each.known is None else each.known.reshape(sizes))
        for each in (scale, bias)
    ]
    (made, times, plus), order = align([x, *parts])
    return node.value(made * times + plus, order)


@SHARED.op("InstanceNormalization")
def instance_norm(ops: Backend, x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5, node: Node) -> Value:
    """Each channel of each sample by its own mean and variance."""
    normal, _, _ = _normal(ops, x.stored, [x.placed(axis) for axis in range(2, x.rank or 0)], epsilon)
    return _scaled(ops, node.value(normal, x.order), scale, bias, node)


@SHARED.op("BatchNormalization")
def batch_norm(
    ops: Backend,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    variance: Value,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    node: Node,
) -> Any:
    """Each channel by a mean and variance; in training mode by the batch's own, and the running ones follow them."""
    if training_mode:
        others = [axis for axis in range(x.rank or 2) if axis != 1]
        now = ops.mean(x.tensor, others, True)
        centered = x.tensor - now
        spread = ops.mean(centered * centered, others, True)
        running = [
            old.tensor * momentum + ops.reshape(new, [-1]) * (1 - momentum)
            for old, new in ((mean, now), (variance, spread))
        ]
        return (_scaled(ops, node.value(centered / ops.sqrt(spread + epsilon)), scale, bias, node), *running)
    if all(each.known is not None for each in (scale, bias, mean, variance)):
        factor = scale.known / np.sqrt(variance.known.astype(np.float64) + epsilon)  # type: ignore[union-attr]  # known
        offset = bias.known - mean.known * factor
    else:
        factor = scale.tensor / ops.sqrt(variance.tensor + epsilon)
        offset = bias.tensor - mean.tensor * factor
    times, plus = (node.value(each).cast(x.dtype) for each in (factor, offset))
    return _scaled(ops, x, times, plus, node)


@SHARED.op("GroupNormalization")
def group_norm(
    ops: Backend,
    x: Value,
    scale: Value,
    bias: Value,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    node: Node,
) -> Tensor:
    """Groups of channels by their mean and variance; before opset 21 scale and bias are per group, then per channel."""
    batch, channels, *spatial = ops.sizes(x)
    rank = x.rank or 0
    grouped = ops.reshape(x.tensor, [batch, num_groups, channels // num_groups, *spatial])
    normal, _, _ = _normal(ops, _stashed(ops, grouped, stash_type), range(2, rank + 1), epsilon)
    per = [num_groups, 1] if node.version < 21 else [num_groups, -1]
    times, plus = (ops.reshape(each.tensor, per + [1] * (rank - 2)) for each in (scale, bias))
    return ops.reshape(ops.cast(normal, x.dtype) * times + plus, ops.sizes(x))


@SHARED.op("LRN")
def local_response(
    ops: Backend, x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, node: Node
) -> Value:
    """By the squares of the neighboring channels."""
    axis, tensor = x.placed(1), x.stored
    sides = [(0, 0)] * (x.rank or 0)
    sides[axis] = ((size - 1) // 2, size // 2)
    wide, count = ops.pad(tensor * tensor, sides, 0), ops.sizes(x)[1]
    total = ops.add_n([wide[(slice(None),) * axis + (slice(i, i + count),)] for i in range(size)])
    return node.value(tensor / (bias + alpha / size * total) ** beta, x.order)


@SHARED.op("MeanVarianceNormalization")
def mean_variance(ops: Backend, x: Value, *, axes: list[int] | None = None) -> Tensor:
    """To mean 0 and variance 1."""
    chosen = [axis % (x.rank or 1) for axis in axes or [0, 2, 3]]
    centered = x.tensor - ops.mean(x.tensor, chosen, True)
    return centered / (ops.sqrt(ops.mean(centered * centered, chosen, True)) + 1e-9)
