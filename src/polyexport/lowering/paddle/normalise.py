"""Operators that normalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from polyexport.lowering.graph import Node
from polyexport.lowering.paddle.shape import padded
from polyexport.lowering.paddle.target import OPS, dtype_of, paddle_dtype, sizes_of, told, vector
from polyexport.lowering.value import Tensor, Value


def _normal(x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """To mean 0 and variance 1 over axes; and the mean, and 1 / deviation."""
    mean = paddle.mean(x, axes, keepdim=True)
    centred = x - mean
    inverse = paddle.rsqrt(paddle.mean(centred * centred, axes, keepdim=True) + epsilon)
    return centred * inverse, mean, inverse


@OPS.op("LayerNormalization", since=17)
def layer_norm(
    x: Value, scale: Value, bias: Value | None = None,
    *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, node: Node,
) -> Any:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Over the axes from `axis` on, in the type that `stash_type` names; and the mean and 1 / deviation."""
    rank = x.rank or 0
    normal, mean, inverse = _normal(_stashed(x, stash_type), list(range(axis % rank, rank)), epsilon)
    made = paddle.cast(normal, x.tensor.dtype) * scale.tensor
    made = made if bias is None else made + bias.tensor
    return (made, mean, inverse) if node.wants(1) or node.wants(2) else made


def _stashed(x: Value, stash_type: int) -> Tensor:
    """In the type that the operator computes in, which is never a narrower one than the tensor's."""
    if x.dtype.name == "float64" or dtype_of(stash_type).name == "float16":
        return x.tensor
    return paddle.cast(x.tensor, paddle_dtype(dtype_of(stash_type)))


@OPS.op("RMSNormalization", since=23)
def rms_norm(x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """By the root of the mean square over the axes from `axis` on."""
    rank = x.rank or 0
    data = _stashed(x, stash_type)
    square = paddle.mean(data * data, list(range(axis % rank, rank)), keepdim=True)
    return paddle.cast(data * paddle.rsqrt(square + epsilon), x.tensor.dtype) * scale.tensor


@OPS.op("InstanceNormalization", since=6)
def instance_norm(x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each sample by its own mean and variance."""
    rank = x.rank or 0
    normal, _, _ = _normal(x.tensor, list(range(2, rank)), epsilon)
    times, plus = (paddle.reshape(each.tensor, [-1] + [1] * (rank - 2)) for each in (scale, bias))
    return normal * times + plus


@OPS.op("GroupNormalization", since=18)
def group_norm(
    x: Value, scale: Value, bias: Value,
    *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1, node: Node,
) -> Tensor:  # fmt: skip  # the inputs on one line, the attributes on the next
    """Groups of channels by their mean and variance; before opset 21 scale and bias are per group, then per channel."""
    batch, channels, *spatial = sizes_of(x)
    rank = x.rank or 0
    grouped = paddle.reshape(
        _stashed(x, stash_type), vector([batch, num_groups, channels // num_groups, *spatial])
    )  # fmt: skip  # one call
    normal, _, _ = _normal(grouped, list(range(2, rank + 1)), epsilon)
    per = [num_groups, 1] if node.version < 21 else [num_groups, -1]
    times, plus = (paddle.reshape(each.tensor, per + [1] * (rank - 2)) for each in (scale, bias))
    made = paddle.cast(normal, x.tensor.dtype) * times + plus
    return told(paddle.reshape(made, vector(sizes_of(x))), x.shape)


@OPS.op("LRN")
def local_response(x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """By the squares of the neighbouring channels."""
    sides = [(0, 0)] * (x.rank or 0)
    sides[1] = ((size - 1) // 2, size // 2)
    wide = padded(x.tensor * x.tensor, sides, 0.0)
    count = sizes_of(x)[1]
    total = paddle.add_n([wide[:, i : i + count] for i in range(size)])
    return x.tensor / (bias + alpha / size * total) ** beta


@OPS.op("MeanVarianceNormalization", since=9)
def mean_variance(x: Value, *, axes: list[int] | None = None) -> Tensor:
    """To mean 0 and variance 1."""
    chosen = axes or [0, 2, 3]
    centred = x.tensor - paddle.mean(x.tensor, chosen, keepdim=True)
    return centred / (paddle.sqrt(paddle.mean(centred * centred, chosen, keepdim=True)) + 1e-9)
