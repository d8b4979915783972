"""Operators that normalise."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from polyexport.lowering.graph import Node
from polyexport.lowering.tensorflow.shape import padded
from polyexport.lowering.tensorflow.target import OPS, dtype_of, sizes_of
from polyexport.lowering.value import Tensor, Value, align


@OPS.op("LayerNormalization", since=17)
def layer_norm(
    x: Value, scale: Value, bias: Value | None = None,
    *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, node: Node,
) -> Any:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Over the axes from `axis` on, in the type that `stash_type` names; and the mean and 1 / deviation."""
    rank = x.rank or 0
    axes = list(range(axis % rank, rank))
    data = tf.cast(x.tensor, _stash(x, stash_type))
    mean = tf.reduce_mean(data, axes, keepdims=True)
    centred = data - mean
    inverse = tf.math.rsqrt(tf.reduce_mean(centred * centred, axes, keepdims=True) + epsilon)
    made = tf.cast(centred * inverse, tf.as_dtype(x.dtype)) * scale.tensor
    made = made if bias is None else made + bias.tensor
    return (made, mean, inverse) if node.wants(1) or node.wants(2) else made


def _stash(x: Value, stash_type: int) -> tf.DType:
    return tf.float64 if tf.as_dtype(x.dtype) == tf.float64 else dtype_of(stash_type)


@OPS.op("RMSNormalization", since=23)
def rms_norm(x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """By the root of the mean square over the axes from `axis` on."""
    rank = x.rank or 0
    data = tf.cast(x.tensor, _stash(x, stash_type))
    square = tf.reduce_mean(data * data, list(range(axis % rank, rank)), keepdims=True)
    return tf.cast(data * tf.math.rsqrt(square + epsilon), tf.as_dtype(x.dtype)) * scale.tensor


@OPS.op("InstanceNormalization", since=6)
def instance_norm(x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5, node: Node) -> Value:
    """Each channel of each sample by its own mean and variance."""
    rank = x.rank or 0
    axes = [x.placed(axis) for axis in range(2, rank)]
    data = x.stored
    mean = tf.reduce_mean(data, axes, keepdims=True)
    centred = data - mean
    normal = centred * tf.math.rsqrt(tf.reduce_mean(centred * centred, axes, keepdims=True) + epsilon)
    (made, times, plus), order = align(
        [node.value(normal, x.order), *(_channels(each, rank, node) for each in (scale, bias))]
    )
    return node.value(made * times + plus, order)


def _channels(value: Value, rank: int, node: Node) -> Value:
    """One entry per channel, so that it can be combined with a tensor of `rank` axes."""
    if value.known is not None:
        return node.value(value.known.reshape((-1,) + (1,) * (rank - 2)))
    return node.value(tf.reshape(value.tensor, [-1] + [1] * (rank - 2)))


@OPS.op("GroupNormalization", since=18)
def group_norm(
    x: Value, scale: Value, bias: Value,
    *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Groups of channels by their mean and variance; before opset 21 scale and bias are per group, then per channel."""
    batch, channels, *spatial = sizes_of(x)
    rank = x.rank or 0
    grouped = tf.reshape(x.tensor, tf.stack([batch, num_groups, channels // num_groups, *spatial]))
    data = tf.cast(grouped, _stash(x, stash_type))
    axes = list(range(2, rank + 1))
    mean = tf.reduce_mean(data, axes, keepdims=True)
    centred = data - mean
    normal = centred * tf.math.rsqrt(tf.reduce_mean(centred * centred, axes, keepdims=True) + epsilon)
    normal = tf.cast(normal, tf.as_dtype(x.dtype))
    per = [num_groups, 1] if node.version < 21 else [num_groups, -1]
    times, plus = (tf.reshape(each.tensor, per + [1] * (rank - 2)) for each in (scale, bias))
    made = tf.reshape(normal * times + plus, tf.shape(x.tensor))
    made.set_shape(x.shape)
    return made


@OPS.op("LRN")
def local_response(
    x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, node: Node
) -> Value:
    """By the squares of the neighbouring channels."""
    where, rank = x.placed(1), x.rank or 0
    square = x.stored * x.stored
    sides = [(0, 0)] * rank
    sides[where] = ((size - 1) // 2, size // 2)
    wide = padded(square, sides, tf.zeros([], square.dtype))
    count = tf.shape(square)[where]
    total = tf.add_n([tf.gather(wide, tf.range(i, i + count), axis=where) for i in range(size)])
    return node.value(x.stored / (bias + alpha / size * total) ** beta, x.order)


@OPS.op("MeanVarianceNormalization", since=9)
def mean_variance(x: Value, *, axes: list[int] | None = None) -> Tensor:
    """To mean 0 and variance 1."""
    chosen = axes or [0, 2, 3]
    mean = tf.reduce_mean(x.tensor, chosen, keepdims=True)
    centred = x.tensor - mean
    return centred / (tf.sqrt(tf.reduce_mean(centred * centred, chosen, keepdims=True)) + 1e-9)
