"""What training changes in a module besides its weights: plain attributes and non-persistent buffers."""

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
    """A hash of the plain attributes and the non-persistent buffers, which is cheap to compute.

    `ignored` names attributes that a trainer sets on the module and may change at any time.
    """
    found: list[Any] = []
    for each in root.modules():
        plain = ((name, value) for name, value in vars(each).items() if isinstance(value, _PLAIN))
        found += (item for item in plain if item[0] not in ignored and item[0] != "training")
        buffers = (each._buffers[name] for name in each._non_persistent_buffers_set)
        found += ((id(b), None if b is None or b.is_inference() else b._version) for b in buffers)
    return hash(tuple(found))


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
