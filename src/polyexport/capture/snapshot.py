"""The PyTorch side: a module to a folder and back.

A folder holds what a worker needs to rebuild the module without the process that trained it:

    structure.pkl    the module with its buffers, but of its parameters the shapes only (or a trace, structure.pt2)
    processing.pkl   what is done before and behind forward, if anything is
    call.pkl         the arguments that forward received, or the step before it
    call_001.pkl …   those of further batches, where a format is calibrated
    weights.pt       a state dict, or a Lightning checkpoint with one (or weights.shards, see `sharded`)

Requirements:
* Taking the structure neither copies a parameter nor touches the module: parameters are named by position while
  pickling (`persistent_id`), so tied weights stay tied.
* What comes back is flat (`polyexport.capture.flatten`), in eval mode, in float32 and on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from polyexport.capture import devices, processing, surroundings, unwrap
from polyexport.capture.attribute import attribute
from polyexport.capture.flatten import flat
from polyexport.capture.part_names import make_writable
from polyexport.capture.pickling import by_value, importable
from polyexport.capture.processing import NONE, Processing, joined
from polyexport.capture.pytree import closed, opened, tree_map
from polyexport.errors import BadRequest, line
from polyexport.spec import ExportSpec
from polyexport.tracing.decompositions import plain_attention
from polyexport.tracing.exported_program import export_program

if TYPE_CHECKING:
    import torch
    from torch import nn

Select = str | Callable[[Any], Any] | None
"""What of a module to export: a dotted attribute, a function of it, or None for itself."""


WEIGHTS, SHARDS = "weights.pt", "weights.shards"
"""The weights in a module's folder: a file, or until a worker has joined them a folder of several files."""

LACKING = "lacking.pt"
"""What the checkpoint has no weights for, of the module that trains: a state dict, where there is any."""

STRUCTURE = "structure.pkl"
"""The module without its weights."""

PROCESSING = "processing.pkl"
"""The steps around forward, where there are any."""

IDLE = "idle.pkl"
"""What forward reads without effect, which a trace is given as constants, where there is any: site -> values."""

UNAVAILABLE = "unavailable.txt"
"""Stands in a module's folder in place of what could not be saved, and says why."""


# --- to a folder ------------------------------------------------------------------------------------------------------


def dump(value: Any, path: Path, *, whole: bool = False) -> None:
    """Pickle any object; parameters leave only their shape unless `whole`, other tensors a CPU copy.

    Code that the other process could not import goes along.

    Raises:
        Exception: whatever the object's own pickling raises.
    """
    import torch

    try:
        pickled, parameters, tensors = _pickled(value)
    except Exception as error:  # objects of the user's, and anything may be said by them
        raise Unpicklable(line(error, 200), _path_to_unpicklable(value)) from error
    shapes = [(unwrap.shape(p), p.dtype, p.requires_grad) for p in parameters]
    copies = [_on_the_cpu(unwrap.local(tensor).detach()) for tensor in tensors]
    values = [_on_the_cpu(unwrap.local(parameter).detach()) for parameter in parameters] if whole else []
    torch.save({"pickle": pickled, "parameters": shapes, "tensors": copies, "values": values}, path)


class Unpicklable(Exception):
    """Something in an object cannot be pickled; the message says why, and at which attribute."""

    def __init__(self, why: str, path: str) -> None:
        super().__init__(f"{path}: {why}" if path else why)


def _pickled(value: Any) -> tuple[bytes, list[torch.nn.Parameter], list[torch.Tensor]]:
    """The pickle, in which parameters and other tensors are numbered, and both in that order."""
    import cloudpickle
    import torch

    parameters: list[torch.nn.Parameter] = []
    tensors: list[torch.Tensor] = []
    seen: dict[int, tuple[str, int]] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
        def persistent_id(self, item: Any) -> tuple[str, int] | None:
            if not isinstance(item, torch.Tensor):
                return None
            if id(item) not in seen:
                kind, shelf = ("parameter", parameters) if isinstance(item, torch.nn.Parameter) else ("tensor", tensors)
                seen[id(item)] = (kind, len(shelf))
                shelf.append(item)  # type: ignore[arg-type]  # the two lists differ in their element only
            return seen[id(item)]

        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, type | FunctionType) and not found_there(item.__module__):
                take_along(item.__module__)
            found = unwrap.reduced(item)
            return super().reducer_override(item) if found is NotImplemented else found

    buffer, found_there = io.BytesIO(), functools.cache(importable)
    with by_value() as take_along:
        Pickler(buffer).dump(value)
    return buffer.getvalue(), parameters, tensors


def _path_to_unpicklable(value: Any) -> str:
    """The attributes, keys and indices that lead to the smallest part that cannot be pickled, as in `net.log[0]`."""
    path, seen = "", {id(value)}
    while True:
        for step, child in unwrap.parts(value):
            if id(child) not in seen and not _can_be_pickled(child):
                path, value = path + step, child
                seen.add(id(child))
                break
        else:
            path = path.removeprefix("['root']").removeprefix(".")
            return f"{path} (a {type(value).__name__})" if path else ""


def _can_be_pickled(value: Any) -> bool:
    try:
        _pickled(value)
    except Exception:  # as above
        return False
    return True


def _on_the_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of one without values, which only the weights have, zeros."""
    import torch

    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor.to("cpu", copy=True).contiguous()


def restore(path: Path) -> Any:
    """Read what `dump` wrote; parameters come back with their shapes, and with values where those were written."""
    import torch

    # our own file, and it carries a pickle by design
    blob = torch.load(path, map_location="cpu", weights_only=False)
    made: dict[int, torch.nn.Parameter] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key: Any) -> Any:
            kind, index = key
            if kind == "tensor":
                return blob["tensors"][index]
            if index not in made:
                shape, dtype, requires_grad = blob["parameters"][index]
                value = blob["values"][index] if blob["values"] else torch.empty(shape or (), dtype=dtype)
                made[index] = torch.nn.Parameter(value, requires_grad=requires_grad and dtype.is_floating_point)
                made[index].of_any_shape = shape is None  # type: ignore[attr-defined]  # a tensor takes any attribute
            return made[index]

    file: BinaryIO = io.BytesIO(blob["pickle"])
    with torch.device("cpu"):
        found = Unpickler(file).load()
    devices.reset_default()
    return found


def save_module(
    root: nn.Module,
    select: Select,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    folder: Path,
    attributes: Mapping[str, Any] = MappingProxyType({}),
    *,
    sharded: bool = False,
    steps: Processing = NONE,
) -> str:
    """Write the structure into `folder`, and the steps around it; returns a note where it was not done the usual way.

    A module that cannot be pickled is traced here and now, which a `sharded` one cannot be; where that fails too, the
    reason is written in its place.
    """
    try:
        save_structure(root, select, folder, attributes)
        save_processing(steps, root, folder)
        return ""
    except BadRequest:
        raise
    except Exception as error:  # what is not told of as Unpicklable is found around the module, in the user's files
        why = f"the module cannot be pickled ({error})"
    for file in (STRUCTURE, PROCESSING):
        (folder / file).unlink(missing_ok=True)
    if sharded:
        reason = f"{why}, and one rank alone cannot trace it: its weights are sharded"
    else:
        try:
            save_traced(root, select, args, kwargs, folder, steps)
            return f"{why}, so it was traced where it trained"
        except Exception as error:  # torch.export raises what it pleases
            reason = f"{why}, nor traced ({line(error, 200)})"
    (folder / UNAVAILABLE).write_text(reason, encoding="utf-8")
    return reason


def save_structure(
    root: nn.Module, select: Select, folder: Path, attributes: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write `structure.pkl`: `root` without its weights, and what of it to export.

    `attributes` are set on it when it is back, in place of what does not survive pickling.
    """
    dump({"root": root, "select": select, "attributes": dict(attributes)}, folder / STRUCTURE)
    with contextlib.suppress(Exception):  # a function that was put into the user's files may hold anything
        dump(surroundings.taken(root), folder / surroundings.OFFERED)


def save_processing(steps: Processing, root: nn.Module, folder: Path) -> None:
    """Write the steps around forward with their weights, if there are any.

    Raises:
        BadRequest: one has weights of `root`, which training changes, and is no part of it.
        Unpicklable: one cannot be pickled.
    """
    if not steps.steps:
        return
    own, trained = processing.by_name(steps, root).steps, set(map(id, root.parameters()))
    dump(own, folder / PROCESSING, whole=True)
    for name, step in own.items():
        if trained & set(map(id, _pickled(step)[1])):
            raise BadRequest(
                f"{name} has weights of the module that trains, and is no part of it: give the name of one of its "
                f"attributes, {name}='prepare' say, or a method of it"
            )


def load_processing(folder: Path, root: Any) -> Processing:
    """The steps of `folder`; those that are parts of `root` are those of this one."""
    if not (folder / PROCESSING).exists():
        return NONE
    return processing.resolved(Processing(**restore(folder / PROCESSING)), root)


def call_file(folder: Path, index: int = 0) -> Path:
    """Where the arguments of forward lie, those of batch 0 or of a further one."""
    return folder / (f"call_{index:03}.pkl" if index else "call.pkl")


def further_calls(folder: Path) -> list[Path]:
    """The files of further batches, in order."""
    return sorted(folder.glob("call_*.pkl"))


def module_files(folder: Path) -> list[Path]:
    """What `load` and `example` read: everything but what came from further batches."""
    further = {call.stem for call in further_calls(folder)}
    return [path for path in folder.iterdir() if path.is_file() and path.stem not in further]


def save_call(args: Sequence[Any], kwargs: Mapping[str, Any], folder: Path, index: int = 0) -> None:
    """Write the arguments of forward; a constant that cannot be pickled, an open file say, stays behind."""
    call = (tuple(args), dict(kwargs))
    try:
        dump(call, call_file(folder, index))
    except Unpicklable:
        dump(closed(tree_map(_or_left_behind, opened(call))), call_file(folder, index))


def _or_left_behind(leaf: Any) -> Any:
    return leaf if _can_be_pickled(leaf) else unwrap.LeftBehind(type(leaf).__name__)


def check_call(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """See whether forward takes these arguments, or a function.

    Raises:
        BadRequest: it does not; the message has what it takes.
    """
    forward = getattr(module, "forward", module)
    kind = f"{type(module).__name__}.forward"
    name = getattr(module, "__qualname__", kind) if forward is module else kind
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return  # of a compiled one nothing is known
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(f"argument {index}" for index in range(len(args))), *map(repr, kwargs)]) or "nothing"
        takes = ", ".join(map(str, signature.parameters.values())) or "nothing"
        raise BadRequest(f"{name} takes ({takes}), and was given {given}: {error}") from None


def selected(root: Any, select: Select) -> Any:
    """Follow `select` from `root` to the module to export.

    Raises:
        BadRequest: no such attribute, or what is found there is no module.
    """
    import torch

    if select is None:
        found = root
    elif isinstance(select, str):
        found = attribute(root, select, "module")
    else:
        found = select(root)
    if not isinstance(found, torch.nn.Module):
        raise BadRequest(f"module={select!r} leads to a {type(found).__name__}, not to a torch.nn.Module")
    return found


# --- and back ---------------------------------------------------------------------------------------------------------


def load(folder: Path, outputs: tuple[str, ...] | None = None) -> Any:
    """Rebuild the module of `folder` as a flat one (see `flat`): eval mode, float32, on the CPU.

    `outputs` are the names of those to return, if not all: under a trace a number may be a tensor too.

    Raises:
        BadRequest: weights that the checkpoint lacks, or a call that is not made of tensors.
    """
    import torch

    if (folder / UNAVAILABLE).exists():
        raise BadRequest((folder / UNAVAILABLE).read_text(encoding="utf-8"))
    state = load_weights(folder / WEIGHTS)
    if (folder / LACKING).exists():
        state = load_weights(folder / LACKING) | state
    if (folder / "structure.pt2").exists():
        return _load_traced(folder / "structure.pt2", state)
    blueprint = restore(folder / STRUCTURE)
    if (folder / surroundings.SET).exists():
        surroundings.put_back(restore(folder / surroundings.SET))
    root = blueprint["root"]
    vars(root).update(blueprint["attributes"])
    _tame_attributes(root)
    for name, parameter in root.named_parameters():
        if getattr(parameter, "of_any_shape", False) and name in state:  # a scripted part's has its shape
            parameter.data = torch.empty_like(state[name])
    missing, _ = root.load_state_dict(state, strict=bool(getattr(root, "strict_loading", True)))
    module = selected(root, blueprint["select"])
    parameters, needed = dict(root.named_parameters()), set(map(id, module.parameters()))
    lost = [name for name in missing if id(parameters.get(name)) in needed]
    if lost:
        raise BadRequest(f"the checkpoint has no weights for {', '.join(lost[:5])} ({len(lost)} parameters in all)")
    _register_with_transformers(module)
    args, kwargs = restore(call_file(folder))
    wrapped = flat(joined(module, load_processing(folder, root)).float(), args, kwargs)
    wrapped.within, wrapped.kept = devices.OnTheCpu(), outputs
    wrapped.idle = restore(folder / IDLE) if (folder / IDLE).exists() else {}
    vars(wrapped)["core"] = module  # not as a part of it, which it is already
    unwrap.settle(wrapped)
    make_writable(wrapped)
    return wrapped


def call_tensors(path: Path) -> tuple[torch.Tensor, ...]:
    """The tensors of a saved call, in the order of a flat module's inputs."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(opened(restore(path)))
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)


def _tame_attributes(module: nn.Module) -> None:
    """Leave properties that raise out of `dir()`, and let `__getattr__` raise nothing but an AttributeError.

    torch.jit reads every attribute that is listed, and asks for many that are not there. `LightningModule.trainer` is
    one that raises, in a module without a trainer.
    """
    import torch

    for each in module.modules():
        kind = type(each)
        properties = {name for name in dir(kind) if isinstance(getattr(kind, name, None), property)}
        broken = frozenset(name for name in properties if _raises(each, name))
        changed: dict[str, Any] = {}
        if broken:
            changed["__dir__"] = functools.partialmethod(_listed, kind, broken)
        if kind.__getattr__ is not torch.nn.Module.__getattr__ and not isinstance(each, torch.jit.ScriptModule):
            changed["__getattr__"] = functools.partialmethod(_asked, kind)
        if changed:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
            each.__class__ = type(kind.__name__, (kind,), names | changed)


def _listed(self: Any, kind: Any, broken: frozenset[str]) -> list[str]:
    return [name for name in kind.__dir__(self) if name not in broken]


def _asked(self: Any, kind: Any, name: str) -> Any:
    """What the `__getattr__` of `kind` finds; where it fails in its own way, there is no such attribute."""
    try:
        return kind.__getattr__(self, name)
    except AttributeError:
        raise
    except Exception as error:
        raise AttributeError(f"{kind.__name__} has no attribute {name!r}: {error!r}") from error


def _register_with_transformers(module: nn.Module) -> None:
    """Do what transformers 5 does in `__init__` only, so that an unpickled model knows its `output_hidden_states`."""
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    registry = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        for each in module.modules():
            if hasattr(each, "_can_record_outputs"):
                registry[each] = each._can_record_outputs


def _raises(value: Any, name: str) -> bool:
    try:
        getattr(value, name)
    except AttributeError:
        return False  # what hasattr understands
    except Exception:  # a property is the user's code, and may raise anything
        return True
    return False


def load_weights(path: Path) -> dict[str, Any]:
    """Read a state dict, bare or inside a checkpoint."""
    blob = read_checkpoint(path)
    return {unwrap.clean_name(name): tensor for name, tensor in blob.get("state_dict", blob).items()}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `torch.save` wrote, without letting the file run code where that is possible."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        print(f"{path.name} holds more than tensors and was written by this run, so it is unpickled: {error}")
        found = torch.load(path, map_location="cpu", weights_only=False)
    return dict(found)


def example(folder: Path, spec: ExportSpec) -> tuple[torch.Tensor, ...]:
    """The inputs to trace `spec` with: real rows, at least two along a free axis, which a tracer would take for one."""
    import torch

    tensors = []
    with np.load(folder / "example.npz") as arrays:
        for tensor in spec.inputs:
            rows = tuple(slice(size if isinstance(size, int) else None) for size in tensor.shape)
            tensors.append(torch.from_numpy(np.array(arrays[tensor.name][rows], order="C")))
    return tuple(tensors)


# --- traced in process ------------------------------------------------------------------------------------------------


def save_traced(
    root: nn.Module,
    select: Select,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    folder: Path,
    steps: Processing = NONE,
) -> None:
    """Write `structure.pt2`, for a module that cannot be pickled: traced here, with a free batch axis where it allows.

    The weights in it are replaced by those of `weights.pt` at load, by the names they have in `root`.
    """
    import torch

    parts = (part for part in (root, *steps.steps.values()) if hasattr(part, "modules"))
    modes = [(each, each.training) for part in parts for each in part.modules()]
    try:
        wrapped = flat(joined(selected(root, select), processing.resolved(steps, root)), args, kwargs)  # in eval mode
        device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
        tensors = tuple(tensor.to(device) for tensor in wrapped.example)
        with torch.no_grad(), plain_attention():
            wrapped(*(tensor.clone() for tensor in tensors))
            wrapped.kept = wrapped.output_names
            program = _trace(wrapped, tensors)
    finally:
        for each, training in modes:
            each.training = training
    names = {id(tensor): unwrap.clean_name(name) for name, tensor in root.state_dict(keep_vars=True).items()}
    weights = {key: names.get(id(tensor), "") for key, tensor in wrapped.state_dict(keep_vars=True).items()}
    about = {
        "inputs": wrapped.input_names,
        "outputs": wrapped.output_names,
        "weights": weights,
        "widened": wrapped.widened,
    }
    torch.export.save(program, folder / "structure.pt2", extra_files={"about.json": json.dumps(about)})


def _trace(wrapped: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """With a free batch axis, or where that does not work, without."""
    batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim), 0)
    if batch > 1:
        leading = [(0,) if tensor.ndim and tensor.shape[0] == batch else () for tensor in tensors]
        with contextlib.suppress(Exception):  # torch.export has no error class of its own
            return export_program(wrapped, tensors, leading)
    return export_program(wrapped, tensors, [()] * len(tensors))


def _load_traced(path: Path, state: Mapping[str, Any]) -> Any:
    import torch
    from torch.export.passes import move_to_device_pass

    extra = {"about.json": ""}
    program = move_to_device_pass(torch.export.load(path, extra_files=extra), "cpu")
    about = json.loads(extra["about.json"])
    module: Any = program.module()
    module.load_state_dict({key: state[name] for key, name in about["weights"].items() if name in state}, strict=False)
    module.float().cpu()
    module.input_names, module.output_names, module.dropped = tuple(about["inputs"]), tuple(about["outputs"]), ()
    module.widened = about["widened"]
    module.example = call_tensors(call_file(path.parent))
    return module
