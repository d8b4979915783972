"""Complex inputs and outputs are pairs of real numbers in every artifact, since most formats lack complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_export.metrics import _through
from polyexport.capture.answer import _apart
from polyexport.capture.calls import call_tensors, save_call
from polyexport.capture.flatten import as_runner, flat
from polyexport.tracing.exported_program import export_program

Z = torch.randn(5, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


class Filter(nn.Module):
    """Filters a spectrum: complex numbers in, complex and real ones out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        filtered = z * self.gain
        return {"spectrum": filtered.conj(), "power": filtered.abs()}


@pytest.fixture
def model():
    wrapped = flat(Filter().eval(), (Z,), {})
    wrapped(*wrapped.example)
    return wrapped


def pairs(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z.resolve_conj())


def test_complex_tensors_are_pairs_at_the_edges_of_a_flat_module(model):
    assert model.paired == ("z", "spectrum")
    assert torch.equal(model.example[0], pairs(Z))
    expected = Filter()(Z)
    spectrum, power = model(pairs(Z))
    torch.testing.assert_close(spectrum, pairs(expected["spectrum"]))
    torch.testing.assert_close(power, expected["power"])


def test_traces_take_pairs_of_any_number_of_rows(model):
    with pytest.warns(DeprecationWarning, match="jit"):
        traced = torch.jit.trace(model, model.example, check_trace=False)
    for artifact in (traced, export_program(model, model.example, [(0,)]).module()):
        torch.testing.assert_close(artifact(pairs(Z[:3] * 2)), model(pairs(Z[:3] * 2)))


def test_saved_calls_have_pairs_too(tmp_path):
    save_call((Z,), {}, tmp_path)
    assert torch.equal(call_tensors(next(tmp_path.iterdir()))[0], pairs(Z))


@pytest.mark.parametrize("times", [1.0, 1.1])
def test_outputs_recorded_in_training_are_compared_as_complex_numbers(times):
    why = _apart("z", times * pairs(Z).numpy(), Z, exact=True)
    assert bool(why) == (times != 1.0)


def test_validation_gets_complex_numbers_from_an_artifact(model):
    def doubled(inputs):
        return {name: 2 * array for name, array in as_runner(model)(inputs).items()}

    part = Filter()
    with torch.no_grad():
        torch.testing.assert_close(_through(part, doubled)(Z)["spectrum"], 2 * part(Z)["spectrum"])
