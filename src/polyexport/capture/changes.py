"""What training changes in a module besides its weights: layers, hooks, plain attributes, non-persistent buffers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from polyexport.capture.snapshot import STRUCTURE, Select, save_structure
from polyexport.capture.surroundings import OFFERED

if TYPE_CHECKING:
    import torch
    from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def beside_weights(root: nn.Module, ignored: Collection[str] = ()) -> int:
    """A hash of layers, shapes, hooks, plain attributes and non-persistent buffers, which is cheap to compute.

    `ignored` names attributes that a trainer sets on the module and may change at any time; metrics of torchmetrics
    count what they see, and are ignored too.
    """
    found: list[Any] = []
    for each in (each for each in root.modules() if not _is_metric(each)):
        plain = ((name, value) for name, value in vars(each).items() if isinstance(value, _PLAIN))
        found += (item for item in plain if item[0] not in ignored and item[0] != "training")
        buffers = (each._buffers[name] for name in each._non_persistent_buffers_set)
        found += ((id(b), None if b is None or b.is_inference() else b._version) for b in buffers)
        found += (type(each), *each._modules, *each._forward_hooks, *each._forward_pre_hooks)
        found += ((name, _shape(tensor)) for held in (each._parameters, each._buffers) for name, tensor in held.items())
    return hash(tuple(found))


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    """The shape of a tensor that there is; a lazy layer has none before its first call."""
    from torch.nn.parameter import is_lazy

    return None if tensor is None or is_lazy(tensor) else tuple(tensor.shape)


def retake(root: nn.Module, select: Select, folder: Path, attributes: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Pickle the structure of `folder` again, if it was pickled: training may have changed attributes and buffers.

    If that fails, the previous one stays.
    """
    structure, before = folder / STRUCTURE, folder / f"{STRUCTURE}.before"
    if not structure.exists():
        return
    structure.rename(before)  # the files are hard links that other exports share
    (folder / OFFERED).unlink(missing_ok=True)
    try:
        save_structure(root, select, folder, attributes)
        before.unlink()
    except Exception:  # the user's objects may not be picklable anymore
        before.replace(structure)
