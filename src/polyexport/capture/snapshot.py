"""Saves a PyTorch module to a folder, and loads it again.

A folder holds what a worker needs to rebuild the module without the process that trained it:

    structure.pkl    the module with its buffers, but only the shapes of its parameters (or a trace, structure.pt2)
    processing.pkl   the steps before and after forward, if any
    call.pkl         the arguments of forward, or of `preprocess`
    call_001.pkl …   those of further batches
    weights.pt       a state dict, or a Lightning checkpoint with one (or weights.shards, see `sharded`)

Requirements:
* Saving the structure neither copies a parameter nor changes the module: parameters are numbered while
  pickling (`persistent_id`), so tied weights stay tied.
* The loaded module is flat (`polyexport.capture.flatten`), in eval mode, in float32 and on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO
from zipfile import is_zipfile

import numpy as np

from polyexport.capture import devices, processing, surroundings, unwrap
from polyexport.capture.attribute import attribute
from polyexport.capture.dtypes import InFloat32, asked_for_by
from polyexport.capture.flatten import as_call, as_taken, flat
from polyexport.capture.part_names import make_writable
from polyexport.capture.pickling import by_value, importable
from polyexport.capture.processing import NONE, Processing, joined
from polyexport.capture.pytree import closed, opened, tree_map
from polyexport.errors import BadRequest, line
from polyexport.serialization import writing
from polyexport.spec import ExportSpec
from polyexport.tracing.attention import plain_attention
from polyexport.tracing.exported_program import export_program, in_float32

if TYPE_CHECKING:
    import torch
    from torch import nn

Select = str | Callable[[Any], Any] | None
"""The part of a module to export: a dotted attribute, a function of the module, or None for all of it."""


WEIGHTS, SHARDS = "weights.pt", "weights.shards"
"""Names in a module's folder of the weights: a file, or until a worker has joined them a folder of shards."""

LACKING = "lacking.pt"
"""File with the training module's weights that the checkpoint lacks: a state dict, if there are any."""

STRUCTURE, ATTRIBUTES = "structure.pkl", "attributes.pkl"
"""The module without its weights."""

PROCESSING = "processing.pkl"
"""The steps before and after forward, if any."""

IDLE, DRAWS = "idle.pkl", "draws.pkl"
"""What forward reads without effect, which a trace is given as constants, where there is any: site -> values."""

IN_FLOAT32 = "in_float32"
"""File that is there if casts in forward are left out; see `polyexport.capture.dtypes`."""

GUARDS = "guards"
"""File that is there if forward looks for NaN or infinity; see `polyexport.tracing.nans`."""

UNAVAILABLE = "unavailable.txt"
"""File in a module's folder with the reason why the module could not be saved."""


# --- to a folder ------------------------------------------------------------------------------------------------------


def dump(value: Any, path: Path, *, without: Iterable[torch.Tensor] | None = ()) -> None:
    """Pickle any object; parameters `without` values, or all for None, are reduced to their shapes.

    Tensors move to the CPU. Code that another process could not import is pickled by value.

    Raises:
        Unpicklable: the object's own pickling raises something.
        OSError: the file cannot be written; one that was there stays.
    """
    import torch

    try:
        pickled, parameters, tensors = _pickled(value)
    except Exception as error:  # the user's objects may raise anything
        raise Unpicklable(line(error, 200), _path_to_unpicklable(value)) from error
    shapes = [(unwrap.shape(p), p.dtype, p.requires_grad) for p in parameters]
    copies = [_on_the_cpu(unwrap.local(tensor).detach()) for tensor in tensors]
    valueless = set(map(id, parameters if without is None else without))
    values = [
        None if id(parameter) in valueless or shape is None else _on_the_cpu(unwrap.local(parameter).detach())
        for parameter, (shape, _, _) in zip(parameters, shapes, strict=True)
    ]
    with writing(path) as file:
        torch.save({"pickle": pickled, "parameters": shapes, "tensors": copies, "values": values}, file)


class Unpicklable(Exception):
    """Something in an object cannot be pickled; the message says why, and at which attribute."""

    def __init__(self, why: str, path: str) -> None:
        super().__init__(f"{path}: {why}" if path else why)


def _pickled(value: Any) -> tuple[bytes, list[torch.nn.Parameter], list[torch.Tensor]]:
    """The pickle, in which parameters and other tensors are numbers, and lists of both in that order."""
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
                shelf.append(item)  # type: ignore[arg-type]  # the two lists differ only in their element type
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
    """The path of attributes, keys and indices to the smallest part that cannot be pickled, as in `net.log[0]`."""
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
    """It, to be written on the CPU without more of its storage; zeros for a meta tensor, whose values are weights."""
    import torch

    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.layout is not torch.strided:
        return tensor.to("cpu", copy=True)
    is_dense = tensor.device.type == "cpu" and tensor.is_contiguous()
    if is_dense and tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor  # a copy is made by all of PyTorch's threads, and the cores may be busy
    return tensor.to("cpu", copy=True).contiguous()


def restore(path: Path) -> Any:
    """Read what `dump` wrote; parameters have their shapes, and their values if those were written."""
    import torch

    # our own file, which is a pickle by design
    blob = torch.load(path, map_location="cpu", weights_only=False)
    made: dict[int, torch.nn.Parameter] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key: Any) -> Any:
            kind, index = key
            if kind == "tensor":
                return blob["tensors"][index]
            if index not in made:
                shape, dtype, requires_grad = blob["parameters"][index]
                value = blob["values"][index]
                is_trained = value is None and requires_grad and dtype.is_floating_point
                value = torch.empty(shape or (), dtype=dtype) if value is None else value
                made[index] = torch.nn.Parameter(value, requires_grad=is_trained)
                made[index].of_any_shape = shape is None  # type: ignore[attr-defined]  # a tensor takes any attribute
            return made[index]

    file: BinaryIO = io.BytesIO(blob["pickle"])
    with torch.device("cpu"), warnings.catch_warnings():  # the user's files may make them errors when imported
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
    """Write the structure and the processing steps into `folder`; returns a note if it was not done the usual way.

    A module that cannot be pickled is traced here, unless it is `sharded`; if that fails too, the reason is written
    instead.
    """
    try:
        save_structure(root, select, folder, attributes)
        save_processing(steps, root, folder)
        return ""
    except (BadRequest, OSError):
        raise
    except Exception as error:  # other errors come from the user's files around the module
        why = f"the module cannot be pickled ({error if isinstance(error, Unpicklable) else line(error)})"
    for file in (STRUCTURE, PROCESSING):
        (folder / file).unlink(missing_ok=True)
    if sharded:
        reason = f"{why}, and one rank alone cannot trace it: its weights are sharded"
    else:
        try:
            save_traced(root, select, args, kwargs, folder, steps)
            return f"{why}, so it was traced in the training process"
        except OSError:
            raise
        except Exception as error:  # torch.export raises many types
            reason = f"{why}, nor traced ({error if isinstance(error, Untraceable) else line(error, 200)})"
    (folder / UNAVAILABLE).write_text(reason, encoding="utf-8")
    return reason


def save_structure(
    root: nn.Module, select: Select, folder: Path, attributes: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write `structure.pkl`: `root` without the weights that its checkpoints have, and the part of it to export.

    `attributes` are set on it when it is loaded, in place of those that cannot be pickled.
    """
    blueprint = {"root": root, "select": select, "attributes": dict(attributes)}
    # a module that is hidden in a list, say, is in no checkpoint
    dump(blueprint, folder / STRUCTURE, without=root.parameters())
    save_surroundings(root, folder)


def save_surroundings(root: nn.Module, folder: Path) -> None:
    """Write the globals that forward may read; see `surroundings`.

    Raises:
        OSError: the file cannot be written.
    """
    with contextlib.suppress(Unpicklable):  # functions in the user's files may refer to anything
        try:
            found = surroundings.taken(root)
        except Exception:  # what the user's files have may be compared, listed or hashed only with errors
            found = {}
        try:
            dump(found, folder / surroundings.OFFERED, without=None)
        except Unpicklable:
            kept = {home: {n: v for n, v in values.items() if _can_be_pickled(v)} for home, values in found.items()}
            dump(kept, folder / surroundings.OFFERED, without=None)


def save_processing(steps: Processing, root: nn.Module, folder: Path) -> None:
    """Write the steps before and after forward with their weights, if there are any.

    Raises:
        BadRequest: one has weights of `root`, which training changes, but is not a part of it.
        Unpicklable: one cannot be pickled.
    """
    if not steps.steps:
        return
    own, trained = processing.by_name(steps, root).steps, set(map(id, root.parameters()))
    dump(own, folder / PROCESSING)
    for name, step in own.items():
        if trained & set(map(id, _pickled(step)[1])):
            raise BadRequest(
                f"{name} has weights of the module that trains, but is not a part of it: give the name of one of its "
                f"attributes, such as {name}='prepare', or a method of it"
            )


def leave_out(folder: Path, outside: Sequence[str]) -> None:
    """Remove the processing steps `outside` from a module's folder, whose files may be hard links: they are replaced.

    Without `preprocess`, the calls become those that forward receives from it.
    """
    if "preprocess" in outside:
        first = Processing(load(folder).inner.preprocess)
        for index in range(1 + len(further_calls(folder))):
            raw = restore(call_file(folder, index))
            call_file(folder, index).unlink()
            save_call(*as_call(processing.preprocessed(first, *raw)), folder, index)
    steps = restore(folder / PROCESSING)
    (folder / PROCESSING).unlink()
    if kept := {name: step for name, step in steps.items() if name not in outside}:
        dump(kept, folder / PROCESSING)


def load_processing(folder: Path, root: Any) -> Processing:
    """The steps of `folder`; steps that are submodules of the exported module are taken from `root`."""
    if not (folder / PROCESSING).exists():
        return NONE
    return processing.resolved(Processing(**restore(folder / PROCESSING)), root)


def call_file(folder: Path, index: int = 0) -> Path:
    """The file with the arguments of forward for batch 0 or a further one."""
    return folder / (f"call_{index:03}.pkl" if index else "call.pkl")


def further_calls(folder: Path) -> list[Path]:
    """The files of further batches, in order."""
    return sorted(folder.glob("call_*.pkl"))


def module_files(folder: Path) -> list[Path]:
    """The files that `load` and `example` read: all but those of further batches."""
    further = {call.stem for call in further_calls(folder)}
    return [path for path in folder.iterdir() if path.is_file() and path.stem not in further]


def save_call(args: Sequence[Any], kwargs: Mapping[str, Any], folder: Path, index: int = 0) -> None:
    """Write the arguments of forward; a constant that cannot be pickled, such as an open file, is left out."""
    call = (tuple(args), dict(kwargs))
    try:
        dump(call, call_file(folder, index))
    except Unpicklable:
        dump(closed(tree_map(_or_left_behind, opened(call))), call_file(folder, index))


def _or_left_behind(leaf: Any) -> Any:
    return leaf if _can_be_pickled(leaf) else unwrap.LeftBehind(type(leaf).__name__)


def check_call(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that forward, or another function, takes these arguments.

    Raises:
        BadRequest: it does not; the message has its parameters.
    """
    forward = getattr(module, "forward", module)
    kind = f"{type(module).__name__}.forward"
    name = getattr(module, "__qualname__", kind) if forward is module else kind
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return  # compiled functions may have no signature
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(f"argument {index}" for index in range(len(args))), *map(repr, kwargs)]) or "nothing"
        takes = ", ".join(map(str, signature.parameters.values())) or "nothing"
        raise BadRequest(f"{name} takes ({takes}), but was given {given}: {error}") from None


def selected(root: Any, select: Select) -> Any:
    """Follow `select` from `root` to the module to export.

    Raises:
        BadRequest: there is no such attribute, or it is not a module.
    """
    import torch

    if select is None:
        found = root
    elif isinstance(select, str):
        found = attribute(root, select, "module")
    else:
        found = select(root)
    if not isinstance(found, torch.nn.Module):
        raise BadRequest(f"module={select!r} is a {type(found).__name__}, not a torch.nn.Module")
    return found


# --- and back ---------------------------------------------------------------------------------------------------------


def load(folder: Path, outputs: tuple[str, ...] | None = None) -> Any:
    """Rebuild the module of `folder` as a flat one (see `flat`): eval mode, float32, on the CPU.

    `outputs` are the names of those to return, if not all: in a trace numbers may be tensors too.

    Raises:
        BadRequest: the checkpoint lacks weights, or the call cannot be flattened.
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
    vars(root).update(restore(folder / ATTRIBUTES) if (folder / ATTRIBUTES).exists() else blueprint["attributes"])
    _tame_attributes(root)
    for name, parameter in root.named_parameters():
        # a scripted submodule's parameter already has its shape
        if getattr(parameter, "of_any_shape", False) and name in state:
            parameter.data = torch.empty_like(state[name])
    for name, buffer in root.named_buffers():
        if name in state and buffer.shape != state[name].shape:  # it grows while training
            buffer.data = torch.empty_like(state[name], dtype=buffer.dtype)
    missing, _ = root.load_state_dict(_versioned(state, root), strict=bool(getattr(root, "strict_loading", True)))
    module = selected(root, blueprint["select"])
    parameters, needed = dict(root.named_parameters()), set(map(id, module.parameters()))
    lost = [name for name in missing if id(parameters.get(name)) in needed]
    if lost:
        raise BadRequest(f"the checkpoint has no weights for {', '.join(lost[:5])} ({len(lost)} parameters in all)")
    _register_with_transformers(module)
    args, kwargs = restore(call_file(folder))
    wrapped = flat(joined(module, load_processing(folder, root)).float(), args, kwargs)
    wrapped.in_float32 = InFloat32(casts_left_out=(folder / IN_FLOAT32).exists())
    wrapped.within, wrapped.kept = (devices.OnTheCpu(), wrapped.in_float32), outputs
    wrapped.idle = restore(folder / IDLE) if (folder / IDLE).exists() else {}
    wrapped.guards = (folder / GUARDS).exists()
    wrapped.draws = restore(folder / DRAWS) if (folder / DRAWS).exists() else None
    vars(wrapped)["core"] = module  # not as a submodule, which it is already
    unwrap.settle(wrapped)
    make_writable(wrapped)
    return wrapped


def call_tensors(path: Path) -> tuple[torch.Tensor, ...]:
    """The tensors of a saved call, in the order of a flat module's inputs."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(opened(restore(path)))
    return tuple(as_taken(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _tame_attributes(module: nn.Module) -> None:
    """Hide properties that raise from `dir()` and torch.jit, and let `__getattr__` raise only AttributeError.

    torch.jit reads every listed attribute, and asks for many that do not exist. `LightningModule.trainer` is one that
    raises, in a module without a trainer.
    """
    import torch

    for each in module.modules():
        kind = type(each)
        properties = {name for name in dir(kind) if isinstance(getattr(kind, name, None), property)}
        broken = frozenset(name for name in properties if _raises(each, name))
        changed: dict[str, Any] = {}
        if broken:
            changed = {name: getattr(kind, name) for name in broken}  # torch.jit ignores those of the class itself only
            for ignored in ("__jit_ignored_attributes__", "__jit_unused_properties__"):
                changed[ignored] = [*getattr(kind, ignored, ()), *broken]
            changed["__dir__"] = functools.partialmethod(_listed, kind, broken)
        if kind.__getattr__ is not torch.nn.Module.__getattr__ and not isinstance(each, torch.jit.ScriptModule):
            changed["__getattr__"] = functools.partialmethod(_asked, kind)
        if changed:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
            each.__class__ = type(kind.__name__, (kind,), names | changed)


def _listed(self: Any, kind: Any, broken: frozenset[str]) -> list[str]:
    return [name for name in kind.__dir__(self) if name not in broken]


def _asked(self: Any, kind: Any, name: str) -> Any:
    """The attribute that the `__getattr__` of `kind` returns; any error becomes an AttributeError."""
    try:
        return kind.__getattr__(self, name)
    except AttributeError:
        raise
    except Exception as error:
        raise AttributeError(f"{kind.__name__} has no attribute {name!r}: {error!r}") from error


def _register_with_transformers(module: nn.Module) -> None:
    """Repeat what transformers 5 does only in `__init__`, so that unpickled models support `output_hidden_states`."""
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
        return False  # as hasattr does
    except Exception:  # a property is the user's code, and may raise anything
        return True
    return False


def load_weights(path: Path) -> dict[str, Any]:
    """Read a state dict, bare or inside a checkpoint."""
    blob = read_checkpoint(path)
    return {unwrap.clean_name(name): tensor for name, tensor in blob.get("state_dict", blob).items()}


def _versioned(state: Mapping[str, Any], root: nn.Module) -> OrderedDict[str, Any]:
    """The state dict with the version of each module, as `root.state_dict()` has it; some modules refuse it without."""
    found: Any = OrderedDict(state)
    found._metadata = {name: {"version": getattr(each, "_version", 1)} for name, each in root.named_modules()}
    return found  # type: ignore[no-any-return]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `torch.save` wrote, without letting the file run code where that is possible."""
    import torch

    try:
        # what PyTorch wrote before 1.6, as some still ask for, cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        print(f"{path.name} has more than tensors, but was written by this run, so it is unpickled: {error}")
        found = torch.load(path, map_location="cpu", weights_only=False)
    return dict(found)


def example(folder: Path, spec: ExportSpec) -> tuple[torch.Tensor, ...]:
    """The inputs to trace `spec` with: real rows, at least two along a dynamic axis, or a tracer makes it static."""
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
    """Write `structure.pt2`, for a module that cannot be pickled: traced here, with a dynamic batch axis if possible.

    The weights in it are replaced by those of `weights.pt` at load, by their names in `root`.

    Raises:
        Untraceable: the tracer raises something.
        OSError: the file cannot be written.
    """
    import torch

    try:
        program, about = _traced(root, select, args, kwargs, steps)
    except Exception as error:  # torch.export raises many types
        raise Untraceable(line(error, 200)) from error
    with writing(folder / "structure.pt2") as file:
        try:
            torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
        except OSError as error:  # the file keeps those of writing: this is of a source file that the tracer reads
            raise Untraceable(line(error, 200)) from error


class Untraceable(Exception):
    """A module cannot be traced; the message says why."""


def _traced(
    root: nn.Module, select: Select, args: Sequence[Any], kwargs: Mapping[str, Any], steps: Processing
) -> tuple[Any, dict[str, Any]]:
    """The exported program, and what it does not say of itself."""
    import torch

    parts = (part for part in (root, *steps.steps.values()) if hasattr(part, "modules"))
    modes = [(each, each.training) for part in parts for each in part.modules()]
    try:
        wrapped = flat(joined(selected(root, select), processing.resolved(steps, root)), args, kwargs)  # in eval mode
        device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
        tensors = tuple(tensor.to(device) for tensor in wrapped.example)
        wrapped.within = (asked := InFloat32(casts_left_out=False),)
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
        "paired": wrapped.paired,
        "asked_for": asked.asked_for,
    }
    return program, about


def _trace(wrapped: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """Trace with a dynamic batch axis, or if that fails without."""
    batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim), 0)
    if batch > 1:
        leading = [(0,) if tensor.ndim and tensor.shape[0] == batch else () for tensor in tensors]
        with contextlib.suppress(Exception):  # torch.export raises many types
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
    module.in_float32 = InFloat32(casts_left_out=True)
    module.in_float32.asked_for = about["asked_for"] | asked_for_by(module)
    in_float32(module, torch.float16, torch.bfloat16).float().cpu()
    module.input_names, module.output_names, module.dropped = tuple(about["inputs"]), tuple(about["outputs"]), ()
    module.widened, module.paired = about["widened"], about["paired"]
    module.example = call_tensors(call_file(path.parent))
    return module
