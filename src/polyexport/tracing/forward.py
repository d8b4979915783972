"""What surrounds a module's forward while it is looked at or traced."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Let what `torch.compile` made run as it was written: compiling takes seconds, and no tracer goes through it."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def within(module: nn.Module, mode: Callable[[tuple[Any, ...]], AbstractContextManager[Any]]) -> Iterator[None]:
    """Run each call of `module.forward` within what `mode` makes of its positional arguments.

    A mode of PyTorch's is asked there before the one that traces the module.
    """
    own, forward = module.__dict__.get("forward"), module.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode(args):
            return forward(*args, **kwargs)

    run.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # any function has one
    module.__dict__["forward"] = run
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
