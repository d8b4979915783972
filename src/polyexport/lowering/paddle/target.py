"""Paddle as the lowering sees it, and the table that the operators of this folder write themselves into.

What Paddle's CPU kernels leave open is settled here once: a type that has hardly a kernel is widened around an
operator, and a constant that a saved program would change is kept beside it as a parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import paddle

from polyexport.lowering.graph import Node
from polyexport.lowering.operators import Function, Operators
from polyexport.lowering.value import Framework, Tensor, Value
from polyexport.lowering.value import static as static

F = TypeVar("F", bound=Function)

_WIDE = {
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(np.int8): np.dtype(np.int32),
    np.dtype(np.uint8): np.dtype(np.int32),
    np.dtype(np.int16): np.dtype(np.int32),
}
"""Types that Paddle stores and casts but has hardly a CPU kernel for, and the type that is computed in instead."""

_ONEDNN_AXES = 6  # more than that it does not take; its kernels are of float32, so that float64 goes past it

_PARAMETER_FROM = 64  # entries; smaller constants are written into the program, where the runtime can fold them

_EXACT = 2**53  # a program's constants are saved as doubles


class _Widening(Operators):
    """Operators of which most never see a type of few kernels."""

    def op(self, *names: str, since: int = 1, domain: str = "", narrow: bool = False) -> Callable[[F], F]:
        """Declare an operator's function; unless it takes `narrow` types, it gets float32 and int32 in their place.

        The outputs that ONNX defines to be of such an input's type are cast back to it.
        """
        declare = super().op(*names, since=since, domain=domain)

        def keep(function: F) -> F:
            declare(function if narrow else _widened(function))
            return function

        return keep


OPS = _Widening()


def _widened(function: Function) -> Function:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())

    def apply(*inputs: Any, node: Node, **attributes: Any) -> Any:
        if "node" in signature.parameters:
            attributes["node"] = node
        wide = [_wide(value) for value in inputs]
        result = function(*wide, **attributes)
        if all(new is old for new, old in zip(wide, inputs, strict=True)):
            return result
        results = result if isinstance(result, tuple) else (result,)
        types = _types(node, inputs)
        return tuple(_narrowed(each, types.get(place), node) for place, each in enumerate(results))

    if "node" not in signature.parameters:
        last = len(parameters) - any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        parameters.insert(last, inspect.Parameter("node", inspect.Parameter.KEYWORD_ONLY))
    apply.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # inspect reads it
    return apply


def _wide(value: Any) -> Any:
    """The value in a type with kernels; itself where it has one, or where it is no tensor."""
    wider = _wider(value)
    return value if wider is None else cast(value, wider)


def _wider(value: Any) -> np.dtype[Any] | None:
    if not isinstance(value, Value):
        return None
    if value.dtype == np.float32 and (value.rank or 0) > _ONEDNN_AXES:
        return np.dtype(np.float64)
    return _WIDE.get(value.dtype)


def _types(node: Node, inputs: Sequence[Any]) -> Mapping[int, np.dtype[Any]]:
    """For each output that ONNX defines to be of a widened input's type: which type that is."""
    import onnx

    schema: Any = onnx.defs.get_schema(node.proto.op_type, node.version, node.proto.domain)
    given = {}
    for place, value in enumerate(inputs):
        if _wider(value) is not None:
            given[schema.inputs[min(place, len(schema.inputs) - 1)].type_str] = value.dtype
    names = [schema.outputs[min(place, len(schema.outputs) - 1)].type_str for place in range(node.outputs)]
    return {place: given[name] for place, name in enumerate(names) if name in given}


def _narrowed(result: Any, dtype: np.dtype[Any] | None, node: Node) -> Any:
    if dtype is None or result is None or isinstance(result, list):
        return result
    return cast(result if isinstance(result, Value) else node.value(result), dtype)


def cast(value: Value, dtype: np.dtype[Any]) -> Value:
    """The value in another type, now where it is known."""
    if value.dtype == dtype:
        return value
    if value.known is not None:
        return Value(value.framework, known=value.known.astype(dtype))
    return Value(value.framework, paddle.cast(value.tensor, paddle_dtype(dtype)))


class Weights:
    """The parameters of one program: each is made once, however often its array is used."""

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
        if array.size and array.size < _PARAMETER_FROM and _is_kept(array):
            plain = array if array.dtype not in _WIDE else array.astype(_WIDE[array.dtype])
            return paddle.cast(paddle.assign(np.ascontiguousarray(plain).reshape(plain.shape)), dtype)
        base = array if array.base is None else array.base
        program = paddle.static.default_main_program()  # the body of a loop is built once beside the one that is kept
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
            self._made[key] = ((program, array), made)  # they are kept, so that their addresses stay their own
        return self._made[key][1]


def _is_kept(array: np.ndarray) -> bool:
    """Whether a program that is saved and loaded has the same constant: it holds finite doubles only."""
    return bool(np.isfinite(array).all()) and (
        array.dtype.kind == "f" or bool((abs(array.astype("f8")) < _EXACT).all())
    )


def framework(weights: Weights) -> Framework:
    """Paddle, with its weights in `weights`; it keeps ONNX's order of axes, so that nothing is stored in another."""
    return Framework(
        constant=weights.tensor,
        transpose=lambda tensor, permutation: paddle.transpose(tensor, list(permutation)),
        expand=lambda tensor, axes: paddle.unsqueeze(tensor, list(range(axes))),
        shape=lambda tensor: tuple(None if size < 0 else int(size) for size in tensor.shape),
        dtype=lambda tensor: numpy_dtype(tensor.dtype),
        evaluate=_evaluate,
        refine=told,
        scope=lambda: None,
    )


def _evaluate(function: Callable[[], list[Any]]) -> list[Any]:
    if paddle.in_dynamic_mode():
        return [_array(each) for each in function()]
    paddle.disable_static()
    try:
        return [_array(each) for each in function()]
    finally:
        paddle.enable_static()


def _array(content: Any) -> Any:
    if isinstance(content, list):
        return [_array(each) for each in content]
    if isinstance(content, Value):
        return content if content.known is not None else Value(content.framework, known=_array(content.tensor))
    return np.asarray(content.numpy()) if isinstance(content, paddle.Tensor) else content


def told(tensor: Tensor, sizes: Sequence[int | None] | None) -> Tensor:
    """The tensor, with sizes that Paddle could not infer."""
    if sizes is not None and not paddle.in_dynamic_mode():
        shape = [-1 if size is None else int(size) for size in sizes]
        tensor.set_type(paddle.base.libpaddle.pir.create_shaped_type(tensor.type(), shape))
    return tensor


def sizes_of(value: Value) -> list[Any]:
    """The size of each axis: an `int` where it is static, else a scalar int64 tensor."""
    shape = value.shape or ()
    if None not in shape:
        return list(shape)
    sizes = paddle.cast(paddle.shape(value.tensor), "int64")
    return [sizes[axis] if size is None else size for axis, size in enumerate(shape)]


def entries_of(shape: Value, node: Node) -> list[Any]:
    """What a shape says, entry by entry: an `int` where it is known, else a scalar int64 tensor.

    Raises:
        UnsupportedOp: not even the number of entries is known.
    """
    if shape.sizes is not None and None not in shape.sizes:
        return [int(each) for each in shape.sizes.ravel()]
    count = (shape.shape or (None,))[0]
    if count is None:
        raise node.unsupported("how many axes its result has is not known before the run")
    content = paddle.cast(shape.tensor, "int64")
    sizes = [None] * count if shape.sizes is None else shape.sizes
    return [content[i] if size is None else int(size) for i, size in enumerate(sizes)]


def moved(tensor: Tensor, axes: int, move: Callable[[Tensor], Tensor]) -> Tensor:
    """What becomes of a tensor that is only moved, to a number of axes; past oneDNN where that takes no such number."""
    if tensor.dtype != paddle.float32 or max(axes, len(tensor.shape)) <= _ONEDNN_AXES:
        return move(tensor)
    return paddle.cast(move(paddle.cast(tensor, "float64")), "float32")


def shaped(tensor: Tensor, sizes: Sequence[Any]) -> Tensor:
    """Reshaped to sizes of which some may be scalar tensors; an `int` of 0 is meant as one."""
    return moved(tensor, len(sizes), lambda each: _shaped(each, sizes))


def _shaped(tensor: Tensor, sizes: Sequence[Any]) -> Tensor:
    free = [axis for axis, size in enumerate(sizes) if is_tensor(size)]
    if 0 in [size for size in sizes if not is_tensor(size)]:
        return paddle.zeros(list(sizes), tensor.dtype)  # Paddle's reshape would keep a size there
    if len(free) == 1 and -1 not in [size for size in sizes if not is_tensor(size)]:
        return paddle.reshape(tensor, [-1 if is_tensor(size) else int(size) for size in sizes])
    return paddle.reshape(tensor, list(sizes))


def vector(entries: Sequence[Any]) -> Tensor:
    """An int64 tensor of integers of which some are scalar tensors."""
    if not any(is_tensor(each) for each in entries):
        return paddle.to_tensor(np.array(entries, np.int64)) if paddle.in_dynamic_mode() else paddle.assign(
            np.array(entries, np.int64)
        )  # fmt: skip  # a choice on two lines
    scalars = [paddle.cast(each, "int64") if is_tensor(each) else paddle.full([], each, "int64") for each in entries]
    return paddle.stack([paddle.reshape(each, []) for each in scalars])


def is_tensor(content: Any) -> bool:
    """Whether it is a tensor of Paddle, and not an integer that is known."""
    return not isinstance(content, int | float | np.generic)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor's elements are real or complex, and no integers."""
    return numpy_dtype(tensor.dtype).kind in "fc"


DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    14: "complex64", 15: "complex128",
}  # fmt: skip  # a table, read as one
"""ONNX's numbers of element types."""


def dtype_of(number: int) -> np.dtype[Any]:
    """Numpy's name for an ONNX element type.

    Raises:
        NotImplementedError: Paddle computes with no such type.
    """
    if number not in DTYPES:
        raise NotImplementedError(f"Paddle has no arithmetic for ONNX's element type {number}")
    return np.dtype(DTYPES[number])


def paddle_dtype(dtype: Any) -> Any:
    """Paddle's name for a numpy type.

    Raises:
        NotImplementedError: Paddle has no such type.
    """
    name = np.dtype(dtype).name
    if name not in DTYPES.values():
        raise NotImplementedError(f"Paddle has no arithmetic for elements of type {name}")
    return getattr(paddle, name)


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """Numpy's name for a type of Paddle's."""
    return np.dtype(str(dtype).removeprefix("paddle."))
