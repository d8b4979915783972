"""TensorFlow's weights, and constant folding while a graph is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from polyexport.lowering.backend import Tensor
from polyexport.lowering.value import as_arrays

VARIABLE_FROM = 1024  # entries; smaller weights are written into the graph, where the runtime can fold them


class Weights:
    """The variables of one module, one for each array.

    They are created while the graph is traced, where `tf.Variable` would make `tf.function` trace everything again.
    """

    def __init__(self) -> None:
        self.variables: list[tf.Variable] = []
        self._by_array: dict[int, tuple[np.ndarray, tf.Variable]] = {}

    def tensor(self, array: np.ndarray) -> Tensor:
        """A constant, or for large floats a variable's value."""
        if array.size < VARIABLE_FROM or array.dtype.kind != "f" or tf.executing_eagerly():
            return tf.constant(array)
        base = array if array.base is None else array.base
        key = hash((id(base), array.shape, array.strides, array.__array_interface__["data"][0]))
        if key not in self._by_array:
            with tf.init_scope():
                variable = ResourceVariable(np.ascontiguousarray(array), trainable=False)
            self._by_array[key] = (array, variable)  # the array is kept alive, so that its id is not reused
            self.variables.append(variable)
        return self._by_array[key][1].read_value()


def evaluate(function: Callable[[], Any]) -> Any:
    """Run a function of constants outside of the graph."""
    with tf.init_scope():
        return as_arrays(function(), tf.Tensor)


def set_shape(tensor: Tensor, sizes: Sequence[int | None] | None) -> Tensor:
    """The tensor, with sizes that TensorFlow could not infer; no `ensure_shape`, which TensorFlow.js cannot run."""
    tensor.set_shape(sizes)
    return tensor
