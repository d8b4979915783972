"""What an unpickled module lacks before it is traced."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def tame_attributes(module: nn.Module) -> None:
    """Hide properties that raise from `dir()` and torch.jit, and let `__getattr__` raise only AttributeError.

    torch.jit reads every listed attribute, and asks for many that do not exist. `LightningModule.trainer` is one that
    raises, in a module without a trainer.
    """
    import torch

    for each in module.modules():
        kind = type(each)
        properties = {name for name in dir(kind) if isinstance(getattr(kind, name, None), property)}
        broken = frozenset(name for name in properties if _raises(each, name))
        changed: dict[str, Any] = {}
        if broken:
            changed = {name: getattr(kind, name) for name in broken}  # torch.jit ignores those of the class itself only
            for ignored in ("__jit_ignored_attributes__", "__jit_unused_properties__"):
                changed[ignored] = [*getattr(kind, ignored, ()), *broken]
            changed["__dir__"] = functools.partialmethod(_listed, kind, broken)
        if kind.__getattr__ is not torch.nn.Module.__getattr__ and not isinstance(each, torch.jit.ScriptModule):
            changed["__getattr__"] = functools.partialmethod(_asked, kind)
        if changed:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
            each.__class__ = type(kind.__name__, (kind,), names | changed)


def _listed(self: Any, kind: Any, broken: frozenset[str]) -> list[str]:
    return [name for name in kind.__dir__(self) if name not in broken]


def _asked(self: Any, kind: Any, name: str) -> Any:
    """The attribute that the `__getattr__` of `kind` returns; any error becomes an AttributeError."""
    try:
        return kind.__getattr__(self, name)
    except AttributeError:
        raise
    except Exception as error:
        raise AttributeError(f"{kind.__name__} has no attribute {name!r}: {error!r}") from error


def register_with_transformers(module: nn.Module) -> None:
    """Repeat what transformers 5 does only in `__init__`, so that unpickled models support `output_hidden_states`."""
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    registry = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        for each in module.modules():
            if hasattr(each, "_can_record_outputs"):
                registry[each] = each._can_record_outputs


def _raises(value: Any, name: str) -> bool:
    try:
        getattr(value, name)
    except AttributeError:
        return False  # as hasattr does
    except Exception:  # a property is the user's code, and may raise anything
        return True
    return False
