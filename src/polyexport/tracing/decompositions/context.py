"""The context in which decompositions replace PyTorch's functions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from polyexport.errors import line
from polyexport.tracing.attention import plain_attention, separate_projections
from polyexport.tracing.decompositions import (
    bits,
    einsum,
    elementwise,
    indexing,
    layers,
    packed,
    reduction,
    shape,
    sorting,
)
from polyexport.tracing.reads import caller_site, named, note_frozen

_FILES = (bits, einsum, elementwise, indexing, layers, packed, reduction, shape, sorting)


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures.

    Raises:
        ValueError: two files replace one function.
    """
    found: dict[Any, Callable[..., Any]] = {}
    for file in _FILES:
        own = file.functions()
        if twice := found.keys() & own.keys():
            raise ValueError(f"{file.__name__} and another file decompose {', '.join(map(str, twice))}")
        found |= own
    return found


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """Plain attention, its projections by themselves, and every function of the tables decomposed."""
    from torch.overrides import TorchFunctionMode

    replacements = functions()

    class Decomposed(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            note_frozen(function)
            written, given = replacements.get(function, function), dict(kwargs or {})
            if written is not function:
                signature = inspect.signature(written)
                named = {
                    "x" if name == "input" and "x" in signature.parameters else name: given[name] for name in given
                }
                with contextlib.suppress(TypeError):  # called with arguments that the replacement lacks
                    signature.bind(*args, **named)
                    return written(*args, **named)
            with _errors_end_a_trace(function):
                return function(*args, **given)

    with plain_attention(), separate_projections(), packed.sizes_unchecked(), Decomposed():
        try:
            yield
        except _TraceEnded as error:
            raise RuntimeError(str(error)) from error.__cause__


class _TraceEnded(BaseException):
    """An error ended a trace; no Exception, so that forward does not catch it."""


@contextlib.contextmanager
def _errors_end_a_trace(function: Any) -> Iterator[None]:
    """Raise `_TraceEnded` for an error in an operator while torch.jit traces, since it kills the process later."""
    import torch

    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
    try:
        yield
    except Exception as error:  # operators raise many types
        if is_traced and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # as above
            name, site = getattr(function, "__name__", "an operator"), named({caller_site()})
            raise _TraceEnded(
                f"{name} raises at {site} ({line(error, 200)}), which ends a trace also where forward catches it; use "
                "a function that does not raise, such as torch.linalg.cholesky_ex, and torch.where"
            ) from error
        raise
