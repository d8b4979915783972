"""TensorFlow as the lowering sees it, and the table that the operators of this folder write themselves into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from polyexport.lowering.operators import Operators
from polyexport.lowering.value import Framework, Order, Tensor, Value
from polyexport.lowering.value import static as static

OPS = Operators()

_VARIABLE_FROM = 1024  # entries; smaller weights are written into the graph, where the runtime can fold them


class Weights:
    """The variables of one module, each made once however often its array is used.

    They are made while the graph is traced; `tf.Variable` would have `tf.function` trace it all a second time.
    """

    def __init__(self) -> None:
        self.variables: list[tf.Variable] = []
        self._by_array: dict[int, tuple[np.ndarray, tf.Variable]] = {}

    def tensor(self, array: np.ndarray) -> Tensor:
        """A constant, or for floats of some size a variable's value."""
        if array.size < _VARIABLE_FROM or array.dtype.kind != "f" or tf.executing_eagerly():
            return tf.constant(array)
        base = array if array.base is None else array.base
        key = hash((id(base), array.shape, array.strides, array.__array_interface__["data"][0]))
        if key not in self._by_array:
            with tf.init_scope():
                variable = ResourceVariable(np.ascontiguousarray(array), trainable=False)
            self._by_array[key] = (array, variable)  # the array is kept, so that its address stays its own
            self.variables.append(variable)
        return self._by_array[key][1].read_value()


def framework(weights: Weights) -> Framework:
    """TensorFlow, with its weights in `weights`."""
    return Framework(
        constant=weights.tensor,
        transpose=lambda tensor, permutation: tf.transpose(tensor, permutation),
        expand=lambda tensor, axes: tensor[(None,) * axes + (Ellipsis,)],
        shape=_shape,
        dtype=lambda tensor: np.dtype(tensor.dtype.as_numpy_dtype),
        evaluate=_evaluate,
        refine=told,
        scope=lambda: None if tf.executing_eagerly() else tf.compat.v1.get_default_graph(),
    )


def _shape(tensor: Tensor) -> tuple[int | None, ...] | None:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def _evaluate(function: Callable[[], list[Any]]) -> list[Any]:
    with tf.init_scope():
        return [_array(each) for each in function()]


def _array(content: Any) -> Any:
    if isinstance(content, list):
        return [_array(each) for each in content]
    if isinstance(content, Value):
        return content if content.known is not None else Value(content.framework, known=content.tensor.numpy())
    return np.asarray(content.numpy()) if isinstance(content, tf.Tensor) else content


def told(tensor: Tensor, sizes: Sequence[int | None] | None) -> Tensor:
    """The tensor, with sizes that TensorFlow could not infer; no `ensure_shape`, which TensorFlow.js cannot run."""
    tensor.set_shape(sizes)
    return tensor


def sizes_of(value: Value) -> list[Any]:
    """The size of each axis: an `int` where it is static, else a scalar int32 tensor."""
    shape = value.shape or ()
    if None not in shape:
        return list(shape)
    stored = tf.shape(value.stored)
    return [stored[value.placed(axis)] if size is None else size for axis, size in enumerate(shape)]


def like(value: Value, tensor: Tensor, order: Order | None) -> Value:
    """A result of `value`'s framework, stored in `order`."""
    return Value(value.framework, tensor, order)


def reached(value: Value) -> tuple[Tensor, Callable[[int], int]]:
    """A tensor as it is stored, and where each of its axes lies there."""
    return value.stored, value.placed


DTYPES = {
    1: tf.float32, 2: tf.uint8, 3: tf.int8, 4: tf.uint16, 5: tf.int16, 6: tf.int32, 7: tf.int64, 9: tf.bool,
    10: tf.float16, 11: tf.float64, 12: tf.uint32, 13: tf.uint64, 14: tf.complex64, 15: tf.complex128, 16: tf.bfloat16,
}  # fmt: skip  # a table, read as one
"""ONNX's numbers of element types."""


def dtype_of(number: int) -> tf.DType:
    """TensorFlow's name for an ONNX element type.

    Raises:
        NotImplementedError: TensorFlow computes with no such type.
    """
    if number not in DTYPES:
        raise NotImplementedError(f"TensorFlow has no arithmetic for ONNX's element type {number}")
    return DTYPES[number]
