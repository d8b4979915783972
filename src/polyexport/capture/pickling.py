"""Any object in a file of its own, pickled apart from its tensors, so that weights can be left out."""

from __future__ import annotations

import functools
import io
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, BinaryIO

from polyexport.capture import devices, unwrap
from polyexport.capture.code import by_value, importable
from polyexport.errors import line
from polyexport.serialization import writing

if TYPE_CHECKING:
    import torch


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
                kind, known = ("parameter", parameters) if isinstance(item, torch.nn.Parameter) else ("tensor", tensors)
                seen[id(item)] = (kind, len(known))
                known.append(item)  # type: ignore[arg-type]  # the two lists differ only in their element type
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
            if id(child) not in seen and not can_be_pickled(child):
                path, value = path + step, child
                seen.add(id(child))
                break
        else:
            path = path.removeprefix("['root']").removeprefix(".")
            return f"{path} (a {type(value).__name__})" if path else ""


def parameters(value: Any) -> list[torch.nn.Parameter]:
    """The parameters in an object, anywhere that a pickle of it reaches."""
    return _pickled(value)[1]


def can_be_pickled(value: Any) -> bool:
    """Whether `dump` would write it."""
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
    # the user's files may make warnings errors when imported
    with devices.on_the_cpu_by_default(), warnings.catch_warnings():
        return Unpickler(file).load()
