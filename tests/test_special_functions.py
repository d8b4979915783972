"""Special functions that converters lack are composed of elementary ones, and stay what they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polyexport.capture.flatten import flat
from polyexport.tracing.exported_program import export_program, load_program
from polyexport.tracing.special_functions import compositions

REAL = torch.cat([torch.linspace(-20.3, 20.3, 4001), torch.logspace(-6, 6, 500), torch.tensor([0.0, 1, -1, math.inf])])
POSITIVE = REAL[REAL >= 0]
UNIT = torch.linspace(-1, 1, 2001)
ARGUMENTS = {
    "polygamma": (1, REAL[(REAL > 0) | ((REAL - REAL.round()).abs() > 0.1)]),  # PyTorch rounds its poles
    "mvlgamma": (POSITIVE[POSITIVE > 1] + 0.1, 3),
    "multigammaln": (POSITIVE[POSITIVE > 1] + 0.1, 3),
    "zeta": (torch.linspace(0.5, 6, 800), torch.linspace(20, 0.1, 800)),
    "zeta.self_scalar": (2.5, POSITIVE[:-1]),  # PyTorch has NaN at infinity
    "zeta.other_scalar": (torch.linspace(0.5, 6, 800), 1.5),
    "erfinv": (UNIT,),
    "ndtri": (torch.cat([UNIT.abs(), torch.logspace(-7, -1, 200)]),),
    "spherical_bessel_j0": (REAL[REAL.isfinite()],),
    **dict.fromkeys(("bessel_j0", "bessel_j1", "airy_ai"), (REAL[REAL.abs() < 100],)),  # greater phases are rounded
    **dict.fromkeys(("bessel_y0", "bessel_y1"), (POSITIVE[POSITIVE < 100],)),
}


def arguments(name: str):
    short = name.removeprefix("aten.").removeprefix("special_").removesuffix(".default")
    return ARGUMENTS.get(short, (POSITIVE if "_k" in short else REAL,))


@pytest.mark.parametrize("operator", compositions(), ids=str)
def test_a_composition_is_the_function_to_five_digits(operator):
    given = arguments(str(operator))
    expected, found = operator(*given), compositions()[operator](*given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-6, equal_nan=True)


def test_the_other_derivatives_of_log_gamma_too():
    for order in (0, 2, 4):
        expected = torch.polygamma(order, POSITIVE[:-1])
        found = compositions()[torch.ops.aten.polygamma.default](order, POSITIVE[:-1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Special(nn.Module):
    """Calls them by the names that users write."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = (x + 1).clone()
        changed.lgamma_()
        beta = torch.distributions.Beta(x, x + 1, validate_args=False)
        return changed, torch.special.psi(x), beta.entropy(), x.erfinv(), torch.special.i0(x), torch.mvlgamma(x + 2, 2)


def test_a_program_that_converters_read_has_none_of_them(tmp_path):
    x = torch.linspace(0.1, 0.9, 24).reshape(4, 6)
    model = flat(Special().eval(), (x,), {})
    torch.export.save(export_program(model, (x,), [(0,)]), tmp_path / "model.pt2")
    program = load_program(tmp_path / "model.pt2")
    lacking = {str(operator) for operator in compositions()}
    assert not lacking & {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]), rtol=1e-5, atol=1e-5)
