"""Captures the arguments of forward on a validation batch, without changing the module.

`forward` is watched during one batch. This is not a forward hook, because those also run when Lightning sends
`validation_step` through `forward` under DDP, and do not run if `forward` is called by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lightning_export.watch import Call, CannotWatch, Watch, before_hooks
from polyexport.capture.pytree import closed, opened
from polyexport.errors import WarningsAllowed, line


class Spy:
    """Copies the arguments of the first call of `module.forward`, until `remove`.

    The module is not changed, so that it can be pickled, copied and scripted meanwhile. Only if its calls cannot be
    seen from outside (see `Watch`), a function replaces its forward. Compiled code cannot be watched, so it runs
    eagerly meanwhile. Nothing here raises in the user's code.

    Attributes:
        call: The arguments; None until forward is called.
        trouble: Why the arguments could not be copied; empty if they were.
    """

    def __init__(self, module: nn.Module, root: nn.Module, *, profiled: bool = False) -> None:
        self.call: Call | None = None
        self.trouble = ""
        self._module = module
        self._eager = torch.compiler.set_stance("force_eager") if is_compiled(module, root) else None
        try:
            if profiled:
                raise CannotWatch("a profiler is going to run")
            self._end = Watch(module.forward, self._seen).end
        except CannotWatch:
            self._end = _stand_in(module, self._seen)

    def _seen(self, call: Call) -> bool:
        """Copy the arguments before forward can change them in place; returns whether the watch can end."""
        try:
            if self.call is None and not _is_symbolic(call):
                self.call = call = before_hooks(self._module, call)
                with WarningsAllowed():
                    self.call = closed(pytree.tree_map_only(torch.Tensor, _copy, opened(call)))
        except Exception as error:  # the arguments are the user's, and this runs inside user code
            self.trouble = line(error, 200)
        return self.call is not None

    def remove(self) -> None:
        """Stop watching, and restore the module."""
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None
        self._end()


def _stand_in(module: nn.Module, seen: Callable[[Call], bool]) -> Callable[[], None]:
    """Replace `module.forward` by a function that calls `seen` first; returns a function that restores it."""
    forward, own = module.forward, module.__dict__.get("forward")

    @functools.wraps(forward, updated=())
    def stands_in(*args: Any, **kwargs: Any) -> Any:
        seen((args, kwargs))
        return forward(*args, **kwargs)

    def end() -> None:
        if module.__dict__.get("forward") is stands_in:  # else the user has replaced it meanwhile
            del module.__dict__["forward"]
            module.__dict__.update({} if own is None else {"forward": own})

    module.__dict__["forward"] = stands_in
    return end


def _is_symbolic(call: Call) -> bool:
    """Whether a tracer is calling, which would record the copies as operations."""
    stand_ins = (torch.fx.Proxy, FakeTensor)
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
    return tracing or any(isinstance(leaf, stand_ins) for leaf in pytree.tree_leaves(call))


class Called:
    """Records the names of the submodules that are called, until `remove`."""

    def __init__(self, root: nn.Module) -> None:
        self.names: list[str] = []
        names = {id(each): name for name, each in root.named_modules() if name}

        def note(module: nn.Module, args: Any) -> None:
            name = names.get(id(module))
            if name is not None and name not in self.names:
                self.names.append(name)

        # a global hook, since one on a compiled module would have it compiled again
        compiled = any(is_compiled(each, root) for each in root.modules())
        self._hook = None if compiled else nn.modules.module.register_module_forward_pre_hook(note)

    def remove(self) -> None:
        """Stop recording."""
        if self._hook is not None:
            self._hook.remove()

    @property
    def outermost(self) -> list[str]:
        """The called submodules that are not inside another called one."""
        inner = {name for name in self.names if any(name.startswith(f"{other}.") for other in self.names)}
        return [name for name in self.names if name not in inner]


def is_compiled(module: nn.Module, root: nn.Module) -> bool:
    """Whether the module's forward is compiled by `torch.compile`, alone or as a part of another module of `root`."""
    compiled = (each for each in root.modules() if each._compiled_call_impl or getattr(each, "_compiler_ctx", None))
    wrapped = (each for each in root.modules() if "OptimizedModule" in type(each).__name__)
    return any(module in each.modules() for each in (*compiled, *wrapped))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
