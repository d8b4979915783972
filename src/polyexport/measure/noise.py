"""What rounding alone does to a module's answers: the same module in float32 and in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture.flatten import as_runner
from polyexport.measure.parity import noise_floor
from polyexport.spec import Arrays
from polyexport.tracing.decompositions import plain_attention

if TYPE_CHECKING:
    import torch


def rounding(model: torch.nn.Module, inputs: Arrays, outputs: Arrays) -> tuple[Arrays, str]:
    """The noise floor of each element of `outputs`, which `model` answers to `inputs`; and a note on how it was found.

    A module that has no float64 twin, since it fixes a dtype in forward, is run with weights and inputs that are moved
    by one rounding each. So is one that answers integers: what float64 decides alike may be a tie all the same.
    """
    found, why, note = [], "", ""
    try:
        with _masks_as_queries():
            found.append(_run(model.double(), _as(np.float64, inputs)))
    except Exception as error:  # a fixed dtype in forward is no failure
        why = f"the module does not run in float64 ({type(error).__name__})"
        note = f"{why}: the noise floor is that of weights moved by one rounding"
    finally:
        model.float()  # every float32 has a float64 of its own, so nothing is lost on the way there and back
    if why or any(array.dtype.kind in "biu" for array in outputs.values()):
        try:
            rng = np.random.default_rng(0)
            with _moved_weights(model, rng):
                found.append(_run(model, {name: _moved(array, rng) for name, array in inputs.items()}))
        except Exception as error:  # the module refuses other numbers than its own
            note = f"no noise floor: {why}, nor with other weights ({type(error).__name__})" if why else ""
    return noise_floor(outputs, *found), note


def _run(model: torch.nn.Module, inputs: Arrays) -> Arrays:
    """What the module answers, on copies of the inputs, which forward may change in place."""
    return plain_attention()(as_runner(model))({name: array.copy() for name, array in inputs.items()})


def _as(dtype: Any, inputs: Arrays) -> Arrays:
    return {name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in inputs.items()}


def _moved(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Float32 numbers, each as it is or the next one to either side."""
    if array.dtype != np.float32:
        return array
    ways = rng.integers(-1, 2, array.shape)
    towards = np.where(ways > 0, np.inf, np.where(ways < 0, -np.inf, array)).astype(np.float32)
    moved: np.ndarray = np.nextafter(array, towards)
    return moved


@contextlib.contextmanager
def _moved_weights(model: torch.nn.Module, rng: np.random.Generator) -> Iterator[None]:
    import torch

    kept = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    try:
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.dtype == torch.float32:
                    tensor.copy_(torch.from_numpy(_moved(tensor.numpy(), rng)))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(kept[name])


@contextlib.contextmanager
def _masks_as_queries() -> Iterator[None]:
    """Attention with masks in the dtype of its queries.

    On CPUs PyTorch (2.13) reads a float32 mask beside float64 queries as if it were float64, and answers anything.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class MasksAsQueries(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has not typed it
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if "scaled_dot_product" in str(function):
                query = args[0]
                args = [_of_dtype(value, query.dtype) for value in args]
                given = {name: _of_dtype(value, query.dtype) for name, value in given.items()}
            return function(*args, **given)

    def _of_dtype(value: Any, dtype: torch.dtype) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floats else value

    with MasksAsQueries():  # type: ignore[no-untyped-call]  # as above
        yield
