"""What forward reads without effect is left out of a trace, and nothing else is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from polyexport.capture.flatten import flat
from polyexport.tracing.exportable import exportable
from polyexport.tracing.exported_program import export_program
from polyexport.tracing.idle_reads import idle
from polyexport.tracing.reads import reads

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))


class Looks(nn.Module):
    """Does something with its input and its answer on the way."""

    def __init__(self, look) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.look, self.head, self.log = look, nn.Linear(5, 3), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x)
        found = self.look(self, x, y)
        return y if found is None else found


def refuses(x: torch.Tensor) -> None:
    if x.min() < -1e6 or x.max() > 1e6:
        raise ValueError(f"at most {x.max().item():.3f}")


def asserts(x: torch.Tensor) -> None:
    assert torch.isfinite(x).all(), f"no {x.sum()}"


def raises_by_the_way(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    if x.max() > 100:
        y = y[:, 3:].reshape(7)  # which no ordinary batch has the shape for
    return y


def raises_later(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.max() > 100 and y.max() < 100:
        raise ValueError("loud, and yet not heard")


IDLE = {
    "a number that is printed": lambda self, x, y: print(f"{y.mean().item():.3f}"),
    "a tensor that is printed": lambda self, x, y: print(f"{y.mean():.3f}", y),
    "a number that is kept": lambda self, x, y: self.log.append(float(y.norm())),
    "an integer that is kept": lambda self, x, y: self.log.append(int(y.argmax())),
    "an array that is kept": lambda self, x, y: self.log.append(y.detach().numpy()),
}
CHECKS = {
    "an assertion": lambda self, x, y: asserts(x),
    "an exception": lambda self, x, y: refuses(x),
    "two on a line": lambda self, x, y: asserts(x) or asserts(y),
    "one of PyTorch's on a truth value": lambda self, x, y: torch._assert(bool((x < 1e6).all()), "too large"),
    "another of PyTorch's": lambda self, x, y: torch._check(bool((x < 1e6).all()), lambda: "too large"),
    "one of PyTorch's": lambda self, x, y: torch._assert((x < 1e6).all(), "too large"),
}
NOT_IDLE = {
    "a number that scales": lambda self, x, y: y * x.abs().max().item(),
    "a threshold that nothing reaches": lambda self, x, y: y / 2 if x.abs().max().item() > 1e20 else y,
    "a threshold for an integer": lambda self, x, y: y / 2 if int(x.abs().max()) > 1000 else y,
    "a repair that changes nothing here": lambda self, x, y: torch.nan_to_num(y) if (y != y).any() else y,
    "a repair by a number": lambda self, x, y: y.nan_to_num() if math.isnan(y.sum().item()) else y,
    "an array that comes back": lambda self, x, y: y + torch.from_numpy(np.abs(x.numpy()))[:, :3],
    "a size": lambda self, x, y: y[:, : int(x.abs().max() < 100) + 1],
    "a side that fails here": lambda self, x, y: raises_by_the_way(x, y),
    "a side that raises by what else it reads": lambda self, x, y: raises_later(x, y),
}


def found_idle(look):
    model = flat(Looks(look).eval(), (X,), {})
    inputs = {"x": X.numpy()}
    return model, idle(model, inputs, set(reads(model, inputs).values))


@pytest.mark.parametrize("name", [*IDLE, *CHECKS])
def test_what_is_read_without_effect_keeps_no_module_from_being_exported(name):
    model, found = found_idle({**IDLE, **CHECKS}[name])
    assert len(found.values) == 1
    assert bool(found.checks) == (name in CHECKS)
    model.idle = found.values
    with exportable(model):
        program = export_program(model, (X,), [(0,)])
    expected, answer = model(X[:4]), program.module()(X[:4])
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("name", NOT_IDLE)
def test_what_has_an_effect_on_any_data_is_not_idle(name):
    _, found = found_idle(NOT_IDLE[name])
    assert found.values == {}
