"""Traces `len(tensor)` as a dynamic size, like `tensor.shape[0]`.

Python's `len` always returns a plain number, so the batch size of the trace would be a constant in the artifact.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_NOT_THE_USERS = frozenset({"torch", "polyexport"}) | sys.stdlib_module_names


@contextlib.contextmanager
def lengths_followed(model: nn.Module) -> Iterator[None]:
    """Replace `len`, in the code that the submodules of `model` come from, by one whose result for a tensor is traced.

    It is set in the globals of that code until the context exits; only a worker may do so, where nothing else runs.
    """
    changed = [each for each in _globals(model) if "len" not in each]
    for each in changed:
        each["len"] = _length
    try:
        yield
    finally:
        for each in changed:
            del each["len"]


def _globals(model: nn.Module) -> list[dict[str, Any]]:
    """The globals of the packages that the classes of `model` come from, and those of classes pickled by value."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__}
    own = [kind for kind in kinds if kind.__module__.split(".")[0] not in _NOT_THE_USERS]
    packages = {kind.__module__.split(".")[0] for kind in own}
    files = [vars(module) for name, module in list(sys.modules.items()) if name.split(".")[0] in packages]
    by_value = [value.__globals__ for kind in own for value in vars(kind).values() if isinstance(value, FunctionType)]
    return list({id(each): each for each in (*files, *by_value)}.values())


def _length(value: Any) -> Any:
    import torch

    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else len(value)
