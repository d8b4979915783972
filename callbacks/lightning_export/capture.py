"""What forward received on the first validation batch, and the module's structure: taken once, without touching either.

The spy stands in for `forward` during one batch. It is not a forward hook, because those also fire when Lightning sends
`validation_step` through `forward` under DDP, and do not fire where `forward` is called by its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
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
    LACKING,
    SHARDS,
    STRUCTURE,
    WEIGHTS,
    Select,
    save_call,
    save_module,
    save_structure,
)
from polyexport.capture.surroundings import OFFERED
from polyexport.capture.unwrap import clean_name
from polyexport.report.folders import link


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


class Called:
    """Notes which parts of a module are called, by their names in it, until `remove`."""

    def __init__(self, root: nn.Module) -> None:
        self.names: list[str] = []
        names = {id(each): name for name, each in root.named_modules() if name}

        def note(module: nn.Module, args: Any) -> None:
            name = names.get(id(module))
            if name is not None and name not in self.names:
                self.names.append(name)

        # for all modules, so that none of the user's has a hook; compiled ones would be compiled again for it
        compiled = any(is_compiled(each, root) for each in root.modules())
        self._hook = None if compiled else nn.modules.module.register_module_forward_pre_hook(note)

    def remove(self) -> None:
        """Note no more."""
        if self._hook is not None:
            self._hook.remove()

    @property
    def outermost(self) -> list[str]:
        """Those that no other one called was around."""
        inner = {name for name in self.names if any(name.startswith(f"{other}.") for other in self.names)}
        return [name for name in self.names if name not in inner]


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

    A sharded module is not traced: its forward gathers weights from all ranks, and the others would not be there.
    """
    save_call(args, kwargs, folder)
    with isolate_rng():
        return save_module(root, select, args, kwargs, folder, _attached(root), sharded=sharded)


def save_lacking(root: nn.Module, checkpoint: str, captured: Path, source: Path) -> list[str]:
    """Write into `source` the weights of `root` that its checkpoint lacks, and return their names.

    Of those that are frozen one copy is made, in `captured`; any others change, and are written each time.
    """
    if not os.path.isfile(checkpoint):
        return []
    # written by this process a moment ago; the tensors in it are mapped, not read
    held = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
    known = {clean_name(name) for name in held.get("state_dict", held)}
    lacking = {name: tensor for name, tensor in _persistent(root) if name not in known}
    if not lacking:
        return []
    frozen = all(isinstance(each, nn.Parameter) and not each.requires_grad for each in lacking.values())
    file = (captured if frozen else source) / LACKING
    if not file.exists():
        torch.save({name: tensor.detach() for name, tensor in lacking.items()}, file)
    if frozen:
        link(file, source / LACKING)
    return list(lacking)


def _persistent(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict has by default, whatever hooks and overrides make of it."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield clean_name(f"{prefix}.{name}".removeprefix(".")), tensor


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
