"""The weights of an export: the checkpoint's, hard-linked instead of copied, and those that it leaves out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.capture.snapshot import LACKING, SHARDS, WEIGHTS
from polyexport.capture.unwrap import clean_name
from polyexport.report.folders import lies_elsewhere, link

if TYPE_CHECKING:
    import torch
    from torch import nn


def hold(checkpoint: str, folder: Path) -> str | None:
    """Make sure that the weights survive the deletion of `checkpoint`, without reading them.

    This is a hard link `folder/weights.pt` where possible. On another file system it is a hidden link next to the
    checkpoint, whose path is returned; a URL is returned as it is. It is a copy only where the file system has no
    links. A checkpoint that is a folder of shards is linked file by file, as `folder/weights.shards`.
    """
    if "://" in checkpoint:
        return checkpoint
    source = os.path.realpath(checkpoint)
    target = folder / (SHARDS if os.path.isdir(source) else WEIGHTS)
    hidden = Path(f"{os.path.dirname(source)}/.{os.path.basename(source)}.{folder.parent.name}")
    for place in (target, hidden):
        try:
            if place is hidden:
                lies_elsewhere(folder.parent, hidden)
            _copied(source, place, os.link)
            return None if place is target else str(hidden)
        except (OSError, shutil.Error):
            shutil.rmtree(place, ignore_errors=True)
    _copied(source, target, shutil.copyfile)
    return None


def _copied(source: str, target: Path, copy: Callable[[Any, Any], Any]) -> None:
    """A file, or all files of a folder."""
    if os.path.isdir(source):
        shutil.copytree(source, target, copy_function=copy)
    else:
        copy(source, target)


def save_lacking(root: nn.Module, checkpoint: str, captured: Path, source: Path) -> list[str]:
    """Write into `source` the weights of `root` that its checkpoint lacks, and return their names.

    Frozen ones are copied once, into `captured`; any others change, and are written each time.
    """
    import torch

    if not os.path.isfile(checkpoint):
        return []
    # this process has just written it, so it can be trusted; its tensors are mapped, not read
    held = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
    known = {clean_name(name) for name in held.get("state_dict", held)}
    lacking = {name: tensor for name, tensor in _persistent(root) if name not in known}
    if not lacking:
        return []
    frozen = all(isinstance(each, torch.nn.Parameter) and not each.requires_grad for each in lacking.values())
    file = (captured if frozen else source) / LACKING
    if not file.exists():
        torch.save({name: tensor.detach() for name, tensor in lacking.items()}, file)
    if frozen and not (source / LACKING).exists():  # it may come with the rest of what was captured
        link(file, source / LACKING)
    return list(lacking)


def _persistent(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The entries of a state dict by default, regardless of hooks and overrides."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield clean_name(f"{prefix}.{name}".removeprefix(".")), tensor
