"""The effect of rounding alone on a module's outputs: the same module in float32 and in float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture.flatten import as_runner
from polyexport.errors import line
from polyexport.measure.parity import TIES, noise_floor
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays, Precision
from polyexport.tracing.attention import plain_attention

if TYPE_CHECKING:
    import torch


def rounding(model: torch.nn.Module, inputs: Arrays, outputs: Arrays, *, not_double: str = "") -> tuple[Arrays, str]:
    """The noise floor of each element of `outputs`, which `model` returns for `inputs`, and a note on how it was found.

    A module that does not run in float64, since forward fixes a dtype, is run again with weights and inputs that are
    each changed by one rounding, and so is one that would not compute the same there: `not_double` says why. So is one
    with integer outputs, which may depend on ties that float64 does not show.
    """
    found, why, note = [], not_double, ""
    try:
        if not not_double:
            with _masks_as_queries():
                found.append(_run(model.double(), _as(np.float64, inputs)))
    except Exception as error:  # a fixed dtype in forward is not an error
        why = f"the module does not run in float64 ({line(error, 100)})"
    finally:
        model.float()  # float32 converts to float64 and back without loss
    if why:
        note = f"{why}, so the noise floor is the effect of changing each weight by one rounding"
    if why or any(array.dtype.kind in "biu" for array in outputs.values()):
        try:
            rng = np.random.default_rng(0)
            move = functools.partial(_moved, rng)
            with _moved_weights(model, move):
                found.append(_run(model, {name: move(array) for name, array in inputs.items()}))
        except Exception as error:  # the module refuses other weights
            note = f"no noise floor: {why}, nor with changed weights ({line(error, 100)})" if why else ""
    return noise_floor(outputs, *found) | _ties(model, inputs, outputs), note


def _ties(model: torch.nn.Module, inputs: Arrays, outputs: Arrays) -> Arrays:
    """For each integer in `outputs`, the least rounding of weights and inputs to a low precision that changes it.

    Each precision is tried `_DRAWS` times; a module that refuses changed weights has no ties.
    """
    integers = {name: array for name, array in outputs.items() if array.dtype.kind in "biu"}
    ties = {name: np.full(array.shape, np.inf) for name, array in integers.items()}
    rng = np.random.default_rng(0)
    low: tuple[Precision, ...] = ("float16", "bfloat16", "int8", "w4")
    for precision in low if integers else ():
        move = functools.partial(_rounded, rng, precision)
        for _ in range(_DRAWS):
            with contextlib.suppress(Exception), _moved_weights(model, move):
                answer = _run(model, {name: move(array) for name, array in inputs.items()})
                for name, array in integers.items():
                    moved = answer[name] != array
                    ties[name][moved] = np.minimum(ties[name][moved], Tolerance.for_precision(precision).roundoff)
    return {name + TIES: found for name, found in ties.items()}


_DRAWS = 2


def _rounded(rng: np.random.Generator, precision: Precision, array: np.ndarray) -> np.ndarray:
    """Float32 values after random rounding to a precision; steps of int8 are relative to the largest value."""
    if array.dtype != np.float32:
        return array
    most = np.abs(array).max(initial=0.0) if precision in ("int8", "w4") else np.abs(array)
    by = Tolerance.for_precision(precision).roundoff * rng.uniform(-1, 1, array.shape)
    return np.asarray(array + by * most, np.float32)


def _run(model: torch.nn.Module, inputs: Arrays) -> Arrays:
    """The module's outputs, on copies of the inputs, which forward may change in place."""
    return plain_attention()(as_runner(model))({name: array.copy() for name, array in inputs.items()})


def _as(dtype: Any, inputs: Arrays) -> Arrays:
    return {name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in inputs.items()}


def _moved(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Float32 values, each unchanged or replaced by a neighboring float32."""
    if array.dtype != np.float32:
        return array
    ways = rng.integers(-1, 2, array.shape)
    towards = np.where(ways > 0, np.inf, np.where(ways < 0, -np.inf, array)).astype(np.float32)
    moved: np.ndarray = np.nextafter(array, towards)
    return moved


@contextlib.contextmanager
def _moved_weights(model: torch.nn.Module, move: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    import torch

    kept = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    try:
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.dtype == torch.float32:
                    tensor.copy_(torch.from_numpy(move(tensor.numpy())))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(kept[name])


@contextlib.contextmanager
def _masks_as_queries() -> Iterator[None]:
    """Cast attention masks to the dtype of the queries.

    On CPUs PyTorch (2.13) reads a float32 mask with float64 queries as if it were float64, and returns garbage.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class MasksAsQueries(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
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
