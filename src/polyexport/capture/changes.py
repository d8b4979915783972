"""What training changes in a module besides its weights: layers, hooks, attributes, non-persistent buffers."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from types import CellType, FunctionType, MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture.selection import Select
from polyexport.capture.snapshot import STRUCTURE, save_structure
from polyexport.capture.unwrap import is_data, is_of_training, own_attributes

if TYPE_CHECKING:
    import torch
    from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def beside_weights(root: nn.Module, ignored: Collection[str] = ()) -> int:
    """A hash of layers, shapes, hooks, attributes and non-persistent buffers, which is cheap to compute.

    Of an attribute it has numbers, strings, tensors and functions, also those in small dicts and in objects that hold
    little else, such as a namespace; a list of tensors is taken for a log. `ignored` names attributes that a trainer
    sets on the module and may change at any time; metrics of torchmetrics count what they see, and are ignored too.
    """
    import torch

    found: list[Any] = []
    digest, internal = _Digest(), {*ignored, *vars(torch.nn.Module())}
    for each in (each for each in root.modules() if not _is_metric(each)):
        found += ((name, digest.of(value)) for name, value in vars(each).items() if name not in internal)
        buffers = (each._buffers[name] for name in each._non_persistent_buffers_set)
        found += ((id(b), None if b is None or b.is_inference() else b._version) for b in buffers)
        found += (type(each), *each._modules.keys(), *each._forward_hooks, *each._forward_pre_hooks)
        found += ((name, _shape(tensor)) for held in (each._parameters, each._buffers) for name, tensor in held.items())
    return hash(tuple(found))


class _Digest:
    """Hashable digests of values; those that are looked at again, such as a configuration, are computed once."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}

    def of(self, value: Any, depth: int = 4) -> Any:
        """A digest that changes where the value does, as far as that can be told; else its type."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = type(value)  # if it holds itself
            self._known[id(value)] = self._of(value, depth - 1) if depth else type(value)
        return self._known[id(value)]

    def _of(self, value: Any, depth: int) -> Any:
        import torch

        kind = type(value)
        if isinstance(value, torch.Tensor):
            return id(value), None if value.is_inference() else value._version
        if isinstance(value, np.ndarray):
            return id(value), value.tobytes() if value.nbytes <= _BYTES and not value.dtype.hasobject else b""
        if isinstance(value, FunctionType):
            return value.__code__, tuple(self.of(each, depth) for each in _closed_over(value))
        if isinstance(value, functools.partial):
            held: Any = {**dict(enumerate(value.args)), **value.keywords, "": value.func}
        elif isinstance(value, list | tuple | set | frozenset | deque):
            plain = len(value) <= _ITEMS and all(isinstance(each, _PLAIN) for each in value)
            return (
                (kind, *(sorted(map(repr, value)) if isinstance(value, set | frozenset) else value)) if plain else kind
            )
        else:
            held = value if isinstance(value, dict) else own_attributes(value)
        is_part = isinstance(value, torch.nn.Module | type | ModuleType)
        if is_part or len(held) > _ITEMS or is_data(value) or is_of_training(value):
            return kind
        return kind, *((str(name), self.of(each, depth)) for name, each in tuple(held.items()))


_ITEMS, _BYTES = 128, 4096
"""Above these sizes, a container is a log or data, whose content is not looked at."""


def _closed_over(function: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    """The shape of a tensor that there is; a lazy layer has none before its first call."""
    from torch.nn.parameter import is_lazy

    return None if tensor is None or is_lazy(tensor) else tuple(tensor.shape)


def retake(root: nn.Module, select: Select, folder: Path, attributes: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Pickle the structure of `folder` again, if it was pickled: training may have changed attributes and buffers.

    If it cannot be pickled anymore, the previous one stays. Returns whether it was pickled.

    Raises:
        OSError: the file cannot be written; the previous one stays.
    """
    if not (folder / STRUCTURE).exists():
        return False
    try:
        save_structure(root, select, folder, attributes)
    except OSError:
        raise
    except Exception:  # the user's objects may not be picklable anymore
        return False
    return True
