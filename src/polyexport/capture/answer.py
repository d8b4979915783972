"""The module's outputs in training, to be compared with those of the module that a worker rebuilds.

A worker has the checkpoint and what could be pickled. That may lack an attribute that training changed later, a global
of an imported module that the script set, or a function that was replaced.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture.changes import beside_weights
from polyexport.capture.flatten import as_runner, as_taken, flat, in_pairs, named_tensors, to_arrays
from polyexport.capture.pickling import Unpicklable, dump, restore
from polyexport.capture.pytree import closed, opened
from polyexport.capture.weights import WEIGHTS, load_weights
from polyexport.errors import line
from polyexport.spec import Arrays

if TYPE_CHECKING:
    import torch
    from torch import nn

Call = tuple[Sequence[Any], Mapping[str, Any]]

ANSWER = "answer.pkl"
"""File of the `Answer` in a module's folder."""

_PROBED = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """One call of forward in the training process, with all tensors on the CPU.

    Attributes:
        call: The arguments, as forward left them.
        outputs: The tensors that it returned, in order.
        weights: One number of each of some parameters, by name, which tells whether a checkpoint has the same ones; of
            buffers where there are no parameters, and none where there are neither.
        exact: Whether it was computed in float32 on a CPU, so that the same computation differs by rounding alone.
        observed: Whether observers of fake quantization changed its scales in that call, as they do even in eval mode.
        beside: What `beside_weights` said of the module in that call, where it was asked.
        changed: Whether it says something else by the time of the checkpoint.
        training: Whether the module, or a part of it, was in training mode.
        hooked: Whether hooks on all modules were registered (`register_module_forward_hook`), which no worker has.
        buffers: One number of each of some buffers, by name, after the call.
    """

    call: Call
    outputs: tuple[torch.Tensor, ...]
    weights: Mapping[str, float]
    exact: bool
    observed: bool = False
    beside: int | None = None
    changed: bool = False
    training: bool = False
    hooked: bool = False
    buffers: Mapping[str, float] = field(default_factory=dict)


def answer(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], returned: Any) -> Answer:
    """Copy a call and what it returned; `root` is the module whose checkpoint will be exported.

    Raises:
        Exception: something in the call cannot be copied, or forward returned no tensor.
    """
    import torch
    from torch.utils import _pytree as pytree

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True)

    outputs = tuple(named_tensors(returned, taken={})[0].values())
    kinds = {(tensor.device.type, tensor.dtype) for tensor in outputs if tensor.is_floating_point()}
    kinds |= {(parameter.device.type, parameter.dtype) for parameter in root.parameters()}
    call = closed(pytree.tree_map_only(torch.Tensor, copied, opened((tuple(args), dict(kwargs)))))
    return Answer(
        call=call,
        outputs=tuple(map(copied, outputs)),
        weights=_probe(_weights(root)),
        exact=kinds <= {("cpu", torch.float32), ("cpu", torch.float64)} and not torch.is_autocast_enabled("cpu"),
        observed=any(map(_observes, root.modules())),
        training=any(each.training for each in root.modules()),
        hooked=_has_global_hooks(),
        buffers=_probe(root.named_buffers()),
    )


def _weights(root: nn.Module) -> list[tuple[str, torch.Tensor]]:
    import torch

    found = list(root.named_parameters()) or root.state_dict().items()
    return [(name, tensor) for name, tensor in found if isinstance(tensor, torch.Tensor)]


def _observes(module: Any) -> bool:
    return hasattr(module, "fake_quant_enabled") and bool(module.observer_enabled.any())


def _has_global_hooks() -> bool:
    """Whether there are hooks on all modules, besides those that record the answer."""
    from torch.nn.modules import module

    hooks = (*module._global_forward_pre_hooks.values(), *module._global_forward_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("lightning_export.") for hook in hooks)


def _probe(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """The middle element of some tensors, preferably trainable ones."""
    import torch

    from polyexport.capture.unwrap import clean_name

    named = sorted(parameters, key=lambda item: not item[1].requires_grad)
    chosen = {name: tensor for name, tensor in named[:: max(1, len(named) // _PROBED)] if tensor.numel()}
    if not chosen:
        return {}
    device = next(iter(chosen.values())).device
    numbers = torch.stack([_middle(tensor).float().to(device) for tensor in chosen.values()]).tolist()
    return dict(zip(map(clean_name, chosen), numbers, strict=True))


def _middle(tensor: torch.Tensor) -> torch.Tensor:
    """The middle element; for a complex one its real part."""
    middle = tensor.detach().reshape(-1)[tensor.numel() // 2]
    return middle.real if middle.is_complex() else middle


def ask(module: nn.Module, call: Call, folder: Path) -> None:
    """Call `module` on its device in eval mode, restore its state, and write the outputs to `folder`.

    If that fails nothing is written, and nothing will be compared. A first call may set weights, as a normalization by
    the first batch does: they are restored from `folder`, if it has them.
    """
    import torch
    from torch.utils import _pytree as pytree

    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    moved = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to(device, copy=True), opened(call))
    with contextlib.suppress(Exception), torch.no_grad(), torch.random.fork_rng(), left_as_it_is(module):
        args, kwargs = closed(moved)
        before, returned = beside_weights(module), module.eval()(*args, **kwargs)
        if beside_weights(module) != before:
            _restore_weights(module, folder / WEIGHTS)
        dump(answer(module, *call, returned), folder / ANSWER)


def _restore_weights(module: nn.Module, path: Path) -> None:
    """Set weights that differ from those of a file to its values."""
    import torch

    saved = load_weights(path) if path.exists() else {}
    for name, tensor in module.named_parameters():
        if name in saved and not torch.equal(saved[name], tensor.cpu()):
            tensor.copy_(saved[name])


def write(found: Answer | None, folder: Path) -> None:
    """Write an answer into a module's folder, if it can be pickled; else there is nothing to compare with.

    Raises:
        OSError: the file cannot be written.
    """
    if found is not None:
        with contextlib.suppress(Unpicklable):
            dump(found, folder / ANSWER)


@contextlib.contextmanager
def left_as_it_is(root: nn.Module) -> Iterator[None]:
    """Restore attributes, what is in lists, sets and dicts among them (such as hooks), and buffers at the end."""
    import torch

    attributes = [(each, dict(vars(each))) for each in root.modules()]
    containers = [each for _, held in attributes for each in held.values() if type(each) in _CONTAINERS]
    contents: list[tuple[Any, Any]] = [(each, copy.copy(each)) for each in containers]
    values = [(buffer, buffer.detach().clone()) for buffer in root.buffers()]
    try:
        yield
    finally:
        for each, before in attributes:
            vars(each).clear()
            vars(each).update(before)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for buffer, value in values:
            with torch.inference_mode(buffer.is_inference()):
                buffer.copy_(value)


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


class NotCompared(Exception):
    """There is a recorded answer, but it cannot be compared; the message says why."""


def disagreement(folder: Path, model: Any) -> str:
    """How the outputs of the flat `model` of `folder` differ from those recorded in training; empty if they agree.

    It is empty too if no answer was recorded.

    Raises:
        NotCompared: the checkpoint has other weights than the module had then, or the call cannot be repeated.
    """
    if not (folder / ANSWER).exists():
        return ""
    there = recorded(folder)
    if not _same_weights(there.weights, load_weights(folder / WEIGHTS)):
        raise NotCompared(
            "the checkpoint has other weights than the module had when its outputs were recorded, such as an average "
            "or those of another step"
        )
    if there.observed:
        raise NotCompared(
            "the observers of fake quantization moved its scales in that call; after "
            "module.apply(torch.ao.quantization.disable_observer) they can be compared"
        )
    try:
        found = _asked_again(model, there.call)
    # forward may refuse: a trace has one batch size, and forward in training mode may take other inputs
    except Exception as error:
        raise NotCompared(f"that call cannot be repeated here ({line(error, 200)})") from error
    if found is None:
        raise NotCompared("forward changes its own inputs")
    if len(found) != len(there.outputs):
        return f"{len(found)} outputs in place of {len(there.outputs)}"
    pairs = zip(found.items(), there.outputs, strict=True)
    exact = there.exact and not model.in_float32.asked_for
    return next(filter(None, (_apart(name, array, tensor, exact) for (name, array), tensor in pairs)), "")


def other_buffers(folder: Path) -> list[str]:
    """The buffers that have other values in the checkpoint of `folder` than they had in the recorded call."""
    there, state = recorded(folder).buffers, load_weights(folder / WEIGHTS)
    return [name for name, value in there.items() if name in state and not _same_weights({name: value}, state)]


def recorded(folder: Path) -> Answer:
    """The answer of a folder that has one."""
    found: Answer = restore(folder / ANSWER)
    return found


def _asked_again(model: Any, call: Call) -> Arrays | None:
    """The outputs of a flat `model`'s module for a call; None if it changes its own inputs."""
    import torch
    from torch.utils import _pytree as pytree

    asked: Any = model
    if isinstance(model, torch.fx.GraphModule):  # a trace, which exists only in flat form
        leaves = pytree.tree_leaves(opened(call))
        tensors = tuple(as_taken(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
    else:
        asked = flat(getattr(model, "core", model.inner), *call)
        tensors = asked.example
        if hasattr(model, "within"):
            asked.within = model.within
    inputs = to_arrays(asked.input_names, tensors)
    before = {name: array.tobytes() for name, array in inputs.items()}
    answer = as_runner(asked)(inputs)
    return answer if all(before[name] == array.tobytes() for name, array in inputs.items()) else None


def _apart(name: str, array: np.ndarray, there: torch.Tensor, exact: bool) -> str:
    """How an output differs from the recorded one by more than rounding; empty if it does not."""
    there = in_pairs(there)
    expected = there.float().numpy() if there.is_floating_point() else there.numpy()
    if array.shape != expected.shape:
        return f"{name} has shape {list(array.shape)} in place of {list(expected.shape)}"
    off = _distance(array, expected)
    rounding = off <= (1e-4 if exact else 0.1) or not (exact or there.is_floating_point())
    return "" if rounding else f"{name} is off by {off:.2g} of its norm"


def _distance(array: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference relative to the norm of `expected`, over finite elements."""
    kind = np.complex128 if np.iscomplexobj(expected) else np.float64
    found, right = array.astype(kind), expected.astype(kind)
    finite = np.isfinite(found) & np.isfinite(right)
    norm = float(np.linalg.norm(right[finite]))
    return float(np.linalg.norm(found[finite] - right[finite])) / max(norm, 1e-12)


def _same_weights(probed: Mapping[str, float], state: Mapping[str, torch.Tensor]) -> bool:
    there = {name: float(_middle(state[name])) for name in probed if name in state}
    if probed and not there:
        return False
    return all(np.isclose(value, probed[name], rtol=1e-6, atol=0) for name, value in there.items())
