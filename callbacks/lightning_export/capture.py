"""What forward received on the first validation batch, and the module's structure: taken once, without touching either.

The spy stands in for `forward` during one batch. It is not a forward hook, because those also fire when Lightning sends
`validation_step` through `forward` under DDP, and do not fire where `forward` is called by its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils import _pytree as pytree

from polyexport.capture.pytree import closed, opened
from polyexport.capture.snapshot import (
    SHARDS,
    STRUCTURE,
    UNAVAILABLE,
    WEIGHTS,
    Select,
    save_call,
    save_structure,
    save_traced,
)
from polyexport.capture.surroundings import OFFERED


class Spy:
    """Takes copies of the arguments of the first call of `module.forward`; `remove` leaves no trace of it.

    Compiled code would not call it, so what is compiled around it runs eagerly meanwhile.
    """

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self._module = module
        self._eager = torch.compiler.set_stance("force_eager") if is_compiled(module, root) else None
        self._own = module.__dict__.get("forward")
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        forward = module.forward

        def spy(*args: Any, **kwargs: Any) -> Any:
            if self.call is None:
                # copies, before forward can change them in place
                self.call = closed(pytree.tree_map_only(torch.Tensor, _copy, opened((args, kwargs))))
            return forward(*args, **kwargs)

        module.__dict__["forward"] = spy

    def remove(self) -> None:
        """Put back what was there."""
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
        if self._own is None:
            self._module.__dict__.pop("forward", None)
        else:
            self._module.__dict__["forward"] = self._own


def is_compiled(module: nn.Module, root: nn.Module) -> bool:
    """Whether `torch.compile` took the module's forward, alone or as a part of something in `root`."""
    compiled = (each for each in root.modules() if each._compiled_call_impl or getattr(each, "_compiler_ctx", None))
    wrapped = (each for each in root.modules() if "OptimizedModule" in type(each).__name__)
    return any(module in each.modules() for each in (*compiled, *wrapped))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


_OF_THE_TRAINER = (
    "current_epoch", "global_step", "max_epochs", "max_steps", "precision", "fast_dev_run", "barebones", "testing",
    "predicting", "num_devices", "num_nodes", "world_size", "global_rank", "local_rank", "node_rank", "is_global_zero",
)  # fmt: skip  # one word a line would be longer than what reads it
"""What `self.trainer` still knows in a worker. Nothing that broadcasts, since one rank alone asks."""


def _attached(root: Any) -> dict[str, Any]:
    """For a forward that asks `self.trainer` or calls `self.log`: a trainer as it was in validation, and a deaf log."""
    trainer = getattr(root, "_trainer", None)
    if trainer is None:
        return {}
    known = {name: getattr(trainer, name) for name in _OF_THE_TRAINER}
    validating = {"training": False, "sanity_checking": False, "validating": True, "evaluating": True}
    return {"_trainer": SimpleNamespace(**known, **validating), "log": _log, "log_dict": _log}


def _log(*args: Any, **kwargs: Any) -> None:
    """Take the place of `self.log`, which asks the trainer for more than there is."""


def save(root: nn.Module, select: Select, args: Any, kwargs: Any, folder: Path, *, sharded: bool = False) -> str:
    """Write structure and call into `folder`; returns a note where it was not done the usual way.

    A module that cannot be pickled is traced here and now; where that fails too, the reason is written in its place.
    A sharded one is not traced: its forward gathers weights from all ranks, and the others would not be there.
    """
    save_call(args, kwargs, folder)
    try:
        save_structure(root, select, folder, _attached(root))
        return ""
    except Exception as error:  # any attribute of the user's module may refuse to be pickled, with any exception
        why = f"the module cannot be pickled ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    (folder / STRUCTURE).unlink(missing_ok=True)
    if sharded:
        reason = f"{why}, and one rank alone cannot trace it: its weights are sharded"
        (folder / UNAVAILABLE).write_text(reason, encoding="utf-8")
        return reason
    try:
        with isolate_rng():
            save_traced(root, select, args, kwargs, folder)
        return f"{why}, so it was traced in the training process"
    except Exception as error:  # torch.export raises what it pleases
        reason = f"{why}, nor traced ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        (folder / UNAVAILABLE).write_text(reason, encoding="utf-8")
        return reason


_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LIGHTNINGS = frozenset(vars(LightningModule()))
"""What Lightning itself keeps on a module, some of it another thing in each hook."""


def beside_weights(root: nn.Module) -> int:
    """A number that changes with the plain attributes and the buffers that no checkpoint has, cheap to ask."""
    found: list[Any] = []
    for each in root.modules():
        found += ((name, value) for name, value in vars(each).items() if isinstance(value, _PLAIN) and _is_own(name))
        buffers = (each._buffers[name] for name in each._non_persistent_buffers_set)
        found += ((id(b), None if b is None or b.is_inference() else b._version) for b in buffers)
    return hash(tuple(found))


def _is_own(name: str) -> bool:
    return name not in _LIGHTNINGS and name != "training"


def retake(root: nn.Module, select: Select, folder: Path) -> None:
    """Take the structure of `folder` anew, where it was pickled: training may have changed attributes and buffers.

    Where that fails the one that was there stays.
    """
    structure, before = folder / STRUCTURE, folder / f"{STRUCTURE}.before"
    if not structure.exists():
        return
    structure.rename(before)  # links to what other exports have too
    (folder / OFFERED).unlink(missing_ok=True)
    try:
        save_structure(root, select, folder, _attached(root))
        before.unlink()
    except Exception:  # as above
        before.replace(structure)


def hold(checkpoint: str, folder: Path) -> str | None:
    """Make sure that the weights survive the deletion of `checkpoint`, without reading them.

    A hard link `folder/weights.pt` where that works; on another file system a hidden link beside the checkpoint, whose
    path is returned, as is a URL; a copy only where the file system has no links. A checkpoint that is a folder of
    shards is linked file by file, as `folder/weights.shards`.
    """
    if "://" in checkpoint:
        return checkpoint
    source = os.path.realpath(checkpoint)
    target = folder / (SHARDS if os.path.isdir(source) else WEIGHTS)
    hidden = Path(f"{os.path.dirname(source)}/.{os.path.basename(source)}.{folder.parent.name}")
    for place in (target, hidden):
        try:
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
