"""What forward received on the first validation batch, and the module's structure: taken once, without touching either.

The spy watches `forward` during one batch. It is not a forward hook, because those also fire when Lightning sends
`validation_step` through `forward` under DDP, and do not fire where `forward` is called by its name.
"""

from __future__ import annotations

import functools
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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lightning_export.watch import Call, CannotWatch, Watch
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
from polyexport.report.folders import lies_elsewhere, link


class Spy:
    """Takes copies of the arguments of the first call of `module.forward`; `remove` ends that.

    The module is left as it is, so that it pickles, copies and scripts meanwhile as what it is. Only where its calls
    cannot be seen from outside (see `Watch`), a function stands in for its forward. Compiled code would not be seen, so
    what is compiled around it runs eagerly meanwhile. Nothing here raises in the user's code.

    Attributes:
        call: The arguments; None as long as forward was not called.
        trouble: Why they are no copies; empty where they are.
    """

    def __init__(self, module: nn.Module, root: nn.Module, *, profiled: bool = False) -> None:
        self.call: Call | None = None
        self.trouble = ""
        self._eager = torch.compiler.set_stance("force_eager") if is_compiled(module, root) else None
        try:
            if profiled:
                raise CannotWatch("a profiler will run")
            self._end = Watch(module.forward, self._seen).end
        except CannotWatch:
            self._end = _stand_in(module, self._seen)

    def _seen(self, call: Call) -> bool:
        """Copy the arguments, before forward can change them in place; whether that is done."""
        try:
            if self.call is None and not _is_symbolic(call):
                self.call = call
                self.call = closed(pytree.tree_map_only(torch.Tensor, _copy, opened(call)))
        except Exception as error:  # they are the user's, and this is inside of his code
            self.trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return self.call is not None

    def remove(self) -> None:
        """Leave no trace."""
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None
        self._end()


def _stand_in(module: nn.Module, seen: Callable[[Call], bool]) -> Callable[[], None]:
    """Put a function in the place of `module.forward` that tells `seen`; returns what puts back what was there."""
    forward, own = module.forward, module.__dict__.get("forward")

    @functools.wraps(forward, updated=())
    def stands_in(*args: Any, **kwargs: Any) -> Any:
        seen((args, kwargs))
        return forward(*args, **kwargs)

    def end() -> None:
        if module.__dict__.get("forward") is stands_in:  # else it is the user's, who has changed it meanwhile
            del module.__dict__["forward"]
            module.__dict__.update({} if own is None else {"forward": own})

    module.__dict__["forward"] = stands_in
    return end


def _is_symbolic(call: Call) -> bool:
    """Whether a tracer calls, for whom a copy would be an operation like any other."""
    stand_ins = (torch.fx.Proxy, FakeTensor)
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
    return tracing or any(isinstance(leaf, stand_ins) for leaf in pytree.tree_leaves(call))


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
