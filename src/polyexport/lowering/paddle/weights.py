"""Paddle's types and weights, and constant folding while a program is built.

It handles gaps of Paddle's CPU kernels: a type with few kernels is widened around an operator, and a constant that
saving would change is stored as a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle

from polyexport.lowering.backend import ELEMENT_TYPES, Tensor
from polyexport.lowering.value import Value, as_arrays

_WIDE = {
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(np.int8): np.dtype(np.int32),
    np.dtype(np.uint8): np.dtype(np.int32),
    np.dtype(np.int16): np.dtype(np.int32),
}
"""Types that Paddle stores and casts but has few CPU kernels for, and the type to compute in instead."""

ONEDNN_AXES = 6  # its maximum rank; it has only float32 kernels, so float64 is not computed by it

_PARAMETER_FROM = 64  # entries; smaller constants are written into the program, where the runtime can fold them

_EXACT = 2**53  # a program's constants are saved as doubles


class Weights:
    """The parameters of one program, one for each array."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._made: dict[int, tuple[Any, Tensor]] = {}

    def tensor(self, array: np.ndarray) -> Tensor:
        """A constant: written into the program where that keeps it as it is, else a parameter."""
        dtype = paddle_dtype(array.dtype)
        if paddle.in_dynamic_mode():
            return paddle.to_tensor(array)
        if array.dtype.kind == "c":  # no parameter is complex
            return paddle.assign(array)
        if array.size and array.size < _PARAMETER_FROM and is_kept(array):
            plain = array if array.dtype not in _WIDE else array.astype(_WIDE[array.dtype])
            return paddle.cast(paddle.assign(np.ascontiguousarray(plain).reshape(plain.shape)), dtype)
        base = array if array.base is None else array.base
        program = paddle.static.default_main_program()  # the body of a loop is built once more and discarded
        key = hash((id(program), id(base), array.shape, array.strides, array.__array_interface__["data"][0]))
        if key not in self._made:
            name = paddle.utils.unique_name.generate("weight")
            pir = paddle.base.libpaddle.pir
            place = pir.get_current_insertion_point()
            pir.set_insertion_point_to_block_end(program.global_block())  # only what lies there is saved
            made = paddle.create_parameter(
                array.shape, dtype, name=name, default_initializer=paddle.nn.initializer.Constant(0)
            )
            pir.set_insertion_point(place)
            made.stop_gradient = True
            self.arrays[name] = array
            self._made[key] = ((program, array), made)  # kept alive, so that their ids are not reused
        return self._made[key][1]


def is_kept(array: np.ndarray) -> bool:
    """Whether a program that is saved and loaded has the same constant: it holds finite doubles only."""
    if array.dtype.kind == "c" or not np.isfinite(array).all():
        return False
    return array.dtype.kind == "f" or bool((abs(array.astype("f8")) < _EXACT).all())


def evaluate(function: Callable[[], Any]) -> Any:
    """Run a function of constants in dynamic mode."""
    if paddle.in_dynamic_mode():
        return as_arrays(function(), paddle.Tensor)
    paddle.disable_static()
    try:
        return as_arrays(function(), paddle.Tensor)
    finally:
        paddle.enable_static()


def set_shape(tensor: Tensor, sizes: Sequence[int | None] | None) -> Tensor:
    """The tensor, with sizes that Paddle could not infer."""
    if sizes is not None and not paddle.in_dynamic_mode():
        shape = [-1 if size is None else int(size) for size in sizes]
        tensor.set_type(paddle.base.libpaddle.pir.create_shaped_type(tensor.type(), shape))
    return tensor


def computed_in(value: Value) -> np.dtype[Any] | None:
    """float32 for halves, int32 for short integers, float64 where oneDNN has no kernel for so many axes."""
    if value.dtype == np.float32 and (value.rank or 0) > ONEDNN_AXES:
        return np.dtype(np.float64)
    return _WIDE.get(value.dtype)


_LACKING = {"uint16", "uint32", "uint64", "bfloat16"}  # its CPU kernels do not know the last

TYPES = {number: np.dtype(name) for number, name in ELEMENT_TYPES.items() if name not in _LACKING}
"""What Paddle computes with, by ONNX's numbers of element types."""


def paddle_dtype(dtype: Any) -> Any:
    """Paddle's name for a numpy type.

    Raises:
        NotImplementedError: Paddle has no such type.
    """
    given = np.dtype(dtype)
    if given not in TYPES.values():
        raise NotImplementedError(f"Paddle has no arithmetic for elements of type {given.name}")
    return getattr(paddle, given.name)


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """Numpy's name for a type of Paddle's."""
    return np.dtype(str(dtype).removeprefix("paddle."))
