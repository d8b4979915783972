"""The primitives of a framework that operators are composed of.

An operator is written once, in `polyexport.lowering.operators`, if it is a composition of these; each framework's
folder builds its `Backend`, and has the operators that need other code in each framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Value = Any
"""A `polyexport.lowering.value.Value`, whose module imports this one."""

Tensor = Any
"""A tensor of the target framework; Python's arithmetic and comparisons work on it, and so do slices."""

Size = Any
"""The size of an axis: an `int` if it is known before the run, else a scalar tensor of the type `Backend.index`."""

Order = tuple[int, ...]
"""The logical axis at each stored position: `(0, 2, 3, 1)` is NCHW stored as NHWC."""

State = list[Tensor]

_ELEMENTS = (
    *("undefined", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16"),
    *("float64", "uint32", "uint64", "complex64", "complex128", "bfloat16"),
)

ELEMENT_TYPES = {number: name for number, name in enumerate(_ELEMENTS) if name not in ("undefined", "string")}
"""The names of element types by ONNX's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The primitives of one framework; types are numpy's, axes of tensors are counted from the first.

    Attributes:
        name: The framework's name, for messages.
        types: The types that it computes with, by ONNX's numbers of element types.
        index: The type of its sizes and indices.

        constant: numpy array to tensor.
        shape: A tensor's static shape: None for unknown sizes, None altogether for unknown rank.
        dtype: A tensor's type.
        evaluate: Runs a function of constants now; its tensors come back as numpy arrays.
        set_shape: Sets sizes that the framework could not infer; returns the tensor.
        scope: The graph under construction; a tensor of a branch must not be used outside of it.
        computed_in: The type that a value is cast to for an operator without kernels for its own; None for its own.
        sizes: The sizes of a value's axes.

        full: A tensor of some sizes and type filled with a number.
        zeros_like: Zeros of a tensor's shape, and of a type.
        range: The integers from a size up to another one, of the type `index`.
        normal: Normal random numbers: sizes, mean, deviation, seed or None, type.
        uniform: Uniform ones: sizes, lower and upper bound, seed or None, type.

        transpose: Tensor and permutation to tensor.
        reshape: To sizes of which one may be -1.
        broadcast: To sizes.
        squeeze: Without axes of size 1.
        unsqueeze: With new axes of size 1, ascending and counted in the result.
        concat, stack: Tensors along an axis; along a new axis.
        split: Into parts of some sizes along an axis.
        tile: Each axis so many times.
        flip: Reversed along axes.
        pad: By known amounts before and after each axis, negative ones crop; filled with a number or a scalar tensor.

        gather: Elements along an axis, in the shape of the indices, which may be a numpy array.
        gather_nd: Elements or slices, by the last axis of the indices.
        take_along: One element along an axis for each index; the indices have the result's shape.
        from_end: A value's indices, negative ones counted from a size, or from sizes; as the gathers take them.
        scatter_add: Zeros of a first size, with rows `(n, ...)` added at positions `(n,)`.
        nonzero: The indices of what is not zero, `(count, axes)`, int64.
        one_hot: Of indices from 0 up to a size, along a new axis: bool.

        cast: To a type.
        where: The second where the first is true, else the third, a tensor or a number.
        add: ONNX's Add, element by element as are all that follow; in compositions `+` is enough.
        add_n: The sum of several tensors of one shape.
        maximum, minimum: Of a tensor, and a tensor or a number.
        clip: Between two numbers.
        round: Halves to even numbers.
        elu: With its alpha, as has leaky_relu; the other elementary functions are called as numpy and ONNX call them.
        softmax, log_softmax: Along an axis.
        fourier: A transform: tensor `(..., n, ..., 1 or 2)`, its axis, whether it is the inverse, and how many
            frequencies are kept; `(..., kept, ..., 2)`.

        sum, mean, prod, max, min, log_sum_exp: Over axes; the last argument is whether they are kept with size 1. The
            max of bools is an or.
        peak: As max, over axes that are not empty.
        argmax, argmin: The first index along one axis; the last argument is whether the axis is kept.
        matmul: Of tensors of any rank, one included, and of integers.
        einsum: Equation, with its output, and tensors.

        cond: A scalar bool, and what is built for each branch: a list of tensors.
        loop: The maximum number of iterations; the first condition or None; states; a step from iteration and states to
            a list of the next condition, the next states and the scan outputs; the number of scan outputs. Returns the
            last states and the stacked scan outputs.
        steps: A step, from turn and row and states to output and states, along the first axis of a tensor.
        resize: Of a value, its resized axes and the mode, by the framework's own operator if that computes the same;
            else None.
        grid_sample: The same for GridSample: value, grid, mode, padding mode, whether corners are aligned.
        layer_norm: The same for LayerNormalization over the last axis: value, scale, bias or None, epsilon.
        recurrent: The same for a recurrent layer: its kind and activation functions, in lower case; `(time, batch, n)`;
            states `(directions, batch, width)`; ONNX's W, R, and B or None; lengths or None. Returns
            `(time, batch, directions * width)` and the last states.
    """

    name: str
    types: Mapping[int, np.dtype[Any]]
    index: np.dtype[Any]

    constant: Callable[[np.ndarray], Tensor]
    shape: Callable[[Tensor], tuple[int | None, ...] | None]
    dtype: Callable[[Tensor], np.dtype[Any]]
    evaluate: Callable[[Callable[[], Any]], Any]
    set_shape: Callable[[Tensor, Sequence[int | None]], Tensor]
    scope: Callable[[], Any]
    computed_in: Callable[[Value], np.dtype[Any] | None]
    sizes: Callable[[Value], list[Size]]

    full: Callable[[Sequence[Size], Any, np.dtype[Any]], Tensor]
    zeros_like: Callable[[Tensor, np.dtype[Any]], Tensor]
    range: Callable[[Size, Size], Tensor]
    normal: Callable[[Sequence[Size], float, float, float | None, np.dtype[Any]], Tensor]
    uniform: Callable[[Sequence[Size], float, float, float | None, np.dtype[Any]], Tensor]

    transpose: Callable[[Tensor, Sequence[int]], Tensor]
    reshape: Callable[[Tensor, Sequence[Size]], Tensor]
    broadcast: Callable[[Tensor, Sequence[Size]], Tensor]
    squeeze: Callable[[Tensor, Sequence[int]], Tensor]
    unsqueeze: Callable[[Tensor, Sequence[int]], Tensor]
    concat: Callable[[Sequence[Tensor], int], Tensor]
    stack: Callable[[Sequence[Tensor], int], Tensor]
    split: Callable[[Tensor, Sequence[Size], int], Sequence[Tensor]]
    tile: Callable[[Tensor, Sequence[Size]], Tensor]
    flip: Callable[[Tensor, Sequence[int]], Tensor]
    pad: Callable[[Tensor, Sequence[tuple[int, int]], Any], Tensor]

    gather: Callable[[Tensor, Any, int], Tensor]
    gather_nd: Callable[[Tensor, Tensor], Tensor]
    take_along: Callable[[Tensor, Tensor, int], Tensor]
    from_end: Callable[[Value, Any], Any]
    scatter_add: Callable[[Size, Tensor, Tensor], Tensor]
    nonzero: Callable[[Tensor], Tensor]
    one_hot: Callable[[Tensor, Size, int], Tensor]

    cast: Callable[[Tensor, np.dtype[Any]], Tensor]
    where: Callable[[Tensor, Tensor, Any], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]
    add_n: Callable[[Sequence[Tensor]], Tensor]
    maximum: Callable[[Tensor, Any], Tensor]
    minimum: Callable[[Tensor, Any], Tensor]
    clip: Callable[[Tensor, float, float], Tensor]
    abs: Callable[[Tensor], Tensor]
    ceil: Callable[[Tensor], Tensor]
    elu: Callable[[Tensor, float], Tensor]
    exp: Callable[[Tensor], Tensor]
    expm1: Callable[[Tensor], Tensor]
    floor: Callable[[Tensor], Tensor]
    leaky_relu: Callable[[Tensor, float], Tensor]
    log: Callable[[Tensor], Tensor]
    relu: Callable[[Tensor], Tensor]
    relu6: Callable[[Tensor], Tensor]
    round: Callable[[Tensor], Tensor]
    rsqrt: Callable[[Tensor], Tensor]
    sigmoid: Callable[[Tensor], Tensor]
    softplus: Callable[[Tensor], Tensor]
    softsign: Callable[[Tensor], Tensor]
    sqrt: Callable[[Tensor], Tensor]
    tanh: Callable[[Tensor], Tensor]
    softmax: Callable[[Tensor, int], Tensor]
    log_softmax: Callable[[Tensor, int], Tensor]
    fourier: Callable[[Tensor, int, bool, Size], Tensor]

    sum: Callable[[Tensor, Sequence[int], bool], Tensor]
    mean: Callable[[Tensor, Sequence[int], bool], Tensor]
    prod: Callable[[Tensor, Sequence[int], bool], Tensor]
    max: Callable[[Tensor, Sequence[int], bool], Tensor]
    min: Callable[[Tensor, Sequence[int], bool], Tensor]
    peak: Callable[[Tensor, Sequence[int], bool], Tensor]
    log_sum_exp: Callable[[Tensor, Sequence[int], bool], Tensor]
    argmax: Callable[[Tensor, int, bool], Tensor]
    argmin: Callable[[Tensor, int, bool], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]
    einsum: Callable[[str, Sequence[Tensor]], Tensor]

    cond: Callable[[Tensor, Callable[[], list[Tensor]], Callable[[], list[Tensor]]], Sequence[Tensor]]
    loop: Callable[
        [Tensor, Tensor | None, State, Callable[[Tensor, State], list[Tensor]], int], tuple[State, list[Tensor]]
    ]
    steps: Callable[[Tensor, State, Callable[[Any, Tensor, State], tuple[Tensor, State]]], tuple[Tensor, State]]
    resize: Callable[[Value, Any, Any], Value | None]
    grid_sample: Callable[[Value, Value, str, str, bool], Tensor | None]
    layer_norm: Callable[[Value, Value, Value | None, float], Tensor | None]
    recurrent: Callable[
        [tuple[str, ...], Tensor, State, tuple[Value, Value, Value | None], Tensor | None],
        tuple[Tensor, State] | None,
    ]

    def type_of(self, number: int) -> np.dtype[Any]:
        """The type of an ONNX element type number.

        Raises:
            NotImplementedError: the framework cannot compute with this type.
        """
        if number not in self.types:
            raise NotImplementedError(f"{self.name} has no arithmetic for ONNX's element type {number}")
        return self.types[number]

    def scalar(self, size: Size, dtype: Any) -> Tensor:
        """A size, or a scalar tensor, as a scalar tensor of a type."""
        kind = np.dtype(dtype)
        return self.full([], size, kind) if is_known(size) else self.cast(size, kind)

    def column(self, line: Tensor, axis: int, rank: int) -> Tensor:
        """A vector reshaped to broadcast along one axis of tensors of a rank."""
        return self.reshape(line, column_shape(axis, rank))


def column_shape(axis: int, rank: int) -> list[int]:
    """The shape by which a vector lies along one axis of tensors of a rank."""
    return [1] * axis + [-1] + [1] * (rank - axis - 1)


def is_known(size: Size) -> bool:
    """Whether a size is known before the run."""
    return isinstance(size, int | float | np.integer)


def static_of(sizes: Sequence[Size]) -> list[int | None]:
    """Sizes as a static shape has them: None where one is not known, or is -1."""
    return [int(size) if is_known(size) and size >= 0 else None for size in sizes]


def product(sizes: Sequence[Size]) -> Size:
    """Of sizes, some of which may be unknown before the run."""
    return math.prod(sizes[1:], start=sizes[0]) if sizes else 1


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type is real or complex, not integer or bool; numpy has no kind for bfloat16."""
    return dtype.kind not in "biu"
