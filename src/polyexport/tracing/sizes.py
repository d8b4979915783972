"""Traces sizes that forward makes Python numbers of, such as `len(tensor)` and `int(x.shape[0])`, as dynamic sizes.

Python's own functions always return plain numbers, so the batch size of the trace would be a constant in the artifact.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_NOT_THE_USERS = frozenset({"torch", "polyexport"}) | sys.stdlib_module_names


@contextlib.contextmanager
def sizes_followed(model: nn.Module) -> Iterator[None]:
    """Replace `len`, `int`, `float` and `math.sqrt`, in the code that the submodules of `model` come from.

    They are set in the globals of that code until the context exits; only a worker may do so, where nothing else runs.
    """
    changed = [(each, _replaced(each)) for each in _globals(model)]
    before = [(each, {name: each[name] for name in new if name in each}) for each, new in changed]
    for each, new in changed:
        each.update(new)
    try:
        yield
    finally:
        for (each, new), (_, old) in zip(changed, before, strict=True):
            for name in new:
                del each[name]
            each.update(old)


def _replaced(names: dict[str, Any]) -> dict[str, Any]:
    """What is set in these globals."""
    if any("__script_if_tracing_wrapper" in vars(value) for value in names.values() if isinstance(value, FunctionType)):
        return {}  # torch.jit.script compiles that function, and knows Python's own
    builtins = {"len": _length, "int": Int, "float": Float}
    found = {name: value for name, value in builtins.items() if name not in names}
    found |= {name: _sqrt for name, value in names.items() if value is math.sqrt}
    return found | {name: _math() for name, value in names.items() if value is math}


def _globals(model: nn.Module) -> list[dict[str, Any]]:
    """The globals of the packages that the classes of `model` come from, and those of classes pickled by value."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__}
    own = [kind for kind in kinds if kind.__module__.split(".")[0] not in _NOT_THE_USERS]
    packages = {kind.__module__.split(".")[0] for kind in own}
    files = [vars(module) for name, module in list(sys.modules.items()) if name.split(".")[0] in packages]
    by_value = [value.__globals__ for kind in own for value in vars(kind).values() if isinstance(value, FunctionType)]
    return list({id(each): each for each in (*files, *by_value)}.values())


# --- what is called in their place ------------------------------------------------------------------------------------


def _length(value: Any) -> Any:
    import torch

    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else len(value)


class _Number(type):
    """The type of a stand-in for `int` or `float`: equal to it, and the same for `isinstance`."""

    own: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        followed = _followed(cls.own, args[0]) if len(args) == 1 and not kwargs else None
        return cls.own(*args, **kwargs) if followed is None else followed

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.own)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.own)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.own

    def __hash__(cls) -> int:
        return hash(cls.own)


class Int(int, metaclass=_Number):
    """`int`, but a size stays one, and so does an element of a tensor in a program of `torch.export`."""

    own = int


class Float(float, metaclass=_Number):
    """`float`, but a size stays one."""

    own = float


def _followed(kind: type, value: Any) -> Any:
    """A traced size as another kind of number; None for all else."""
    import torch

    if isinstance(value, torch.SymInt | torch.SymFloat):
        change: Any = torch.sym_int if kind is int else torch.sym_float
        return change(value)
    if _is_traced(value):
        return value.to(torch.int64 if kind is int else torch.float64)
    if kind is int and isinstance(value, torch.Tensor) and value.numel() == 1 and torch.compiler.is_exporting():
        return value.to(torch.int64).item()  # which `torch.export` takes as a size, as in `int(graph.max()) + 1`
    return None


def _is_traced(value: Any) -> bool:
    """Whether it is made of sizes and constants alone, in a trace of `torch.jit`, where these are tensors."""
    import torch

    tracer: Any = torch._C
    if not isinstance(value, torch.Tensor) or value.dim() or not tracer._is_tracing():
        return False
    nodes, sized = [tracer._get_value_trace(value).node()], False
    while nodes:
        node = nodes.pop()
        if node.kind() == "prim::NumToTensor":  # what `x.shape[0]` is made by
            sized = True
        elif node.kind() in ("prim::Param", "prim::GetAttr"):
            return False
        else:
            nodes.extend(given.node() for given in node.inputs())
    return sized


def _sqrt(value: Any) -> Any:
    import torch

    if isinstance(value, torch.SymInt | torch.SymFloat):
        return Float(value) ** 0.5
    return value.to(torch.float64).sqrt() if _is_traced(value) else math.sqrt(value)


def _math() -> SimpleNamespace:
    return SimpleNamespace(**{**vars(math), "sqrt": _sqrt})
