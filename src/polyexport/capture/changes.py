"""What training changes of a module beside its weights: plain attributes, and buffers that no checkpoint has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from polyexport.capture.snapshot import STRUCTURE, Select, save_structure
from polyexport.capture.surroundings import OFFERED

if TYPE_CHECKING:
    from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def beside_weights(root: nn.Module, ignored: Collection[str] = ()) -> int:
    """A number that changes with the plain attributes and the buffers that no checkpoint has, cheap to ask.

    `ignored` names attributes that a trainer keeps on the module, some of them another thing in each hook.
    """
    found: list[Any] = []
    for each in root.modules():
        plain = ((name, value) for name, value in vars(each).items() if isinstance(value, _PLAIN))
        found += (item for item in plain if item[0] not in ignored and item[0] != "training")
        buffers = (each._buffers[name] for name in each._non_persistent_buffers_set)
        found += ((id(b), None if b is None or b.is_inference() else b._version) for b in buffers)
    return hash(tuple(found))


def retake(root: nn.Module, select: Select, folder: Path, attributes: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Take the structure of `folder` anew, where it was pickled: training may have changed attributes and buffers.

    Where that fails the one that was there stays.
    """
    structure, before = folder / STRUCTURE, folder / f"{STRUCTURE}.before"
    if not structure.exists():
        return
    structure.rename(before)  # links to what other exports have too
    (folder / OFFERED).unlink(missing_ok=True)
    try:
        save_structure(root, select, folder, attributes)
        before.unlink()
    except Exception:  # code of the user's: what it says to pickling is not our trouble here
        before.replace(structure)
