"""Attributes of a module that the user names by a dotted path, such as `model.backbone`."""

from __future__ import annotations

from typing import Any

from polyexport.errors import BadRequest


def attribute(root: Any, path: str, argument: str) -> Any:
    """Follow a dotted `path` from `root`; `argument` is the one that the user gave it as.

    Raises:
        BadRequest: there is no such attribute; the message has the parts that there are.
    """
    found = root
    for part in path.split("."):
        if not hasattr(found, part):
            parts = ", ".join(name for name, _ in getattr(found, "named_children", tuple)())
            known = f"; it has {parts}" if parts else ""
            raise BadRequest(f"{argument}={path!r}: {type(found).__name__} has no {part!r}{known}")
        found = getattr(found, part)
    return found
