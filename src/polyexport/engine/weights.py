"""The weights of an export: the checkpoint's, hard-linked instead of copied, and those that it leaves out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from polyexport.capture.unwrap import clean_name
from polyexport.capture.weights import LACKING, SHARDS, WEIGHTS
from polyexport.errors import BadRequest, line
from polyexport.report.folders import lies_elsewhere, link
from polyexport.serialization import writing
from polyexport.workers.disk import free_bytes, gigabytes, size_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn


def is_written(checkpoint: str) -> bool:
    """Whether a checkpoint is there and looks complete; another thread or process may still be writing it.

    A zip archive ends with its directory, and a folder of `torch.distributed.checkpoint` gets its metadata last. Of
    other files and folders it is only known that they are not empty. A URL is not looked at.
    """
    if "://" in checkpoint:
        return True
    if os.path.isdir(checkpoint):
        names = os.listdir(checkpoint)
        is_distributed = any(name.endswith(".distcp") for name in names)
        return ".metadata" in names if is_distributed else bool(names)
    try:
        with open(checkpoint, "rb") as file:
            head = file.read(2)
            return is_zipfile(file) if head == b"PK" else bool(head)
    except OSError:
        return False


def bytes_for_training(checkpoint: str, folder: Path) -> int:
    """What has to stay free on the disk of `folder` while training runs: its next two checkpoints.

    A trainer writes a new checkpoint before it removes an old one, of which an export has a link. It is 0 if the
    checkpoints are on another disk.
    """
    try:
        if os.stat(os.path.dirname(checkpoint) or ".").st_dev != os.stat(folder).st_dev:
            return 0
        return 2 * (size_bytes(Path(checkpoint)) if os.path.isdir(checkpoint) else os.path.getsize(checkpoint))
    except OSError:  # it is a URL
        return 0


def check_room(root: nn.Module, steps: int, folder: Path, spare: int) -> None:
    """Refuse an export that may take what training needs.

    Args:
        root: The module that trains.
        steps: How many formats are made.
        folder: Where the export is written.
        spare: What has to stay free, in bytes; 0 for no check.

    Raises:
        OSError: there is no room for it.
    """
    # the weights and an artifact for each format, and something for what converters write beside them
    needed = round(sum(tensor.nbytes for _, tensor in _persistent(root)) * 1.2 * (1 + steps))
    free = free_bytes(folder)
    if spare and free < needed + spare:
        raise OSError(
            errno.ENOSPC,
            f"an export may take {gigabytes(needed)} and training's next checkpoints {gigabytes(spare)}, but "
            f"{gigabytes(free)} are free",
        )


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

    Raises:
        BadRequest: the checkpoint cannot be read.
        OSError: the folder cannot be written.
    """
    import torch

    if not os.path.isfile(checkpoint):
        return []
    try:
        # this process has just written it, so it can be trusted; its tensors are mapped, not read
        held = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=is_zipfile(checkpoint))
    except OSError as error:
        raise BadRequest(f"{checkpoint} cannot be read: {line(error)}") from error
    known = {clean_name(name) for name in held.get("state_dict", held)}
    lacking = {name: tensor for name, tensor in _persistent(root) if name not in known}
    if not lacking:
        return []
    frozen = all(isinstance(each, torch.nn.Parameter) and not each.requires_grad for each in lacking.values())
    file = (captured if frozen else source) / LACKING
    if not file.exists():
        with writing(file) as opened:
            torch.save({name: tensor.detach() for name, tensor in lacking.items()}, opened)
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
