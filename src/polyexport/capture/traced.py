"""A module that cannot be pickled, as a program of `torch.export` that is traced in the training process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.capture import processing, unwrap
from polyexport.capture.calls import call_file, call_tensors
from polyexport.capture.dtypes import InFloat32, asked_for_by
from polyexport.capture.flatten import flat
from polyexport.capture.processing import NONE, Processing, joined
from polyexport.capture.selection import Select, selected
from polyexport.errors import line
from polyexport.serialization import writing
from polyexport.tracing.attention import plain_attention
from polyexport.tracing.exported_program import export_program, in_float32

if TYPE_CHECKING:
    import torch
    from torch import nn

TRACED = "structure.pt2"
"""The module as a traced program, in place of `structure.pkl`."""


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
    with writing(folder / TRACED) as file:
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


def load_traced(path: Path, state: Mapping[str, Any]) -> Any:
    """The module of a traced program as a flat one, on the CPU in float32, with the weights of a state dict."""
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
