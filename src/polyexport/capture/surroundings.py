"""Globals that a module's code reads: those of the files of its classes, and attributes of its classes.

A script may change them (`net.SCALE = 3`, `Net.forward = mine`), but a worker imports the unchanged files.

Requirements:
* Only plain values, small containers and arrays of them, and functions are taken, of the user's own files; installed
  packages are the same in a worker.
* They are saved with the module, but set only if the module's outputs differ from training without them (see
  `polyexport.measure.reference`): some globals must differ in a worker, such as a flag for a GPU.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture.code import importable

if TYPE_CHECKING:
    from torch import nn

OFFERED, SET = "surroundings.offered.pkl", "surroundings.pkl"
"""Files in a module's folder with the result of `taken`; the second is set whenever the module is loaded."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))

Surroundings = Mapping[str, Mapping[str, Any]]
"""`module` or `module:Class` -> name -> value."""


def taken(root: nn.Module) -> Surroundings:
    """The plain globals of the files of the classes of `root`, and functions that were assigned there."""
    found: dict[str, dict[str, Any]] = {}
    for home in _homes(root):
        found[home.__name__] = _own(vars(home), home.__name__, "")
        for kind in vars(home).values():
            if isinstance(kind, type) and kind.__module__ == home.__name__:
                found[f"{home.__name__}:{kind.__qualname__}"] = _own(vars(kind), home.__name__, f"{kind.__qualname__}.")
    return {name: values for name, values in found.items() if values}


def _own(values: Mapping[str, Any], home: str, prefix: str) -> dict[str, Any]:
    """The plain values, and the functions that were defined elsewhere, or under another name."""
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("__")
        and (_is_plain(value) or (isinstance(value, FunctionType) and _name(value) != (home, prefix + name)))
    }


def _name(function: FunctionType) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether it is a number, a string and the like, an array of few elements, or a small container of those."""
    import torch

    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, np.ndarray | torch.Tensor):
        return math.prod(value.shape) <= _ELEMENTS and (isinstance(value, torch.Tensor) or value.dtype.kind in "biufc")
    if type(value) in (dict, OrderedDict):
        return depth > 0 and len(value) <= _ITEMS and all(_is_plain(each, depth - 1) for each in value.values())
    is_small = type(value) in (tuple, list, set, frozenset) and len(value) <= _ITEMS
    return is_small and depth > 0 and all(_is_plain(each, depth - 1) for each in value)


_ELEMENTS, _ITEMS = 2**16, 256
"""Above these sizes, arrays and containers are data, which forward should not read from globals."""


def _homes(root: nn.Module) -> Iterable[ModuleType]:
    """The user's files of the classes of `root`, and those that they import."""
    waiting = [kind.__module__ for each in root.modules() for kind in type(each).__mro__]
    found: dict[str, ModuleType] = {}
    while waiting:
        home = sys.modules.get(waiting.pop())
        if home is None or home.__name__ in found or not _is_users(home):
            continue
        found[home.__name__] = home
        waiting += [
            value.__name__ if isinstance(value, ModuleType) else str(value.__module__)
            for value in vars(home).values()
            if isinstance(value, ModuleType | FunctionType | type)
        ]
    return found.values()


_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_users(home: ModuleType) -> bool:
    """Whether it is a user's file that a worker imports too; the script itself is pickled by value."""
    file = getattr(home, "__file__", None)
    installed = file is None or file.startswith(_INSTALLED) or "-packages" in file
    ours = home.__name__.partition(".")[0] in ("__main__", "polyexport", "lightning_export")
    return not installed and not ours and importable(home.__name__)


def put_back(surroundings: Surroundings) -> list[str]:
    """Set the values that differ here; returns their names."""
    names = []
    for home, name, value, owner in _differing(surroundings):
        setattr(owner, name, value)
        names.append(f"{home}.{name}")
    return names


def _differing(surroundings: Surroundings) -> Iterator[tuple[str, str, Any, Any]]:
    for home, values in surroundings.items():
        module, _, kind = home.partition(":")
        owner: Any = importlib.import_module(module)
        for part in filter(None, kind.split(".")):
            owner = getattr(owner, part)
        for name, value in values.items():
            here = vars(owner).get(name)
            if here is not value and not _is_same(here, value):
                yield home.replace(":", "."), name, value, owner


def _is_same(here: Any, value: Any) -> bool:
    import torch

    if type(here) is not type(value):
        return False
    if isinstance(value, FunctionType):  # pickled by value, it is another object
        return bool(here.__code__ == value.__code__)
    if isinstance(value, torch.Tensor):
        return here.dtype == value.dtype and torch.equal(here.cpu(), value)
    if isinstance(value, np.ndarray):
        return here.dtype == value.dtype and np.array_equal(here, value, equal_nan=value.dtype.kind in "fc")
    if isinstance(value, dict):
        return here.keys() == value.keys() and all(_is_same(here[key], each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return len(here) == len(value) and all(itertools.starmap(_is_same, zip(here, value, strict=True)))
    return bool(here == value)


def accept(folder: Path) -> None:
    """Set the globals of `folder` whenever its module is loaded."""
    (folder / OFFERED).rename(folder / SET)
