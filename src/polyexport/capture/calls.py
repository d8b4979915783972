"""The arguments that forward is called with, in files: one for each batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture import unwrap
from polyexport.capture.flatten import as_taken
from polyexport.capture.pickling import Unpicklable, can_be_pickled, dump, restore
from polyexport.capture.pytree import closed, opened, tree_map
from polyexport.errors import BadRequest
from polyexport.spec import ExportSpec

if TYPE_CHECKING:
    import torch


def call_file(folder: Path, index: int = 0) -> Path:
    """The file with the arguments of forward for batch 0 or a further one."""
    return folder / (f"call_{index:03}.pkl" if index else "call.pkl")


def further_calls(folder: Path) -> list[Path]:
    """The files of further batches, in order."""
    return sorted(folder.glob("call_*.pkl"))


def save_call(args: Sequence[Any], kwargs: Mapping[str, Any], folder: Path, index: int = 0) -> None:
    """Write the arguments of forward; a constant that cannot be pickled, such as an open file, is left out."""
    call = (tuple(args), dict(kwargs))
    try:
        dump(call, call_file(folder, index))
    except Unpicklable:
        dump(closed(tree_map(_or_left_behind, opened(call))), call_file(folder, index))


def _or_left_behind(leaf: Any) -> Any:
    return leaf if can_be_pickled(leaf) else unwrap.LeftBehind(type(leaf).__name__)


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


def call_tensors(path: Path) -> tuple[torch.Tensor, ...]:
    """The tensors of a saved call, in the order of a flat module's inputs."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(opened(restore(path)))
    return tuple(as_taken(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


def example_inputs(folder: Path, spec: ExportSpec) -> tuple[torch.Tensor, ...]:
    """The inputs to trace `spec` with: real rows, at least two along a dynamic axis, or a tracer makes it static."""
    import torch

    tensors = []
    with np.load(folder / "example.npz") as arrays:
        for tensor in spec.inputs:
            rows = tuple(slice(size if isinstance(size, int) else None) for size in tensor.shape)
            tensors.append(torch.from_numpy(np.array(arrays[tensor.name][rows], order="C")))
    return tuple(tensors)
