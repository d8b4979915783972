"""Processing steps before and after `forward` in an artifact, from raw inputs to results for an application."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyexport.capture.flatten import as_call
from polyexport.capture.pytree import closed, opened
from polyexport.capture.selection import attribute
from polyexport.errors import BadRequest, line

if TYPE_CHECKING:
    import torch
    from torch import nn

Call = tuple[Sequence[Any], Mapping[str, Any]]

Step = Callable[..., Any] | str | None
"""A module, a function of tensors, or the dotted name of such an attribute of the exported module."""


@dataclass(frozen=True, slots=True)
class Processing:
    """The processing steps before and after `forward`.

    Attributes:
        preprocess: Takes the artifact's inputs and returns what forward takes: a tensor, a tuple of positional
            arguments, or a dict of keyword arguments.
        postprocess: Takes what forward returned, and returns the artifact's outputs.

    Raises:
        BadRequest: a step is something else.
    """

    preprocess: Step = None
    postprocess: Step = None

    def __post_init__(self) -> None:
        for name, step in self.steps.items():
            if isinstance(step, type):
                raise BadRequest(f"{name}={step.__name__} is a class; give an instance: {step.__name__}()")
            if not (callable(step) or (isinstance(step, str) and step)):
                raise BadRequest(
                    f"{name}={step!r}; give a module, a function of tensors, or the name of an attribute of the module"
                )

    @property
    def steps(self) -> dict[str, Callable[..., Any] | str]:
        """The steps that are given, by name."""
        both = {"preprocess": self.preprocess, "postprocess": self.postprocess}
        return {name: step for name, step in both.items() if step is not None}

    @property
    def described(self) -> dict[str, str]:
        """Each step in words."""
        return {name: " ".join(_text(step).split()) for name, step in self.steps.items()}


def _text(step: Callable[..., Any] | str) -> str:
    return step if isinstance(step, str) else getattr(step, "__qualname__", repr(step))


NONE = Processing()


def resolved(processing: Processing, root: Any) -> Processing:
    """The steps, with attribute names resolved on `root`.

    Raises:
        BadRequest: there is no such attribute, or it cannot be called.
    """
    return Processing(**{name: _attribute(name, step, root) for name, step in processing.steps.items()})


def _attribute(name: str, step: Callable[..., Any] | str, root: Any) -> Any:
    if not isinstance(step, str):
        return step
    value = attribute(root, step, name)
    if not callable(value):
        raise BadRequest(f"{name}={step!r} leads to a {type(value).__name__}, which cannot be called")
    return value


def by_name(processing: Processing, root: nn.Module) -> Processing:
    """The steps, with submodules of `root` replaced by their names, since training changes them."""
    names = {id(part): name for name, part in root.named_modules()}
    return Processing(**{name: _by_name(step, names) for name, step in processing.steps.items()})


def _by_name(step: Callable[..., Any] | str, names: Mapping[int, str]) -> Callable[..., Any] | str:
    if id(getattr(step, "__self__", None)) in names:  # a method of a submodule
        owner, method = names[id(step.__self__)], step.__name__  # type: ignore[union-attr]  # a method has both
        return f"{owner}.{method}" if owner else method
    return names.get(id(step)) or step


def part(outside: Sequence[str]) -> str:
    """The folder for the module without these steps and for its batches, relative to the export's folder."""
    return f"source/without-{'-and-'.join(outside)}"


def joined(core: Any, processing: Processing) -> Any:
    """The module with the steps before and after it; without steps it is `core` itself."""
    import torch

    if not processing.steps:
        return core

    class Joined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.preprocess: Any = processing.preprocess
            self.core = core
            self.postprocess: Any = processing.postprocess

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.preprocess is not None:
                args, kwargs = as_call(self.preprocess(*args, **kwargs))
            answer = self.core(*args, **kwargs)
            return answer if self.postprocess is None else self.postprocess(answer)

    own = next(iter(inspect.signature(Joined.forward).parameters.values()))
    first = entry(core, processing)
    if (signature := _signature(getattr(first, "forward", first))) is not None:
        Joined.forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]  # any function has one
    return Joined()


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions may have no signature
        return None


def entry(core: Any, processing: Processing) -> Any:
    """The first callable of the artifact: `preprocess`, or the module itself."""
    return core if processing.preprocess is None else processing.preprocess


def preprocessed(processing: Processing, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of `preprocess` on copies of raw inputs on the CPU, in eval mode; the step is not changed.

    Raises:
        BadRequest: it fails on them.
    """
    import copy

    import torch
    from torch.utils import _pytree as pytree

    step: Any = copy.deepcopy(processing.preprocess)
    if isinstance(step, torch.nn.Module):
        step = step.cpu().eval()
    call = opened((tuple(args), dict(kwargs)))
    call = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), call)
    positional, named = closed(call)
    try:
        with torch.no_grad():
            return step(*positional, **named)
    except Exception as error:  # the user's own code
        tensors = _tensors((args, kwargs))
        given = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)
        raise BadRequest(f"preprocess fails on the raw inputs ({given or 'no tensor'}): {line(error, 200)}") from None


def unlike(made: Call, received: Call) -> str:
    """How the tensors of two calls of forward differ by more than rounding; empty if they do not."""
    ours, theirs = _tensors(made), _tensors(received)
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return f"shapes {', '.join(map(str, shapes[0]))} in place of {', '.join(map(str, shapes[1]))}"
    for own, other in zip(ours, theirs, strict=True):
        expected = other.detach().cpu().double()
        off = float((own.detach().cpu().double() - expected).norm() / expected.norm().clamp_min(1e-12))
        if not off <= (_NARROW if other.element_size() < 4 else _ROUNDING):
            return f"off by {off:.2g} of its norm"
    return ""


_ROUNDING, _NARROW = 1e-3, 2e-2
"""Largest relative difference in norm due to rounding: in float32, and in dtypes of two bytes."""


def _tensors(call: Call) -> list[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(opened(call)) if isinstance(leaf, torch.Tensor)]
