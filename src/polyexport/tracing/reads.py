"""What forward reads from its inputs into Python: the branches, loops and numbers that a trace freezes.

Requirements:
* Sizes are not data: what depends only on the shape of an input is not listed.
* A site is `file:line` of the caller, the same for a read in PyTorch and for the tracer's warning about it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.spec import Arrays

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reads:
    """What one call of forward read, and the path that it took.

    Attributes:
        values: The values read at each site, in order.
        path: A hash of the functions called and of the lines that called them.
    """

    values: Mapping[str, tuple[str, ...]]
    path: int


_READERS = {
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__array__",
    "__contains__",
    "item",
    "tolist",
    "numpy",
    "equal",
    "allclose",
    "is_nonzero",
}
_SIZED_BY_DATA = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
"""Functions whose results have sizes that depend on values; the sizes are then read without a call."""
_WARNING = "Converting a tensor to a "


class FailedAt(Exception):
    """Forward raised; `site` is the last one that it read at, or None if it had read nothing."""

    def __init__(self, site: str | None) -> None:
        super().__init__(site)
        self.site = site


def reads(model: Any, inputs: Arrays) -> Reads:
    """Run a flat module once, and list the values that forward reads and that depend on `inputs`.

    Raises:
        FailedAt: forward raised.
    """
    import torch

    tensors = [torch.from_numpy(inputs[name].copy()) for name in model.input_names]
    watch = _watch(tensors)
    try:
        with torch.inference_mode(), watch:
            model(*tensors)
    except Exception as error:  # forward is the user's, and may raise anything
        raise FailedAt(next(reversed(watch.found), None)) from error
    return Reads({site: tuple(values) for site, values in watch.found.items()}, watch.path)


def _watch(inputs: list[torch.Tensor]) -> Any:
    """A mode that tracks values that depend on `inputs` through every function of torch."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as pytree
    from torch.utils.weak import WeakIdKeyDictionary

    dependent: Any = WeakIdKeyDictionary()

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))

    def mark(value: Any) -> None:
        for tensor in tensors(value):
            dependent[tensor] = True

    class Watch(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.path = 0
            self.found: dict[str, list[str]] = {}

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, site = getattr(function, "__name__", ""), _site()
            self.path = hash((self.path, name, site))
            answer = function(*args, **(kwargs or {}))
            if any(tensor in dependent for tensor in tensors((args, kwargs))):
                if name in _READERS:
                    self.found.setdefault(site, []).append(_plain(answer))
                elif name in _SIZED_BY_DATA:
                    self.found.setdefault(site, []).append(str([tuple(tensor.shape) for tensor in tensors(answer)]))
                mark(answer)
                if name.endswith("_") or name == "__setitem__":  # in place
                    mark(args[0])
            return answer

    mark(inputs)
    return Watch()


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, np.ndarray) else value)


def _site() -> str:
    """The site of the innermost caller outside of torch and polyexport."""
    passed, frame = _not_the_users(), sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(passed):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def site_of(error: BaseException) -> str:
    """The innermost site in an error's traceback; empty if there is none."""
    passed = _not_the_users()
    frames = traceback.walk_tb(error.__traceback__)
    sites = [f"{code.co_filename}:{line}" for code, line in ((frame.f_code, line) for frame, line in frames)]
    return next((site for site in reversed(sites) if not site.startswith(passed)), "")


@functools.cache
def _not_the_users() -> tuple[str, ...]:
    """Path prefixes of the files of torch, its dependencies, the standard library and polyexport."""
    packages = (os.path.dirname(str(find.origin)) for find in map(find_spec, ("torch", "sympy")) if find)
    return (*packages, os.path.dirname(os.path.dirname(__file__)), warnings.__file__, contextlib.__file__)


@contextlib.contextmanager
def frozen_sites() -> Iterator[set[str]]:
    """Collect the sites at which `torch.jit` warns that it records a value as a constant."""
    found: set[str] = set()

    def show(message: Any, *rest: Any, **more: Any) -> None:
        if str(message).startswith(_WARNING):
            found.add(_site())
        shown(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_WARNING)
        shown, warnings.showwarning = warnings.showwarning, show
        yield found


def named(sites: set[str]) -> str:
    """Sites for messages: file names without folders, in order."""
    return ", ".join(sorted(os.path.basename(site) for site in sites))
