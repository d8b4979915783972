"""Global pools, and the inverse of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polyexport.lowering.backend import Backend, Tensor, is_known, product
from polyexport.lowering.graph import Node
from polyexport.lowering.operators.shape import entries, padded_axis
from polyexport.lowering.table import SHARED
from polyexport.lowering.value import Value


def _global(reduce: Callable[[Backend, Tensor, Sequence[int]], Tensor]) -> Callable[..., Value]:
    def apply(ops: Backend, x: Value, *, node: Node) -> Value:
        return node.value(reduce(ops, x.stored, [x.placed(axis) for axis in range(2, x.rank or 0)]), x.order)

    return apply


SHARED.op("GlobalAveragePool")(_global(lambda ops, x, axes: ops.mean(x, axes, True)))
SHARED.op("GlobalMaxPool")(_global(lambda ops, x, axes: ops.peak(x, axes, True)))


@SHARED.op("GlobalLpPool", since=2)
def global_norm_pool(ops: Backend, x: Value, *, p: int = 2) -> Tensor:
    """The p-norm of each channel."""
    return ops.sum(ops.abs(x.tensor) ** p, range(2, x.rank or 0), True) ** (1 / p)


@SHARED.op("MaxUnpool")
def max_unpool(
    ops: Backend,
    x: Value,
    indices: Value,
    output_shape: Value | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    node: Node,
) -> Tensor:
    """Put each element back at the flat index that MaxPool returned; indices are those of the unpadded result."""
    count = len(kernel_shape)
    strides, pads = strides or [1] * count, pads or [0] * (2 * count)
    batch, channels, *sizes = ops.sizes(x)
    own = [
        (size - 1) * stride + k - pads[i] - pads[i + count]
        for i, (size, stride, k) in enumerate(zip(sizes, strides, kernel_shape, strict=True))
    ]
    shape = [batch, channels, *own]
    flat = ops.scatter_add(product(shape), ops.reshape(indices.tensor, [-1]), ops.reshape(x.tensor, [-1]))
    made = ops.reshape(flat, shape)
    if output_shape is None:
        return made
    for axis, wanted in enumerate(entries(ops, output_shape, node)[2:], 2):
        missing = wanted - shape[axis]
        if not is_known(missing) or missing:
            made = padded_axis(ops, made, axis, 0, missing, ops.full([], 0, x.dtype))
    return made
