"""Names of submodules that tracers cannot write into code, such as the `class` of a `ModuleDict`.

Python's grammar keeps that one for itself, and what TorchScript writes of letters beyond ASCII, or of line breaks, it
cannot read.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")


def make_writable(module: nn.Module) -> None:
    """Rename submodules of `module` with such names; forward still finds them by their own."""
    import torch
    from torch import nn

    for each in tuple(module.modules()):
        if isinstance(each, torch.jit.ScriptModule):  # it is written already
            continue
        names = [name for table in _TABLES for name in getattr(each, table)]
        renamed: dict[str, str] = {}
        for name in names:
            if keyword.iskeyword(name) or not (name.isascii() and name.isprintable()):
                renamed[name] = _another(name, {*names, *renamed.values()})
        if not renamed:
            continue
        for table in _TABLES:
            content = dict(getattr(each, table))
            getattr(each, table).clear()
            getattr(each, table).update({renamed.get(name, name): part for name, part in content.items()})
        kind: Any = type(each)
        changed: dict[str, Any] = {"__getattr__": functools.partialmethod(_attribute, kind, renamed)}
        if isinstance(each, nn.ModuleDict):
            changed |= _dictionary(kind, renamed)
        names_of_kind = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
        each.__class__ = type(kind.__name__, (kind,), names_of_kind | changed)


def _another(name: str, taken: Collection[str]) -> str:
    name = "".join(letter if letter.isascii() and letter.isprintable() else "_" for letter in name)
    while name in taken:
        name += "_"
    return name


def _attribute(self: Any, kind: Any, renamed: Mapping[str, str], name: str) -> Any:
    return kind.__getattr__(self, renamed.get(name, name))


def _dictionary(kind: Any, renamed: Mapping[str, str]) -> dict[str, Any]:
    """The methods of a `ModuleDict` that take or return names."""
    own = {new: old for old, new in renamed.items()}

    def items(self: Any) -> Any:
        return {own.get(name, name): part for name, part in self._modules.items()}.items()

    def keys(self: Any) -> Any:
        return dict(items(self)).keys()

    def iterator(self: Any) -> Iterator[str]:
        return iter(keys(self))

    def contains(self: Any, key: str) -> bool:
        return key in keys(self)

    def item(self: Any, key: str) -> Any:
        return kind.__getitem__(self, renamed.get(key, key))

    return {"items": items, "keys": keys, "__iter__": iterator, "__contains__": contains, "__getitem__": item}
