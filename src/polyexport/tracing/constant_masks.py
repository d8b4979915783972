"""Removes attention masks that exclude nothing, whatever a program's inputs are.

Transformers' encoders skip the mask of an unpadded batch in eager mode, and compute it while they are traced, since a
trace might see padding later: of a batch without a padding mask, comparisons of positions that are always true. With a
mask attention is slower in every runtime, and the rows without any key have to be handled.

What a tensor may hold is followed as a range, from what a program makes by itself (`arange`, `full`) through
views, sums, comparisons and selections. A tensor that the program writes to afterward, itself or through a view, has
none, nor has one whose dtype rounds such numbers or lets them wrap around, nor one with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.in_place import with_writes

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

Range = tuple[float, float]
"""The least and the greatest value that any element of a tensor may have; of booleans 0 and 1."""

Known = Callable[[Any], Range | None]
"""The range of an argument, which is a node or a number; None if it is not known."""


def remove_constant_masks(program: torch.export.ExportedProgram) -> None:
    """Replace each mask of `scaled_dot_product_attention` that is true everywhere, or adds zero, by none; in place.

    So are sums with such a mask and selections by it, as modules have that compute attention by themselves.
    """
    import torch

    aten = torch.ops.aten
    graph = program.graph
    kinds, written = _kinds(), with_writes(graph)
    ranges = {node: _held((value, value), node) for node, value in _numbers(program) if node not in written}

    def known(argument: Any) -> Range | None:
        if isinstance(argument, torch.fx.Node):
            return ranges.get(argument)
        return (argument, argument) if isinstance(argument, int | float) and not math.isnan(argument) else None

    for node in graph.nodes:
        if node in written:
            continue
        if node.op == "call_function" and (find := kinds.get(node.target)):
            ranges[node] = _held(find(node, known), node)
        if node.target is aten.scaled_dot_product_attention.default:
            _without_mask(node, known)
        same = _unchanged(node, known)
        if same is not None and same not in written and _alike(node, same) and not _is_output(node):
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _numbers(program: torch.export.ExportedProgram) -> Iterator[tuple[Node, float]]:
    """The program's constants of one element, as of `torch.tensor(0.0)`."""
    names = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.find_nodes(op="placeholder"):
        constant = program.constants.get(names.get(node.name, ""))
        if constant is not None and constant.numel() == 1 and not constant.is_complex():
            yield node, constant.item()


def _without_mask(node: Node, known: Known) -> None:
    """Remove an attention's mask, which is true where a query may attend to a key, or is added to the scores."""
    import torch

    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if not isinstance(mask, torch.fx.Node):
        return
    nothing = 1.0 if mask.meta["val"].dtype is torch.bool else 0.0
    if known(mask) != (nothing, nothing):
        return
    if len(node.args) > 3:
        node.update_arg(3, None)
    else:
        node.update_kwarg("attn_mask", None)


def _unchanged(node: Node, known: Known) -> Node | None:
    """The operand that a sum with zero, or a selection that always selects it, equals."""
    import torch

    aten = torch.ops.aten
    found: Any = None
    if node.target is aten.add.Tensor and not node.kwargs:
        one, other = node.args
        found = one if known(other) == (0, 0) else other if known(one) == (0, 0) else None
    elif node.target in _selections():
        condition, one, other = node.args
        found = {(1, 1): one, (0, 0): other}.get(known(condition))  # type: ignore[arg-type]  # None is no key of it
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        x, mask, _ = node.args
        found = x if known(mask) == (0, 0) else None
    return found if isinstance(found, torch.fx.Node) else None


def _alike(one: Node, other: Node) -> bool:
    """Whether they have the same shape and dtype."""
    import torch

    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype is not b.dtype:
        return False
    return [str(size) for size in a.shape] == [str(size) for size in b.shape]


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)  # whose name stands in the program's signature


# --- the ranges of what operators return ------------------------------------------------------------------------------


def _kinds() -> Mapping[Any, Callable[[Node, Known], Range | None]]:
    """How the range of each operator's result follows from those of its arguments."""
    import torch

    aten = torch.ops.aten
    views = (
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.expand_as.default),
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.slice.Tensor, aten.select.int),
        *(aten.transpose.int, aten.permute.default, aten.clone.default, aten.contiguous.default, aten.alias.default),
        *(aten.repeat.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default),
    )
    return {
        **dict.fromkeys(views, lambda node, known: known(node.args[0])),
        **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout), _cast),
        **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), lambda *_: (1, 1)),
        **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), lambda *_: (0, 0)),
        **dict.fromkeys((aten.full.default, aten.full_like.default), lambda node, known: known(node.args[1])),
        aten.new_full.default: lambda node, known: known(node.args[2]),
        aten.scalar_tensor.default: lambda node, known: known(node.args[0]),
        aten.arange.default: lambda node, known: _counted(0, node.args[0]),
        aten.arange.start: lambda node, known: _counted(*node.args[:2]),
        **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum),
        **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _difference),
        **{
            getattr(getattr(aten, name), overload): _compared(result)
            for name, result in _COMPARISONS.items()
            for overload in ("Scalar", "Tensor")
        },
        **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), _combined(min)),
        **dict.fromkeys((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), _combined(max)),
        **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _negated),
        **dict.fromkeys(_selections(), _selected),
    }


def _selections() -> Collection[Any]:
    import torch

    where = torch.ops.aten.where
    return (where.self, where.Scalar, where.ScalarSelf, where.ScalarOther)


_LONGEST = 2**31 - 1
"""Most elements of an axis whose size is symbolic."""


def _counted(start: Any, end: Any) -> Range | None:
    """Of `arange` by steps of one; its end may be a symbolic size."""
    if not isinstance(start, int):
        return None
    return (start, max(start, end - 1 if isinstance(end, int) else _LONGEST))


def _cast(node: Node, known: Known) -> Range | None:
    found = known(node.args[0])
    if found is None or not _is_boolean(node):
        return found
    return (1, 1) if found[0] > 0 or found[1] < 0 else (0, 0) if found == (0, 0) else (0, 1)


def _is_boolean(node: Any) -> bool:
    import torch

    made = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return isinstance(made, torch.Tensor) and made.dtype is torch.bool


def _sum(node: Node, known: Known) -> Range | None:
    one, other = map(known, node.args[:2])
    return (one[0] + other[0], one[1] + other[1]) if one and other and not node.kwargs else None


def _difference(node: Node, known: Known) -> Range | None:
    one, other = map(known, node.args[:2])
    return (one[0] - other[1], one[1] - other[0]) if one and other and not node.kwargs else None


def _held(found: Range | None, node: Node) -> Range | None:
    """The range in the dtype of a node's result."""
    made: Any = node.meta.get("val")
    return _in_dtype(found, made.dtype) if found and hasattr(made, "dtype") else None


def _in_dtype(found: Range, dtype: torch.dtype) -> Range | None:
    """The range in a dtype, infinite beyond what floats have exactly; None where integers wrap around, and of NaN."""
    import torch

    least, most = found
    if math.isnan(least) or math.isnan(most) or dtype.is_complex:
        return None
    if dtype is torch.bool:  # of which a sum is their `or`
        return (least > 0, most > 0) if least >= 0 else None
    if dtype.is_floating_point:
        exact = 2 / torch.finfo(dtype).eps
        return (
            least if _is_exact(least, exact) else -math.inf,
            most if _is_exact(most, exact) else math.inf,
        )
    limits = torch.iinfo(dtype)
    fits = all(_is_exact(bound, math.inf) and limits.min <= bound <= limits.max for bound in found)
    return found if fits else None


def _is_exact(bound: float, limit: float) -> bool:
    """Whether it is an integer up to a limit, or infinite."""
    return math.isinf(bound) or (float(bound).is_integer() and abs(bound) <= limit)


_COMPARISONS: Mapping[str, Callable[[float, float], Range]] = {
    "ge": lambda least, most: (least >= 0, most >= 0),
    "gt": lambda least, most: (least > 0, most > 0),
    "le": lambda least, most: (most <= 0, least <= 0),
    "lt": lambda least, most: (most < 0, least < 0),
    "eq": lambda least, most: (least == most == 0, least <= 0 <= most),
    "ne": lambda least, most: (not least <= 0 <= most, not least == most == 0),
}
"""The range of each comparison's result, by that of the difference of its operands."""


def _compared(result: Callable[[float, float], Range]) -> Callable[[Node, Known], Range | None]:
    def find(node: Node, known: Known) -> Range | None:
        dtype = _common_dtype(node)

        def converted(argument: Any) -> Range | None:
            bounds = known(argument)
            return _in_dtype(bounds, dtype) if bounds else None

        difference = _difference(node, converted)
        return result(*difference) if difference and not any(map(math.isnan, difference)) else None

    return find


def _common_dtype(node: Node) -> torch.dtype:
    """The dtype that the operands of a comparison are converted to."""
    import torch

    operands: Any = (each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in node.args[:2])
    return torch.result_type(*operands)


def _combined(choose: Callable[[float, float], float]) -> Callable[[Node, Known], Range | None]:
    """Of booleans: `and` is their minimum, `or` their maximum."""

    def find(node: Node, known: Known) -> Range | None:
        if not all(map(_is_boolean, node.args)):
            return None
        one, other = (known(argument) or (0, 1) for argument in node.args)
        return (choose(one[0], other[0]), choose(one[1], other[1]))

    return find


def _negated(node: Node, known: Known) -> Range | None:
    found = known(node.args[0]) if _is_boolean(node.args[0]) else None
    return (1 - found[1], 1 - found[0]) if found else None


def _selected(node: Node, known: Known) -> Range | None:
    condition, one, other = map(known, node.args)
    if condition in ((1, 1), (0, 0)):
        return one if condition == (1, 1) else other
    return (min(one[0], other[0]), max(one[1], other[1])) if one and other else None
