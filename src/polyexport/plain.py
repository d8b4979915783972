"""A module as its author wrote it, without what training wrapped around it.

`torch.compile`, FSDP, tensor parallelism and DeepSpeed put wrappers, hooks and process groups on a module, which no
other process can use and most of which cannot be pickled. They are left out while pickling, and so are data sets that
a module holds, which may be gigabytes; the module that trains stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from polyexport import devices

if TYPE_CHECKING:
    import torch

_TRAINING_ONLY = ("torch.distributed.", "deepspeed.")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_COMPOSABLE = "__composable_api_state_key"
"""How names begin under which `fully_shard` and its like keep what they know of a module."""
_COMPILED = ("_compiled_call_impl", "_compiler_ctx")
"""Where `Module.compile` and Lightning keep what `torch.compile` made of a module."""


def reduced(item: Any) -> Any:
    """How to pickle a module without what training added: as `__reduce__` says it; NotImplemented for all else.

    A global that holds a context variable, which cannot be pickled, is named: a hook of transformers refers to one.
    """
    import torch
    from torch.nn.utils import parametrize

    found = devices.reduced(item)
    if found is not NotImplemented:
        return found
    if type(item).__name__ == "DeviceMesh":
        return type(None), ()
    if any(isinstance(each, ContextVar) for each in getattr(item, "__dict__", {}).values()):
        return _named(item)
    if not isinstance(item, torch.nn.Module):
        return (Data, (type(item).__name__,)) if is_data(item) else NotImplemented
    inner = _inner(item)
    if inner is not item:
        return _itself, (inner,)
    kind: Any = type(item)
    if kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    # a parametrised module refuses to tell its state, for fear of a class that is not there when it is read
    state = item.__dict__ if parametrize.is_parametrized(item) else item.__getstate__()
    if not isinstance(state, dict):
        return NotImplemented
    return _empty, (_own_class(kind),), _cleaned(state)


def is_data(item: Any) -> bool:
    """Whether it is a data set or a loader, of which nobody wants a copy: it may be gigabytes, or hold an open file."""
    from torch.utils.data import DataLoader, Dataset

    return isinstance(item, Dataset | DataLoader)


class Data:
    """Stands for a data set or a loader, of which nothing was taken along.

    Raises:
        AttributeError: forward asks for something of it; the message says what to do.
    """

    _kind = ""  # for a copy, which is asked for its methods before it has a state

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of a {self._kind}: no data is exported, so keep what forward needs on the module")


def _empty(kind: Any) -> Any:
    """Not `copyreg.__newobj__`, with which pickle allows no class but the object's own."""
    return kind.__new__(kind)


def _named(item: Any) -> Any:
    """An object as a global of the module that its class is from."""
    module = sys.modules.get(type(item).__module__)
    name = next((name for name, value in vars(module).items() if value is item), None) if module else None
    return NotImplemented if name is None else (getattr, (module, name))


def _itself(value: Any) -> Any:
    return value


def _inner(module: Any) -> Any:
    """What a wrapper of `torch.compile` or of FSDP holds."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name == "torch._dynamo.eval_frame.OptimizedModule":
        return module._orig_mod
    return module.module if name.endswith(".FullyShardedDataParallel") else module


def _own_class(kind: type) -> type:
    """The class that `fully_shard` derived its own from, or `kind` itself."""
    if not any(each.__name__ == "FSDPModule" for each in kind.__bases__):
        return kind
    return next(each for each in kind.__bases__ if each.__name__ != "FSDPModule")


def _cleaned(state: Mapping[str, Any]) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    kind: Any
    for name, value in state.items():
        kind = type(value)
        if name in _COMPILED:
            cleaned[name] = None
        elif name in _BACKWARD:
            cleaned[name] = kind()
        elif name.endswith("_hooks") and isinstance(value, Mapping):
            cleaned[name] = kind((key, hook) for key, hook in value.items() if not _of_training(hook))
        elif not (name.startswith(_COMPOSABLE) or hasattr(value, "_torchdynamo_orig_callable")):
            cleaned[name] = value  # and not a method that was compiled, in place of the class's
    return cleaned


def _of_training(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(_TRAINING_ONLY)


def shape(parameter: torch.nn.Parameter) -> tuple[int, ...] | None:
    """The shape of a whole parameter; None where only the checkpoint knows it, since this is a shard."""
    if getattr(parameter, "_fsdp_flattened", False):
        return None
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its device mesh; buffers are the same on every rank."""
    found: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return found


def clean_name(name: str) -> str:
    """A parameter's name without what `torch.compile` wrote into it."""
    return name.replace("_orig_mod.", "")


def settle(module: torch.nn.Module) -> None:
    """Fix what only training changes: parametrised weights become plain ones, fake quantisation stops observing.

    Both change no answer: a parametrised weight is the same at each call in eval mode, and no validation batch is to
    move scales that were trained.
    """
    from torch.nn.utils import parametrize

    for each in tuple(module.modules()):
        if parametrize.is_parametrized(each):
            for name in tuple(each.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                parametrize.remove_parametrizations(each, name)
        for name, child in each.named_children():
            if hasattr(child, "fake_quant_enabled"):
                setattr(each, name, _rounding(child))


def _rounding(fake: Any) -> torch.nn.Module:
    """A fake quantiser of torch.ao in arithmetic that every converter knows, with the scales it has now.

    https://docs.pytorch.org/docs/stable/generated/torch.fake_quantize_per_channel_affine.html
    """
    import torch

    class Rounding(torch.nn.Module):
        scale: torch.Tensor
        zero: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", fake.scale.detach().clone())
            self.register_buffer("zero", fake.zero_point.detach().to(fake.scale.dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shape = [1] * x.dim()
            if fake.is_per_channel:
                shape[fake.ch_axis] = -1
            scale, zero = self.scale.reshape(shape), self.zero.reshape(shape)
            steps = torch.clamp(torch.round(x * (1 / scale)) + zero, fake.quant_min, fake.quant_max)
            return (steps - zero) * scale

    return Rounding() if bool(fake.fake_quant_enabled) else torch.nn.Identity()
