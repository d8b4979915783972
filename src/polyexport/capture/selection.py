"""The part of a module that a user asks for: by a dotted path, such as `model.backbone`, or by a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyexport.errors import BadRequest

Select = str | Callable[[Any], Any] | None
"""The part of a module to export: a dotted attribute, a function of the module, or None for all of it."""


def attribute(root: Any, path: str, argument: str) -> Any:
    """Follow a dotted `path` from `root`; `argument` is the name of the user's argument, for errors.

    Raises:
        BadRequest: there is no such attribute; the message lists those that exist.
    """
    found = root
    for part in path.split("."):
        if not hasattr(found, part):
            parts = ", ".join(name for name, _ in getattr(found, "named_children", tuple)())
            known = f"; it has {parts}" if parts else ""
            raise BadRequest(f"{argument}={path!r}: {type(found).__name__} has no {part!r}{known}")
        found = getattr(found, part)
    return found


def selected(root: Any, select: Select) -> Any:
    """Follow `select` from `root` to the module to export.

    Raises:
        BadRequest: there is no such attribute, or it is not a module.
    """
    import torch

    if select is None:
        found = root
    elif isinstance(select, str):
        found = attribute(root, select, "module")
    else:
        found = select(root)
    if not isinstance(found, torch.nn.Module):
        raise BadRequest(f"module={select!r} is a {type(found).__name__}, not a torch.nn.Module")
    return found
