"""Watches the calls of one function with given first arguments, without changing either.

A wrapper in place of the function would be visible to code that pickles, copies, scripts or inspects it meanwhile. A
profile function (https://docs.python.org/3/library/sys.html#sys.setprofile) is not; while it is set, each call in this
thread takes a little longer.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CellType, FrameType, FunctionType, MethodType
from typing import Any

from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments. An argument may be in either, however it was passed."""


class Watch:
    """Calls `seen` at each call of `method` in this thread, until `seen` returns true or `end` is called.

    `seen` gets the arguments after those that `method` binds, without those that equal the default. It runs before the
    first line of `method`, and what it raises is raised there.

    Raises:
        CannotWatch: `method` is not written in Python, or this thread has another profile function.
    """

    def __init__(self, method: Callable[..., Any], seen: Callable[[Call], bool]) -> None:
        self._function, self._bound = _unbound(method)
        self._seen = seen
        if sys.getprofile() is not None:
            raise CannotWatch("a profiler is running")
        self._hook = self._told  # each access makes a new bound method, and `end` compares with this one
        sys.setprofile(self._hook)

    def _told(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is self._function.__code__ and _closes_over(frame, self._function):
            call = arguments(frame, self._function, self._bound)
            if call is not None and self._seen(call):
                self.end()

    def end(self) -> None:
        """Stop watching; a profile function that was set meanwhile stays."""
        if sys.getprofile() is self._hook:
            sys.setprofile(None)


class CannotWatch(Exception):
    """The calls of a function cannot be seen from outside."""


def _unbound(method: Any) -> tuple[FunctionType, tuple[Any, ...]]:
    """The function that a bound or wrapped method calls, and the first arguments that it passes."""
    bound: tuple[Any, ...] = ()
    while not isinstance(method, FunctionType):
        if isinstance(method, MethodType):
            method, bound = method.__func__, (method.__self__, *bound)
        elif isinstance(method, functools.partial) and not method.keywords:
            method, bound = method.func, (*method.args, *bound)
        elif isinstance(type(method).__call__, FunctionType):
            method = MethodType(type(method).__call__, method)
        else:
            raise CannotWatch(f"{method!r} is not written in Python")
    return method, bound


def _closes_over(frame: FrameType, function: FunctionType) -> bool:
    """Whether a call has the function's own closure: wrappers made by one decorator share their code object."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return all(cell == CellType() or frame.f_locals.get(name) is cell.cell_contents for name, cell in cells.items())


def arguments(frame: FrameType, function: FunctionType, bound: tuple[Any, ...]) -> Call | None:
    """The arguments of a call that has just begun; None if its first arguments are not `bound`."""
    code, values = frame.f_code, frame.f_locals
    names = list(code.co_varnames)
    by_position, names = names[: code.co_argcount], names[code.co_argcount :]
    by_name, names = names[: code.co_kwonlyargcount], names[code.co_kwonlyargcount :]
    rest = values[names.pop(0)] if code.co_flags & inspect.CO_VARARGS else ()
    more = values[names.pop(0)] if code.co_flags & inspect.CO_VARKEYWORDS else {}
    args = (*(values[name] for name in by_position), *rest)
    if len(args) < len(bound) or any(one is not other for one, other in zip(args, bound, strict=False)):
        return None
    defaults = dict(zip(reversed(by_position), reversed(function.__defaults__ or ()), strict=False))
    kwargs = _without(function.__kwdefaults__ or {}, {name: values[name] for name in by_name}) | more
    if rest:
        return args[len(bound) :], kwargs
    given = _without(defaults, {name: values[name] for name in by_position[len(bound) :]})
    positional = [name for name in by_position[len(bound) : code.co_posonlyargcount] if name in given]
    # positional up to the first that was left out; a positional-only argument needs all before it
    count = next((i for i, name in enumerate(by_position[len(bound) :]) if name not in given), len(given))
    count = max([count, *(by_position.index(name) + 1 - len(bound) for name in positional)])
    split = by_position[len(bound) : len(bound) + count]
    return tuple(values[name] for name in split), {
        name: value for name, value in given.items() if name not in split
    } | kwargs


def _without(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in defaults or value is not defaults[name]}


def before_hooks(module: nn.Module, call: Call) -> Call:
    """The arguments of a call of `module` that is going on as its caller gave them, if hooks may have changed them.

    `call` is what forward got. Artifacts have these hooks (`register_forward_pre_hook`) in them.
    """
    frame: FrameType | None = sys._getframe(1)
    while module._forward_pre_hooks and not is_redirected(module) and frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__ and frame.f_locals["self"] is module:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return call


def is_redirected(module: nn.Module) -> bool:
    """Whether Lightning has replaced its forward, while a strategy's wrapper calls the module."""
    return getattr(module.forward, "__name__", "") == "wrapped_forward"
