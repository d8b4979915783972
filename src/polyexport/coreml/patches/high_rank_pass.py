"""A pass over a MIL program: replaces reshape, transpose and reshape through more than five axes, Core ML's maximum.

It replaces coremltools' own, `common::expand_high_rank_reshape_and_transpose`, which does not change a model with a
dynamic axis, such as window attention over a dynamic batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

_MOST = 5


def register() -> None:
    """Replace coremltools' own, in this process."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    class FewAxes(AbstractGraphPass):  # type: ignore[misc]  # coremltools has no types
        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                _lower(function)

    register_pass(namespace="common", override=True, name="expand_high_rank_reshape_and_transpose")(FewAxes)


def _lower(block: Any) -> None:
    for operation in reversed(list(block.operations)):  # what follows a chain may have begun one, and be low by then
        for inner in operation.blocks:
            _lower(inner)
        chain = _chain(operation)
        if chain:
            with block:
                _replace(block, *chain)


def _chain(operation: Any) -> list[Any]:
    """The chain of reshape, transpose and reshape that starts here, if it has too many axes; else nothing."""
    chain = [operation]
    for kind in ("transpose", "reshape"):
        users = chain[-1].outputs[0].child_ops if chain[-1].outputs else []
        if len(users) != 1 or users[0].op_type != kind or users[0].x is not chain[-1].outputs[0]:
            return []
        chain += users
    ranks = [each.outputs[0].rank for each in chain]
    high = operation.op_type == "reshape" and ranks[0] > _MOST >= ranks[2]
    return chain if high and sum(map(_free, operation.outputs[0].shape)) <= 1 else []


def _replace(block: Any, into: Any, turn: Any, back: Any) -> None:
    from coremltools.converters.mil import Builder as mb

    sizes, order = _merged(into.outputs[0].shape, turn.perm.val.tolist())
    x = _permuted(into.x, sizes, order, back)
    x = mb.reshape(x=x, shape=back.shape, before_op=back)
    block.replace_uses_of_var_after_op(anchor_op=back, old_var=back.outputs[0], new_var=x)
    block.remove_ops([into, turn, back])


def _merged(sizes: Sequence[Any], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Merge axes that stay adjacent."""
    runs: list[list[int]] = []
    for axis in order:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    before = sorted(runs)
    return [_product(sizes[axis] for axis in run) for run in before], [before.index(run) for run in runs]


def _permuted(x: Any, sizes: Sequence[int], order: Sequence[int], before: Any) -> Any:
    """`x` as `sizes`, transposed: at once, or one axis after the other behind those that are in their place."""
    from coremltools.converters.mil import Builder as mb

    if len(order) <= _MOST:
        return mb.transpose(x=mb.reshape(x=x, shape=sizes, before_op=before), perm=order, before_op=before)
    placed: list[int] = []
    left = list(range(len(order)))
    for axis in order:
        at = left.index(axis)
        parts = (placed, left[:at], [axis], left[at + 1 :])
        if at:
            shape = [_product(sizes[each] for each in part) for part in parts]
            x = mb.reshape(x=x, shape=shape, before_op=before)
            x = mb.transpose(x=x, perm=[0, 2, 1, 3], before_op=before)
        placed.append(left.pop(at))
    return x


def _product(sizes: Iterable[Any]) -> int:
    """The size of axes as one; -1 if one of them is dynamic."""
    listed = list(sizes)
    return -1 if any(map(_free, listed)) else math.prod(map(int, listed))


def _free(size: Any) -> bool:
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    return bool(is_symbolic(size)) or size == -1
