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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from polyexport.capture import devices, processing, surroundings, unwrap
from polyexport.capture.calls import call_file, further_calls, save_call
from polyexport.capture.dtypes import InFloat32
from polyexport.capture.flatten import as_call, flat
from polyexport.capture.part_names import make_writable
from polyexport.capture.pickling import Unpicklable, can_be_pickled, dump, parameters, restore
from polyexport.capture.processing import NONE, Processing, joined
from polyexport.capture.rebuilt import register_with_transformers, tame_attributes
from polyexport.capture.selection import Select, selected
from polyexport.capture.traced import TRACED, Untraceable, load_traced, save_traced
from polyexport.capture.weights import LACKING, WEIGHTS, load_weights, versioned
from polyexport.errors import BadRequest, line

if TYPE_CHECKING:
    from torch import nn

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
            kept = {home: {n: v for n, v in values.items() if can_be_pickled(v)} for home, values in found.items()}
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
        if trained & set(map(id, parameters(step))):
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


def module_files(folder: Path) -> list[Path]:
    """The files that `load` and `example_inputs` read: all but those of further batches."""
    further = {call.stem for call in further_calls(folder)}
    return [path for path in folder.iterdir() if path.is_file() and path.stem not in further]


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
    if (folder / TRACED).exists():
        return load_traced(folder / TRACED, state)
    blueprint = restore(folder / STRUCTURE)
    if (folder / surroundings.SET).exists():
        surroundings.put_back(restore(folder / surroundings.SET))
    root = blueprint["root"]
    vars(root).update(restore(folder / ATTRIBUTES) if (folder / ATTRIBUTES).exists() else blueprint["attributes"])
    tame_attributes(root)
    for name, parameter in root.named_parameters():
        # a scripted submodule's parameter already has its shape
        if getattr(parameter, "of_any_shape", False) and name in state:
            parameter.data = torch.empty_like(state[name])
    for name, buffer in root.named_buffers():
        if name in state and buffer.shape != state[name].shape:  # it grows while training
            buffer.data = torch.empty_like(state[name], dtype=buffer.dtype)
    missing, _ = root.load_state_dict(versioned(state, root), strict=bool(getattr(root, "strict_loading", True)))
    module = selected(root, blueprint["select"])
    parameters, needed = dict(root.named_parameters()), set(map(id, module.parameters()))
    lost = [name for name in missing if id(parameters.get(name)) in needed]
    if lost:
        raise BadRequest(f"the checkpoint has no weights for {', '.join(lost[:5])} ({len(lost)} parameters in all)")
    register_with_transformers(module)
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
