"""Attributes of a module by a dotted path from the user, such as `model.backbone`."""

from __future__ import annotations

from typing import Any

from polyexport.errors import BadRequest


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
