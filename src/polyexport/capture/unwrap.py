"""A module as its author wrote it, without the wrappers that training added.

`torch.compile`, FSDP, tensor parallelism and DeepSpeed add wrappers, hooks and process groups to a module, which no
other process can use and most of which cannot be pickled. They are left out while pickling. So are objects of training,
wherever they are: trainers, callbacks, loggers, and data sets, which may be gigabytes. The training module itself is
not changed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import FunctionType, MemberDescriptorType
from typing import TYPE_CHECKING, Any

from polyexport.capture import devices, exported_graph

if TYPE_CHECKING:
    import torch

_TRAINING_ONLY = ("torch.distributed.", "deepspeed.")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_COMPOSABLE = "__composable_api_state_key"
"""Prefixes of the attributes that `fully_shard` and similar functions set on a module."""
_COMPILED = ("_compiled_call_impl", "_compiler_ctx")
"""Attributes in which `Module.compile` and Lightning store the result of `torch.compile`."""
_COMPILED_FROM = "_torchdynamo_orig_callable"
"""Attribute in which a function made by `torch.compile` stores the original function."""


def reduced(item: Any) -> Any:
    """How to pickle a module without what training added, as `__reduce__` returns it; NotImplemented for all else.

    A global with a context variable, which cannot be pickled, is pickled by name: a hook of transformers refers to one.
    """
    import torch

    if type(item) in weakref.ProxyTypes:
        return weakref.proxy, (item.__repr__.__self__,)
    if isinstance(item, FunctionType) and _COMPILED_FROM in vars(item):
        return _itself, (vars(item)[_COMPILED_FROM],)
    found = devices.reduced(item)
    if found is not NotImplemented:
        return found
    if type(item).__name__ == "DeviceMesh":
        return type(None), ()
    if type(item).__name__ == "LeafSpec":  # of a traced graph's inputs; torch warns where pickle makes one
        return torch.utils._pytree.treespec_leaf, ()
    if any(isinstance(each, ContextVar) for each in own_attributes(item).values()):
        return _named(item)
    if isinstance(item, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return _scripted(item)
    if not isinstance(item, torch.nn.Module):
        return _reduced_object(item)
    inner = _inner(item)
    if inner is not item:
        return _itself, (inner,)
    if exported_graph.is_exported(item):
        return exported_graph.reduced(item)
    kind: Any = type(item)
    if kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    # a parametrized module refuses `__getstate__`, since its generated class does not exist elsewhere
    state = item.__dict__ if "parametrizations" in item._modules else item.__getstate__()
    if not isinstance(state, dict):
        return NotImplemented
    if slots := _slots(item):  # which a module's state does not include
        return _empty, (_own_class(kind),), (_cleaned(state, kind), slots), None, None, _fill
    return _empty, (_own_class(kind),), _cleaned(state, kind)


def _slots(item: Any) -> dict[str, Any]:
    """The values of an object's `__slots__`."""
    slots = {}
    for kind in type(item).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # an empty slot
                    slots[name] = slot.__get__(item)
    return slots


def _reduced_object(item: Any) -> Any:
    """How to pickle other objects that need help."""
    kind: Any = type(item)
    if isinstance(item, type):
        return NotImplemented
    if is_data(item) or is_of_training(item):
        return LeftBehind, (kind.__name__,)
    if isinstance(item, weakref.ref):
        return _weak, (item(), isinstance(item, weakref.WeakMethod))
    if isinstance(item, _LOCKS):
        return threading.RLock if isinstance(item, _LOCKS[1]) else threading.Lock, ()
    own = any(getattr(kind, name, None) is not getattr(object, name, None) for name in _PICKLING)
    if own or "__getattr__" not in {name for base in kind.__mro__ for name in vars(base)}:
        return NotImplemented
    # pickle looks up __setstate__ on an empty object, whose __getattr__ may then fail
    elements = iter(item) if isinstance(item, list) else None
    entries = iter(dict.items(item)) if isinstance(item, dict) else None  # Lightning's hparams are such a dict
    return _empty, (kind,), (dict(own_attributes(item)), _slots(item)), elements, entries, _fill


_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
_LOCKS = (type(threading.Lock()), type(threading.RLock()))


def _fill(item: Any, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Set an object's attributes and slots."""
    import torch

    attributes, slots = state
    if isinstance(item, torch.nn.Module):
        item.__setstate__(attributes)  # type: ignore[no-untyped-call]  # PyTorch's
    elif attributes:
        object.__getattribute__(item, "__dict__").update(attributes)
    for name, value in slots.items():
        object.__setattr__(item, name, value)


def _weak(target: Any, method: bool) -> Any:
    """A weak reference to an object, or a dead one."""
    if target is None:
        return weakref.ref(LeftBehind("target that is gone"))
    return weakref.WeakMethod(target) if method else weakref.ref(target)


def _scripted(item: Any) -> Any:
    """A scripted or traced module or function: as the Python function it was made from, or as bytes."""
    import torch

    python = getattr(item, "_torchdynamo_inline", None) if isinstance(item, torch.jit.ScriptFunction) else None
    if python is not None:
        return _itself, (python,)
    buffer = io.BytesIO()
    torch.jit.save(item, buffer)
    return _unscripted, (buffer.getvalue(), getattr(item, "training", False))


def _unscripted(code: bytes, training: bool) -> Any:
    import torch

    made = torch.jit.load(io.BytesIO(code), map_location="cpu")
    return made.train(training) if isinstance(made, torch.nn.Module) else made


def is_data(item: Any) -> bool:
    """Whether it is a data set or a loader, which may be gigabytes, or have an open file."""
    from torch.utils.data import DataLoader, Dataset

    return isinstance(item, Dataset | DataLoader)


def is_of_training(item: Any) -> bool:
    """Whether it belongs to training: a trainer, callback, logger, strategy or data module, of either Lightning."""
    bases = ((base.__module__.split(".")[0], base.__name__) for base in type(item).__mro__)
    return any(package in _TRAINERS and name in _OF_TRAINERS for package, name in bases)


_TRAINERS = ("lightning", "pytorch_lightning", "lightning_fabric", "wandb", "torch", "tensorboardX")
_OF_TRAINERS = (
    "Trainer",
    "Fabric",
    "Callback",
    "Logger",
    "Strategy",
    "Accelerator",
    "Profiler",
    "LightningDataModule",
    "Run",
    "SummaryWriter",
)


class LeftBehind:
    """A placeholder for an object of training, such as a data set or a callback, which is not pickled.

    Raises:
        AttributeError: forward uses an attribute of it; the message says what to do.
    """

    _kind = ""  # copying looks up methods before the state is set

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        why = "it stays with training, so keep what forward needs in the module"
        raise AttributeError(f"{name} of a {self._kind}: {why}")


def parts(item: Any) -> Iterator[tuple[str, Any]]:
    """The parts of an object, each with its path: `.name`, `[0]` or `['key']`."""
    import torch

    if isinstance(item, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in item.items())
    elif isinstance(item, list | tuple | set | frozenset):
        yield from ((f"[{index}]", value) for index, value in enumerate(item))
    elif not isinstance(item, type):
        held = own_attributes(item)
        if isinstance(item, torch.nn.Module):  # parameters, buffers and submodules are attributes by name
            held = {**held, **held["_modules"]}
            held = {name: value for name, value in held.items() if name not in ("_modules", "_parameters")}
        yield from ((f".{name}", value) for name, value in held.items())


def own_attributes(item: Any) -> Mapping[str, Any]:
    """Its `__dict__`, if it has one, without calling its `__getattr__`."""
    try:
        found = object.__getattribute__(item, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _empty(kind: Any) -> Any:
    """An object without `__init__`; unlike `copyreg.__newobj__`, of any class."""
    return kind.__new__(kind)


def _named(item: Any) -> Any:
    """An object pickled by its name in the module of its class."""
    module = sys.modules.get(type(item).__module__)
    name = next((name for name, value in vars(module).items() if value is item), None) if module else None
    return NotImplemented if name is None else (getattr, (module, name))


def _itself(value: Any) -> Any:
    return value


def _inner(module: Any) -> Any:
    """The module inside a wrapper of `torch.compile` or FSDP."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name == "torch._dynamo.eval_frame.OptimizedModule":
        return module._orig_mod
    return module.module if name.endswith(".FullyShardedDataParallel") else module


def _own_class(kind: type) -> type:
    """The original class of a module that `fully_shard` changed, or `kind` itself."""
    if not any(each.__name__ == "FSDPModule" for each in kind.__bases__):
        return kind
    return next(each for each in kind.__bases__ if each.__name__ != "FSDPModule")


def _cleaned(state: Mapping[str, Any], owner: type) -> dict[str, Any]:
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
        elif not (name.startswith(_COMPOSABLE) or (_COMPILED_FROM in own_attributes(value) and hasattr(owner, name))):
            cleaned[name] = value  # but not a compiled method in place of the class's
    return cleaned


def _of_training(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(_TRAINING_ONLY)


def shape(parameter: torch.nn.Parameter) -> tuple[int, ...] | None:
    """The shape of a whole parameter; None if this is a shard and only the checkpoint has it."""
    if getattr(parameter, "_fsdp_flattened", False):
        return None
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its device mesh; buffers are the same on every rank."""
    found: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return found


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of `torch.compile`."""
    return name.replace("_orig_mod.", "")


def settle(module: torch.nn.Module) -> None:
    """Fix what only training changes: parametrized weights become plain ones, fake quantization stops observing.

    Neither changes the outputs: a parametrized weight is the same at each call in eval mode, and validation batches
    should not change trained scales.
    """
    from torch.nn.utils import parametrize

    fixed: dict[torch.nn.Module, torch.nn.Module] = {}
    for each in tuple(module.modules()):
        if parametrize.is_parametrized(each):
            for name in tuple(each.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                parametrize.remove_parametrizations(each, name)
        for name, child in tuple(each._modules.items()):  # unlike named_children, with each name of a shared one
            if child is not None and hasattr(child, "fake_quant_enabled"):
                setattr(each, name, fixed.setdefault(child, _rounding(child)))
        if all(hasattr(each, name) for name in ("weight_fake_quant", "bn", "_conv_forward")):
            each._forward = functools.partial(_with_batch_norm, each)  # type: ignore[assignment]  # torch.ao calls it
        if exported_graph.is_exported(each):
            exported_graph.fold_batch_norms(each)  # type: ignore[arg-type]  # it is a GraphModule


def _with_batch_norm(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """The output of a convolution of torch.ao with its batch norm folded in, in eval mode, as one convolution.

    Its own forward scales the weights and divides the result again, which leaves no integer convolution.
    """
    norm = conv.bn
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight_fake_quant(conv.weight * factor.reshape(-1, *[1] * (conv.weight.dim() - 1)))
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv._conv_forward(x, weight, norm.bias - mean * factor)  # type: ignore[no-any-return]


def has_fake_quantization(module: torch.nn.Module) -> bool:
    """Whether a module, after `settle`, has fake quantization."""
    return any(getattr(each, "is_fake_quantization", False) for each in module.modules())


def _rounding(fake: Any) -> torch.nn.Module:
    """A fake quantizer of torch.ao as arithmetic that every converter supports, with its present scales.

    https://docs.pytorch.org/docs/stable/generated/torch.fake_quantize_per_channel_affine.html
    """
    import torch

    class Rounding(torch.nn.Module):
        scale: torch.Tensor
        zero: torch.Tensor
        is_fake_quantization = True

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
