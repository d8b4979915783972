"""Names that tracers cannot write into code: of a submodule, such as the `class` of a `ModuleDict`, or of its class.

Python's grammar keeps that one for itself, and what TorchScript writes of letters beyond ASCII, of line breaks, quotes
and backslashes, it cannot read. In a program of `torch.export` commas, semicolons and brackets divide names.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_MARKS = '"\\,;()'
_TABLES = ("_modules", "_parameters", "_buffers")


def make_writable(module: nn.Module) -> None:
    """Rename such submodules of `module`, and such classes; forward still finds submodules by their own names."""
    import torch
    from torch import nn

    for each in tuple(module.modules()):
        if isinstance(each, torch.jit.ScriptModule):  # it is written already
            continue
        names = [name for table in _TABLES for name in getattr(each, table)]
        renamed: dict[str, str] = {}
        for name in names:
            if keyword.iskeyword(name) or _writable(name) != name:
                renamed[name] = _another(name, {*names, *renamed.values()})
        kind: Any = type(each)
        own = {"__module__": _writable(kind.__module__), "__qualname__": _writable(kind.__qualname__)}
        if not renamed and own == {name: getattr(kind, name) for name in own}:
            continue
        for table in _TABLES:
            content = dict(getattr(each, table))
            getattr(each, table).clear()
            getattr(each, table).update({renamed.get(name, name): part for name, part in content.items()})
        changed: dict[str, Any] = {"__getattr__": functools.partialmethod(_attribute, kind, renamed)}
        if isinstance(each, nn.ModuleDict):
            changed |= _dictionary(kind, renamed)
        each.__class__ = type(_writable(kind.__name__), (kind,), own | {"__slots__": ()} | changed)


def _writable(name: str) -> str:
    return "".join(
        letter if letter.isascii() and letter.isprintable() and letter not in _MARKS else "_" for letter in name
    )


def _another(name: str, taken: Collection[str]) -> str:
    name = _writable(name)
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
