"""A pass over a MIL program: replaces what passes through more than five axes, Core ML's maximum.

That is a reshape, perhaps a transpose, and then another reshape, or an op that leaves no more than five: parts or an
index along one axis, as queries, keys and values are taken from one tensor, or a reduction over one, as windows are
pooled.

It replaces coremltools' own, `common::expand_high_rank_reshape_and_transpose`, which does not change a model with a
dynamic axis, such as window attention over a dynamic batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
        elif operation.op_type == "reshape" and _is_high(operation.outputs[0]):
            with block:
                _take_before(block, operation)


def _chain(operation: Any) -> list[Any]:
    """The chain of reshape, transpose and reshape that starts here, if it has too many axes; else nothing."""
    chain = [operation]
    for kind in ("transpose", "reshape"):
        users = chain[-1].outputs[0].child_ops if chain[-1].outputs else []
        if len(users) != 1 or users[0].op_type != kind or users[0].x is not chain[-1].outputs[0]:
            return []
        chain += users
    ranks = [each.outputs[0].rank for each in chain]
    high = operation.op_type == "reshape" and _is_high(operation.outputs[0])
    return chain if high and ranks[2] <= _MOST else []


def _is_high(tensor: Any) -> bool:
    """Whether it has too many axes, of known sizes but for one at most, so that it can be reshaped otherwise."""
    return tensor.rank > _MOST and sum(map(_free, tensor.shape)) <= 1


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


# --- an axis that is gone after the transpose -------------------------------------------------------------------------


def _take_before(block: Any, into: Any) -> None:
    """Index or reduce one axis before the others get axes of their own; does nothing if other ops read those."""
    high, order, above = into.outputs[0], list(range(into.outputs[0].rank)), [into]
    if len(high.child_ops) == 1 and high.child_ops[0].op_type == "transpose":
        above.append(high.child_ops[0])
        high, order = above[1].outputs[0], above[1].perm.val.tolist()
    for user in list(high.child_ops):
        found = _taken(user, high.rank) if high.rank == _MOST + 1 else []
        for old, axis, take in found:
            last = old.op
            new = _without(into, order, axis, take, last)
            block.replace_uses_of_var_after_op(anchor_op=last, old_var=old, new_var=new)
            block.remove_ops([last])
        if found and user.op_type == "split":
            block.remove_ops([user])
    for each in reversed(above):
        if not each.outputs[0].child_ops:
            block.remove_ops([each])


_Take = Callable[[Any, Any], Any]
"""Takes the middle one of three axes away, before an operation."""


def _taken(user: Any, rank: int) -> list[tuple[Any, int, _Take]]:
    """What an op makes without one axis: each result, the axis and how; nothing if it does anything else."""
    if user.op_type == "split":
        axis = int(user.axis.val) % rank
        parts = [(part.child_ops, part) for part in user.outputs]
        alone = all(len(ops) == 1 and _squeezes(ops[0], axis, rank) for ops, _ in parts)
        return [(ops[0].outputs[0], axis, _indexing(at)) for at, (ops, _) in enumerate(parts)] if alone else []
    if user.op_type == "slice_by_index" and (indexed := _indexed_axis(user)) is not None:
        return [(user.outputs[0], indexed, _indexing(int(user.begin.val[indexed])))]
    axes = user.axes.val if user.op_type in _REDUCTIONS and user.axes is not None else None
    if axes is not None and len(axes) == 1 and not user.keep_dims.val:
        return [(user.outputs[0], int(axes[0]) % rank, _reducing(user.op_type))]
    return []


_REDUCTIONS = ("reduce_max", "reduce_min", "reduce_sum", "reduce_mean", "reduce_prod")


def _squeezes(user: Any, axis: int, rank: int) -> bool:
    return bool(user.op_type == "squeeze" and [int(each) % rank for each in user.axes.val] == [axis])


def _indexed_axis(user: Any) -> int | None:
    """The axis that a slice takes one index of, where it leaves all others as they are."""
    if user.begin.val is None or user.squeeze_mask is None or (user.stride is not None and set(user.stride.val) != {1}):
        return None
    axes = [axis for axis, gone in enumerate(user.squeeze_mask.val) if gone]
    begin, ends = list(user.begin.val), list(user.end_mask.val) if user.end_mask is not None else []
    whole = ends and all(begin[axis] == 0 and ends[axis] for axis in range(len(begin)) if axis not in axes)
    return axes[0] if len(axes) == 1 and whole else None


def _indexing(at: int) -> _Take:
    def take(x: Any, before: Any) -> Any:
        from coremltools.converters.mil import Builder as mb

        others = [True, False, True]
        return mb.slice_by_index(
            x=x,
            begin=[0, at, 0],
            end=[0, at + 1, 0],
            begin_mask=others,
            end_mask=[True, at == -1, True],
            squeeze_mask=[not each for each in others],
            before_op=before,
        )

    return take


def _reducing(kind: str) -> _Take:
    def take(x: Any, before: Any) -> Any:
        from coremltools.converters.mil import Builder as mb

        return getattr(mb, kind)(x=x, axes=[1], keep_dims=False, before_op=before)

    return take


def _without(into: Any, order: Sequence[int], axis: int, take: _Take, before: Any) -> Any:
    """The input of a reshape and a transpose by `order`, as it is after both and without one of the axes then."""
    from coremltools.converters.mil import Builder as mb

    sizes, gone = list(into.outputs[0].shape), order[axis]
    parts = (sizes[:gone], sizes[gone : gone + 1], sizes[gone + 1 :])
    x = take(mb.reshape(x=into.x, shape=[_product(part) for part in parts], before_op=before), before)
    left = [each for each in range(len(sizes)) if each != gone]
    x = mb.reshape(x=x, shape=[_product(sizes[each : each + 1]) for each in left], before_op=before)
    perm = [left.index(each) for each in order if each != gone]
    return mb.transpose(x=x, perm=perm, before_op=before) if perm != sorted(perm) else x


# --- sizes ------------------------------------------------------------------------------------------------------------


def _product(sizes: Iterable[Any]) -> int:
    """The size of axes as one; -1 if one of them is dynamic."""
    listed = list(sizes)
    return -1 if any(map(_free, listed)) else math.prod(map(int, listed))


def _free(size: Any) -> bool:
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    return bool(is_symbolic(size)) or size == -1
