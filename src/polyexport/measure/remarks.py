"""Notes of the report on how forward behaves, and on what artifacts have in the place of that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polyexport.measure import dynamic_axes
from polyexport.measure.dynamic_axes import Axes, Dynamic
from polyexport.measure.parity import compare
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays, Runner
from polyexport.tracing.draws import Draws, lines
from polyexport.tracing.reads import named


def unchecked(sites: Sequence[str]) -> Iterator[str]:
    """A note if forward raises for some data, at these lines."""
    if sites:
        yield f"forward checks its data and raises if it is wrong ({named(set(sites))}); artifacts do not check it"


def of_the_model(model: Any, own: Runner, inputs: Arrays, outputs: Arrays) -> list[str]:
    """Notes on the model; `own` may use PyTorch's fused paths, `outputs` were computed without them."""
    import torch

    notes: list[str] = []
    if any(isinstance(each, torch.nn.TransformerEncoder) for each in model.modules()):
        notes += _fused_apart(own(inputs), outputs)
    return [
        *notes,
        *(f"output {name} is left out: it is not a tensor, dict, tuple or dataclass" for name in model.dropped),
    ]


def in_float32(model: Any) -> Iterator[str]:
    """A note if forward asks for another precision than float32."""
    asked: Mapping[str, str] = model.in_float32.asked_for
    if asked:
        yield (
            f"forward asks for {', '.join(sorted(set(asked.values())))} ({named(set(asked))}); the reference and the "
            "artifacts compute in float32 there, and lower precisions are formats, such as onnx-fp16"
        )


def paired(model: Any) -> Iterator[str]:
    """A note on complex inputs and outputs."""
    if model.paired:
        yield (
            f"{', '.join(model.paired)}: complex in PyTorch, and in artifacts real and imaginary parts in a last axis "
            "of 2, since most formats lack complex numbers"
        )


def drawn(found: Draws, by_python: bool, *, decidable: bool) -> Iterator[str]:
    """Notes on random numbers: on those that are constants of artifacts, and on others that changed little or nothing.

    `by_python` says whether there are numbers of Python's generator or numpy's.
    """
    if found.known:
        sites = lines(found.seeded | found.sized)
        yield f"forward draws random numbers from a seed ({sites}); artifacts have those numbers as constants"
    if decidable and (found.unseeded or by_python):
        where = f" ({lines(found.unseeded)})" if found.unseeded else ", by Python's random or by numpy"
        kept = "keep the values of the trace" if by_python else "draw their own, or have none"
        yield (
            f"forward draws random numbers without a seed{where}; they changed none of the outputs by more than the "
            f"tolerance, and artifacts {kept}: where they matter more seldom, artifacts differ from PyTorch"
        )


def fixed_though_varying(inputs: Arrays, others: Mapping[int, Arrays], axes: Axes, dynamic: Dynamic) -> list[str]:
    """A note on axes that differ between batches but are static, and the argument that makes them dynamic."""
    left = dynamic_axes.varying(inputs, tuple(others.values()), axes)
    if dynamic is True or not left:
        return []
    seen = [
        f"axis {axis} of {name} ({', '.join(str(batch[name].shape[axis]) for batch in (inputs, *others.values()))})"
        for name, named in left.items()
        for axis in named
    ]
    wanted = {name: {**axes.get(name, {}), **left.get(name, {})} for name in {**axes, **left}}
    return [
        f"axes that differ between batches, but are static as asked: {'; '.join(seen)}; dynamic={wanted} makes them "
        "dynamic"
    ]


_TARGETS = re.compile(r"(.*_)?(labels?|targets?|ground_truth|gt|y_true|loss_mask)")
_LOSSES = re.compile(r"(.*_)?(loss|losses)(_\w+)?")


def as_in_training(inputs: Sequence[str], outputs: Sequence[str]) -> Iterator[str]:
    """A note if forward takes targets or returns a loss, which an application has no use for."""
    takes, returns = filter(_TARGETS.fullmatch, inputs), filter(_LOSSES.fullmatch, outputs)
    told = [f"{word} {', '.join(names)}" for word, names in (("takes", [*takes]), ("returns", [*returns])) if names]
    if told:
        yield (
            f"forward {' and '.join(told)}, as in training, and so does every artifact; "
            "inputs=<a function of the batch> without targets exports one for inference, if forward allows that"
        )


def _fused_apart(fused: Arrays, outputs: Arrays) -> list[str]:
    """A note if PyTorch's fused path for transformers returns other outputs, as it does at masked positions."""
    apart = compare(fused, outputs, Tolerance.for_precision("float32"))
    if apart.passed:
        return []
    return [
        "PyTorch's fused path for nn.TransformerEncoder returns other values (zeros) at masked positions; "
        f"the reference is the plain path, which was trained: {apart.reason}"
    ]
