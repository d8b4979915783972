"""What each MIL op computes: one function per op, its arguments named as in MIL, found by name in `OPS`.

https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html

Arguments are tensors (half precision already widened to float32), strings, or lists of tensors. The caller rounds and
checks the result, so an index may be int64 here. Random ops are not supported, since they cannot be compared.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any


def _of_all_files() -> Mapping[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(__path__):
        own = getattr(import_module(f"{__name__}.{info.name}"), "OPS", {})
        if twice := found.keys() & own:
            raise ValueError(f"{info.name}.py has {', '.join(sorted(twice))}, and so has another file")
        found |= own
    return MappingProxyType(found)


OPS = _of_all_files()
"""By MIL's name: what each file in this folder has under `OPS`."""
