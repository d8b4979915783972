"""What forward received on the first validation batch, and the module's structure: taken once, without touching either.

The spy watches `forward` during one batch. It is not a forward hook, because those also fire when Lightning sends
`validation_step` through `forward` under DDP, and do not fire where `forward` is called by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lightning_export.watch import Call, CannotWatch, Watch
from polyexport.capture.pytree import closed, opened
from polyexport.errors import line


class Spy:
    """Takes copies of the arguments of the first call of `module.forward`; `remove` ends that.

    The module is left as it is, so that it pickles, copies and scripts meanwhile as what it is. Only where its calls
    cannot be seen from outside (see `Watch`), a function stands in for its forward. Compiled code would not be seen, so
    what is compiled around it runs eagerly meanwhile. Nothing here raises in the user's code.

    Attributes:
        call: The arguments; None as long as forward was not called.
        trouble: Why they are no copies; empty where they are.
    """

    def __init__(self, module: nn.Module, root: nn.Module, *, profiled: bool = False) -> None:
        self.call: Call | None = None
        self.trouble = ""
        self._eager = torch.compiler.set_stance("force_eager") if is_compiled(module, root) else None
        try:
            if profiled:
                raise CannotWatch("a profiler will run")
            self._end = Watch(module.forward, self._seen).end
        except CannotWatch:
            self._end = _stand_in(module, self._seen)

    def _seen(self, call: Call) -> bool:
        """Copy the arguments, before forward can change them in place; whether that is done."""
        try:
            if self.call is None and not _is_symbolic(call):
                self.call = call
                self.call = closed(pytree.tree_map_only(torch.Tensor, _copy, opened(call)))
        except Exception as error:  # they are the user's, and this is inside of his code
            self.trouble = line(error, 200)
        return self.call is not None

    def remove(self) -> None:
        """Leave no trace."""
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None
        self._end()


def _stand_in(module: nn.Module, seen: Callable[[Call], bool]) -> Callable[[], None]:
    """Put a function in the place of `module.forward` that tells `seen`; returns what puts back what was there."""
    forward, own = module.forward, module.__dict__.get("forward")

    @functools.wraps(forward, updated=())
    def stands_in(*args: Any, **kwargs: Any) -> Any:
        seen((args, kwargs))
        return forward(*args, **kwargs)

    def end() -> None:
        if module.__dict__.get("forward") is stands_in:  # else it is the user's, who has changed it meanwhile
            del module.__dict__["forward"]
            module.__dict__.update({} if own is None else {"forward": own})

    module.__dict__["forward"] = stands_in
    return end


def _is_symbolic(call: Call) -> bool:
    """Whether a tracer calls, for whom a copy would be an operation like any other."""
    stand_ins = (torch.fx.Proxy, FakeTensor)
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
    return tracing or any(isinstance(leaf, stand_ins) for leaf in pytree.tree_leaves(call))


class Called:
    """Notes which parts of a module are called, by their names in it, until `remove`."""

    def __init__(self, root: nn.Module) -> None:
        self.names: list[str] = []
        names = {id(each): name for name, each in root.named_modules() if name}

        def note(module: nn.Module, args: Any) -> None:
            name = names.get(id(module))
            if name is not None and name not in self.names:
                self.names.append(name)

        # for all modules, so that none of the user's has a hook; compiled ones would be compiled again for it
        compiled = any(is_compiled(each, root) for each in root.modules())
        self._hook = None if compiled else nn.modules.module.register_module_forward_pre_hook(note)

    def remove(self) -> None:
        """Note no more."""
        if self._hook is not None:
            self._hook.remove()

    @property
    def outermost(self) -> list[str]:
        """Those that no other one called was around."""
        inner = {name for name in self.names if any(name.startswith(f"{other}.") for other in self.names)}
        return [name for name in self.names if name not in inner]


def is_compiled(module: nn.Module, root: nn.Module) -> bool:
    """Whether `torch.compile` took the module's forward, alone or as a part of something in `root`."""
    compiled = (each for each in root.modules() if each._compiled_call_impl or getattr(each, "_compiler_ctx", None))
    wrapped = (each for each in root.modules() if "OptimizedModule" in type(each).__name__)
    return any(module in each.modules() for each in (*compiled, *wrapped))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
