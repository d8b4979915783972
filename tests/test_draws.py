"""Random numbers from a seed are constants of an artifact; those without one are found, and stay random."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyexport.capture.flatten import flat
from polyexport.errors import BadRequest
from polyexport.tracing.draws import advice, draws
from polyexport.tracing.exportable import exportable
from polyexport.tracing.exported_program import export_program

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
SHARES = torch.linspace(0.1, 0.9, 5)


class Draws(nn.Module):
    """Combines its input with random numbers."""

    def __init__(self, draw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.draw, self.head = draw, nn.Linear(5, 5)
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(self, self.head(x))


def seeded(draw):
    """A draw behind a seed, which leaves the default generator as it was."""

    def behind(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return draw(self, x)

    return behind


SEEDED = {
    "by the default generator": seeded(lambda self, x: x + torch.randn(5)),
    "by a generator of its own": lambda self, x: x + torch.rand(5, generator=torch.Generator().manual_seed(1)),
    "by one that the module has": lambda self, x: x + torch.rand(5, generator=self.generator.manual_seed(1)),
    "as a permutation": seeded(lambda self, x: x[:, torch.randperm(5)]),
    "as integers": seeded(lambda self, x: x + torch.randint(0, 9, (5,))),
    "into a tensor": seeded(lambda self, x: x * x.new_empty(5).normal_() + torch.empty(5).exponential_()),
    "around means": seeded(lambda self, x: x + torch.normal(SHARES, self.head.bias.abs())),
    "by their shares": seeded(lambda self, x: x * torch.bernoulli(SHARES) + torch.zeros(5).bernoulli_(SHARES)),
    "from a distribution": seeded(lambda self, x: x + torch.distributions.Uniform(-SHARES, SHARES).rsample()),
    "without replacement": seeded(lambda self, x: x[:, torch.multinomial(SHARES, 3)]),
    "with replacement": seeded(lambda self, x: x[:, torch.multinomial(SHARES, 9, replacement=True)]),
    "of weights": seeded(lambda self, x: x @ F.dropout(self.head.weight, 0.5, training=True)),
    "of weights that keep their variance": seeded(lambda self, x: x @ F.alpha_dropout(self.head.weight, 0.5, True)),
    "of categories": seeded(lambda self, x: x @ F.gumbel_softmax(self.head.weight, hard=True)),
    "of a new layer": seeded(lambda self, x: nn.Linear(5, 2)(x)),
}
SIZED = {
    "like the input": seeded(lambda self, x: x + torch.randn_like(x)),
    "for each row": seeded(lambda self, x: x + torch.rand(x.shape[0], 1)),
    "of the input": seeded(lambda self, x: F.dropout(x, 0.5, training=True)),
    "of its channels": seeded(lambda self, x: F.dropout1d(x.unsqueeze(-1), 0.5, training=True)),
    "of what the input says": seeded(lambda self, x: x.gather(1, torch.multinomial(x.softmax(-1), 2))),
    "after others": seeded(lambda self, x: x + torch.rand(x.shape[0]).sum() * 0 + torch.rand(5)),
}
UNSEEDED = {
    "from the default generator": lambda self, x: x + torch.randn(5),
    "from one that is never seeded again": lambda self, x: x + torch.rand(5, generator=self.generator),
    "by dropout in eval mode": lambda self, x: F.dropout(x),
    "before a seed": lambda self, x: x + torch.rand(5) + torch.rand(5, generator=torch.manual_seed(3)),
}


def drawing(draw):
    model = flat(Draws(draw).eval(), (X,), {})
    model.draws = draws(model, [{"x": X.numpy()}, {"x": X[:3].numpy()}, {"x": -X.numpy()}])
    return model


def traced(model, x, axes):
    """The module's trace by `torch.jit` and the one by `torch.export`."""
    with exportable(model, dynamic=bool(axes)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the layer's sizes, which are constants
        yield torch.jit.trace(model, (x,), check_trace=False)
        yield export_program(model, (x,), [axes]).module()


@pytest.mark.parametrize("name", SEEDED)
def test_numbers_that_are_drawn_from_a_seed_are_constants(name):
    model = drawing(SEEDED[name])
    assert model.draws.seeded
    assert not model.draws.sized | model.draws.unseeded
    for artifact in traced(model, X, (0,)):
        for rows in (X, X[:4] - 1):
            torch.manual_seed(1)  # of which nothing depends
            torch.testing.assert_close(artifact(rows), model(rows))


@pytest.mark.parametrize("name", SIZED)
def test_numbers_that_differ_between_sizes_are_constants_of_one_size(name):
    model = drawing(SIZED[name])
    assert model.draws.sized
    with pytest.raises(BadRequest, match=r"from a seed \(test_draws.py:\d+\), other ones for other sizes"):
        next(traced(model, X, (0,)))
    for artifact in traced(model, X, ()):
        torch.testing.assert_close(artifact(X + 0.1), model(X + 0.1))


@pytest.mark.parametrize("name", UNSEEDED)
def test_numbers_without_a_seed_are_found(name):
    found = drawing(UNSEEDED[name]).draws.unseeded
    assert len(found) == 1
    assert ("training=self.training" in advice(found)) == ("dropout" in name)


def test_a_function_of_data_that_draws_is_refused_by_name():
    model = drawing(seeded(lambda self, x: x + torch.poisson(SHARES)))
    with pytest.raises(BadRequest, match=r"random numbers from a seed by poisson \(test_draws.py"):
        next(traced(model, X, (0,)))


def test_a_forward_without_random_numbers_draws_none():
    assert drawing(lambda self, x: x).draws.all == frozenset()
