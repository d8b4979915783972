"""A module is exported in float32, even if its code asks for another floating-point dtype.

Requirements:
* `torch.autocast` in forward has no effect, as that of the trainer has none: lower precisions are formats. Other
  threads are not affected.
* A forward that casts to another dtype and computes in it, or cannot run since the module itself is float32, is run
  without its casts. One that casts only what it returns is left as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polyexport.tracing.reads import caller_site, site_in

if TYPE_CHECKING:
    import torch

_CASTS = frozenset({"half", "bfloat16", "double", "to", "type", "type_as"})
_MOVES = frozenset(
    {"__get__", "__getitem__", "cat", "clone", "contiguous", "cpu", "detach", "flatten", "permute", "reshape"}
    | {"squeeze", "stack", "transpose", "unsqueeze", "view"}
)
"""Functions that compute nothing."""


class InFloat32:
    """A context in which forward computes in float32.

    Attributes:
        casts_left_out: Whether casts to other floating-point dtypes are left out too, not only `torch.autocast`.
        asked_for: The names of the dtypes that were asked for and left out, by the site that did.
    """

    def __init__(self, *, casts_left_out: bool) -> None:
        self.casts_left_out = casts_left_out
        self.asked_for: dict[str, str] = {}
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._entered.enter_context(self._without_autocast())
        if self.casts_left_out:
            self._entered.enter_context(self._mode())

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def __deepcopy__(self, memo: Any) -> InFloat32:
        return InFloat32(casts_left_out=self.casts_left_out)

    @contextlib.contextmanager
    def _without_autocast(self) -> Iterator[None]:
        import torch

        autocast: Any = torch.amp.autocast_mode.autocast
        here, entered, exited = threading.get_ident(), autocast.__enter__, autocast.__exit__

        def enter(context: Any) -> Any:
            if threading.get_ident() != here:  # a module may be traced in the training process
                return entered(context)
            if context._enabled and context.fast_dtype is not torch.float32:
                self.asked_for[caller_site()] = name_of(context.fast_dtype)
            return context

        def leave(context: Any, *error: Any) -> Any:
            return exited(context, *error) if threading.get_ident() != here else False

        autocast.__enter__, autocast.__exit__ = enter, leave
        try:
            yield
        finally:
            autocast.__enter__, autocast.__exit__ = entered, exited

    def _mode(self) -> Any:
        import torch
        from torch.overrides import TorchFunctionMode

        owner = self

        def in_float32(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float32 if _is_other(value) else value
            return value.float() if isinstance(value, torch.Tensor) and _is_low(value.dtype) else value

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                given, name = dict(kwargs or {}), getattr(function, "__name__", "")
                asked = _asked_for(name, (*args[1:], *given.values()))
                if asked is not None:
                    owner.asked_for[caller_site()] = name_of(asked)
                if asked is not None and name in _CASTS:
                    x = args[0]
                    return x.clone() if x.is_floating_point() and not _is_low(x.dtype) else x.float()
                return function(*map(in_float32, args), **{key: in_float32(value) for key, value in given.items()})

        return Mode()


def _asked_for(name: str, arguments: tuple[Any, ...]) -> torch.dtype | None:
    """The other floating-point dtype that a function's name or arguments ask for, if any."""
    import torch

    named = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    given = [value.dtype if isinstance(value, torch.Tensor) and name in _CASTS else value for value in arguments]
    found = (value for value in (named.get(name), *given) if isinstance(value, torch.dtype) and _is_other(value))
    return next(found, None)


def needs_float32(model: Any) -> bool:
    """Whether the flat `model` computes in a lower precision, or cannot run since it casts to another dtype."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as pytree

    class Watch(TorchFunctionMode):
        seen = computed = False

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            answer = function(*args, **(kwargs or {}))
            dtypes = {leaf.dtype for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)}
            self.seen |= any(map(_is_other, dtypes))
            self.computed |= any(map(_is_low, dtypes)) and getattr(function, "__name__", "") not in _CASTS | _MOVES
            return answer

    watch = Watch()
    with watch:
        failed = fails(model)
    return watch.seen if failed else watch.computed


def fails(model: Any) -> bool:
    """Whether the flat `model` raises on its example."""
    import torch

    try:
        with torch.inference_mode():
            model(*(tensor.clone() for tensor in model.example))
    except Exception:  # forward is the user's, and may raise anything
        return True
    return False


def asked_for_by(program: torch.fx.GraphModule) -> dict[str, str]:
    """As `InFloat32.asked_for`, of the casts in a traced program."""
    import torch

    found: dict[str, str] = {}
    for node in program.graph.nodes:
        low = [
            value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype) and _is_low(value)
        ]
        if low:
            found[site_in(node.stack_trace or "")] = name_of(low[0])
    return found


def name_of(dtype: torch.dtype) -> str:
    """Its name without the package's."""
    return str(dtype).removeprefix("torch.")


def _is_other(dtype: torch.dtype) -> bool:
    import torch

    return dtype.is_floating_point and dtype is not torch.float32


def _is_low(dtype: torch.dtype) -> bool:
    import torch

    return _is_other(dtype) and dtype is not torch.float64
