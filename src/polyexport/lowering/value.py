"""The values on the edges of a graph while it is lowered.

Requirements:
* Known values stay known: constants are numpy arrays until an operator needs a tensor, and the
  contents of shapes are tracked element by element, so that a dynamic batch leaves the other sizes static.
* Layout is lazy: a tensor is stored in any order of its axes, and is transposed only for an operator that asks for
  another one. Transposes that meet cancel, whether they come from the model or from a convolution's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polyexport.lowering.backend import Backend, Order, Tensor

Sizes = np.ndarray
"""Integers of which some may be unknown: an object array of `int` and None, of rank 0 or 1."""


class Value:
    """A tensor of the ONNX graph; its axes are counted as ONNX counts them, however it is stored."""

    def __init__(
        self,
        backend: Backend,
        stored: Tensor = None,
        order: Order | None = None,
        *,
        known: np.ndarray | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        self.backend = backend
        self.known = known
        self.sizes = known if sizes is None and known is not None and known.dtype.kind in "iu" else sizes
        self._stored = stored
        self._order = order
        self._transposed: dict[tuple[Order, int], Tensor] = {}

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """Static sizes; None for a dynamic one, None if not even the rank is known."""
        if self.known is not None:
            return tuple(self.known.shape)
        stored = self.backend.shape(self._stored)
        if stored is None or self._order is None:
            return stored
        return tuple(stored[self._order.index(axis)] for axis in range(len(stored)))

    @property
    def rank(self) -> int | None:
        """Number of axes, None where it is unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements, as numpy names it."""
        return self.known.dtype if self.known is not None else self.backend.dtype(self._stored)

    @property
    def order(self) -> Order | None:
        """The order of the stored axes; None if it is ONNX's."""
        return None if self._order is None or self._order == tuple(sorted(self._order)) else self._order

    @property
    def stored(self) -> Tensor:
        """The tensor as it is stored, in `order`."""
        return self.backend.constant(self.known) if self.known is not None else self._stored

    @property
    def tensor(self) -> Tensor:
        """The tensor with its axes in ONNX's order."""
        return self.stored if self.order is None else self.in_order(tuple(sorted(self.order)))

    def in_order(self, order: Order) -> Tensor:
        """The tensor stored in another order; transposed only once."""
        if self.known is not None:
            return self.backend.constant(self.known.transpose(order))
        have = self._order or tuple(range(len(order)))
        if have == order:
            return self._stored
        key = (order, id(self.backend.scope()))
        if key not in self._transposed:
            self._transposed[key] = self.backend.transpose(self._stored, tuple(have.index(axis) for axis in order))
        return self._transposed[key]

    def is_in_order(self, order: Order) -> bool:
        """Whether the tensor in that order costs no transpose."""
        have = self._order or tuple(range(len(order)))
        return self.known is not None or have == order or (order, id(self.backend.scope())) in self._transposed

    def permuted(self, permutation: Sequence[int]) -> Value:
        """ONNX's Transpose: only the order is changed, and nothing is moved."""
        if self.known is not None:
            return Value(self.backend, known=self.known.transpose(permutation))
        have = self._order or tuple(range(len(permutation)))
        position = {old: new for new, old in enumerate(permutation)}
        return Value(self.backend, self._stored, tuple(position[axis] for axis in have))

    def widened(self, rank: int) -> Value:
        """With leading axes of size 1, up to a rank, as broadcasting adds them."""
        missing = rank - len(self.shape or ())
        if not missing:
            return self
        if self.known is not None:
            return Value(self.backend, known=self.known.reshape((1,) * missing + self.known.shape))
        return Value(self.backend, self.backend.unsqueeze(self.tensor, range(missing)))

    def cast(self, dtype: np.dtype[Any]) -> Value:
        """Cast to another type, now if it is known."""
        if self.dtype == dtype:
            return self
        if self.known is not None:
            return Value(self.backend, known=self.known.astype(dtype))
        return Value(self.backend, self.backend.cast(self._stored, dtype), self._order)

    def without(self, gone: Sequence[int]) -> Order | None:
        """The order of the remaining axes when some are removed."""
        if self.order is None:
            return None
        left = [axis for axis in self.order if axis not in gone]
        return tuple(sorted(left).index(axis) for axis in left)

    def placed(self, axis: int) -> int:
        """The position of an axis, which may be negative, in the stored tensor."""
        if axis < 0:
            axis += len(self.shape or ())
        return axis if self._order is None else self._order.index(axis)


def align(values: Sequence[Value]) -> tuple[list[Tensor], Order | None]:
    """Tensors that can be combined element by element, and the order that they, and the result, are stored in.

    It is the order that costs the fewest transposes: a residual that a product has already been made of is there in the
    product's order too.
    """
    ranks = [value.rank for value in values]
    if None in ranks:
        return [value.tensor for value in values], None
    rank = max(rank for rank in ranks if rank is not None)
    whole = [value for value in values if value.rank == rank]
    orders = [value.order for value in whole if value.order]
    if not orders:
        return [value.tensor for value in values], None
    plain = tuple(range(rank))
    order = min([*orders, plain], key=lambda order: sum(not value.is_in_order(order) for value in whole))
    return [value.tensor if value.rank == 0 else value.widened(rank).in_order(order) for value in values], order


def static(value: Value | None) -> list[int] | None:
    """The integers of an input, if all are known."""
    if value is None or value.known is None:
        return [] if value is not None and value.shape == (0,) else None
    return [int(entry) for entry in value.known.ravel()]


def as_arrays(content: Any, tensor: type[Any]) -> Any:
    """What a function of constants has returned, with its tensors, of the type `tensor`, as numpy arrays."""
    if isinstance(content, list | tuple):
        return [as_arrays(each, tensor) for each in content]
    if isinstance(content, Value):
        return content if content.known is not None else Value(content.backend, known=as_arrays(content.tensor, tensor))
    return np.asarray(content.numpy()) if isinstance(content, tensor) else content
