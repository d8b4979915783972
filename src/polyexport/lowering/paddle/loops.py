"""Branches and loops, as Paddle has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle

from polyexport.lowering.backend import State, Tensor
from polyexport.lowering.paddle.primitives import cast, static_shape
from polyexport.lowering.paddle.weights import numpy_dtype, set_shape


def cond(flag: Tensor, *branches: Callable[[], list[Tensor]]) -> Sequence[Tensor]:
    """By the static graph's branches."""
    made = paddle.static.nn.cond(flag, *(_owned(branch) for branch in branches))
    return made if isinstance(made, list | tuple) else [made]


def _owned(branch: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """What leaves a block, as tensors of that block."""
    return lambda: [paddle.assign(each) for each in branch()]


def loop(
    limit: Tensor, first: Tensor | None, states: State, step: Callable[[Tensor, State], list[Tensor]], scans: int
) -> tuple[State, list[Tensor]]:
    """By a `while_loop`, whose scan outputs go into arrays."""
    arrays: list[Any] = []

    def stepped(turn: Tensor, carried: State) -> list[Tensor]:
        found = [paddle.assign(each) for each in step(turn, carried)]
        return [_true(), *found] if first is None else [paddle.reshape(found[0], []), *found[1:]]

    def body(turn: Tensor, _: Tensor, *carried: Tensor) -> list[Tensor]:
        flag, *found = stepped(turn, list(carried))
        for array, each in zip(arrays, found[len(carried) :], strict=True):
            paddle.tensor.array_write(each, turn, array)
        return [turn + 1, flag, *found[: len(carried)]]

    arrays += [paddle.tensor.create_array(kind) for kind in _kinds(stepped, states, scans)]
    flag = _true() if first is None else paddle.assign(first)
    start = [paddle.zeros([], "int64"), flag, *(paddle.assign(each) for each in states)]
    _, _, *final = paddle.static.nn.while_loop(
        lambda turn, flag, *_: paddle.logical_and(turn < limit, flag), body, start
    )
    if first is None:
        final = [set_shape(each, static_shape(state)) for each, state in zip(final, states, strict=True)]
    return final, [paddle.tensor.manipulation.tensor_array_to_tensor(array, 0, True)[0] for array in arrays]


def _true() -> Tensor:
    return paddle.full([], True, "bool")


def _kinds(step: Callable[..., list[Tensor]], states: State, scans: int) -> list[str]:
    """The types of what each turn adds to the scan outputs, by building the body once beside the graph."""
    if not scans:
        return []
    with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        inputs = [paddle.static.data(f"state{i}", each.shape, each.dtype) for i, each in enumerate(states)]
        return [numpy_dtype(each.dtype).name for each in step(paddle.zeros([], "int64"), inputs)[1 + len(states) :]]


def steps(x: Tensor, states: State, step: Callable[[Any, Tensor, State], tuple[Tensor, State]]) -> tuple[Tensor, State]:
    """By a `while_loop` over the rows, whose outputs are joined step by step."""
    sizes = [[None, *static_shape(states[0])], *map(static_shape, states)]

    def body(i: Tensor, made: Tensor, *carried: Tensor) -> list[Tensor]:
        row = paddle.index_select(x, paddle.reshape(i, [1]), 0)[0]
        output, new = step(i, row, list(carried))
        made = paddle.concat([made, paddle.unsqueeze(output, 0)])
        return [i + 1, *(set_shape(each, size) for each, size in zip([made, *new], sizes, strict=True))]

    total = cast(paddle.shape(x)[0], "int64")
    nothing = set_shape(paddle.zeros([0, *paddle.shape(states[0])], x.dtype), sizes[0])
    _, made, *final = paddle.static.nn.while_loop(
        lambda i, *_: i < total, body, [paddle.zeros([], "int64"), nothing, *states]
    )
    return made, final
