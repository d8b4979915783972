"""Keeps both branches of data-dependent decisions: submodules that have some are scripted before the module is traced.

https://docs.pytorch.org/docs/stable/jit.html#mixing-tracing-and-scripting
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from polyexport.errors import NothingToDo, line
from polyexport.spec import Arrays
from polyexport.tracing.reads import FailedAt, reads

if TYPE_CHECKING:
    from torch import nn


def script_branches(model: Any, inputs: Arrays) -> None:
    """Replace each submodule of the flat `model` whose forward reads values of `inputs` by its script.

    Raises:
        NothingToDo: there is no such submodule.
        RuntimeError: `torch.jit.script` refuses one.
    """
    import torch

    sites = _sites(model, inputs)
    if not sites:
        raise NothingToDo("forward does not branch on its data, so a script would be the same as a trace")
    for parent, name, part in list(_deciding(model, sites)):
        try:
            setattr(parent, name, torch.jit.script(part))
        except Exception as error:  # the compiler raises many types; the first line says what it refuses
            why = str(error).strip().split("\n", 1)[0] or line(error)
            raise RuntimeError(f"torch.jit.script refuses {type(part).__name__}: {why}") from error


def _sites(model: Any, inputs: Arrays) -> set[str]:
    try:
        return set(reads(model, inputs).values) - set(getattr(model, "idle", ()))
    except FailedAt as error:
        return {error.site} if error.site else set()


def _deciding(model: Any, sites: Collection[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The outermost submodules with a site in their forward, each with its parent and name; else the whole model."""
    found = list(_holding(model, sites))
    yield from found or [(model, "inner", model.inner)]


def _holding(parent: nn.Module, sites: Collection[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for name, part in parent.named_children():
        if any(_lies_in(site, part) for site in sites):
            yield parent, name, part
        else:
            yield from _holding(part, sites)


def _lies_in(site: str, part: nn.Module) -> bool:
    """Whether `file:line` is in the forward of a submodule."""
    try:
        lines, first = inspect.getsourcelines(type(part).forward)
        file = inspect.getsourcefile(type(part).forward)
    except (TypeError, OSError):  # its source is not in a file
        return False
    path, _, line = site.rpartition(":")
    return path == file and first <= int(line) < first + len(lines)
