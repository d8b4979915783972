"""A module that trained on an accelerator is exported on the CPU; here, modules only name an accelerator."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from polyexport.capture import snapshot
from polyexport.capture.calls import save_call
from polyexport.capture.devices import OnTheCpu
from polyexport.capture.pickling import dump, restore
from saving import saved

CUDA = torch.device("cuda", 0)


class Trained(nn.Module):
    """Calls `answer` with itself and its input."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.answer = answer
        self._device = CUDA
        self.config = {"where": [CUDA], "name": "cuda:0"}
        self.register_buffer("shift", torch.ones(4, device="meta"))


PLACES = {
    "an attribute": lambda net, x: torch.arange(4, device=net._device),
    "a device deep in a dict": lambda net, x: torch.arange(4).to(net.config["where"][0]),
    "the name of one": lambda net, x: torch.arange(4, device=net.config["name"]),
    "one that is written down": lambda net, x: torch.arange(4, device="cuda").cuda(),
    "a number": lambda net, x: torch.arange(4).to(0).cuda(0, non_blocking=True),
    "a device that is made": lambda net, x: torch.arange(4).to(torch.device("cuda:1"), torch.float32),
    "one of another maker": lambda net, x: x.new_tensor([0, 1, 2, 3], device="mps").to(device="xpu"),
    "a generator's": lambda net, x: torch.arange(4) + 0 * torch.rand(4, generator=torch.Generator(), device=CUDA),
}


class Net(Trained):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.answer(self, x)) + self.shift


@pytest.mark.parametrize("name", PLACES)
def test_a_module_that_names_an_accelerator_runs_on_the_cpu(name, tmp_path):
    net = Net(PLACES[name]).eval()
    snapshot.save_structure(net, None, tmp_path)
    save_call((torch.ones(3, 4),), {}, tmp_path)
    torch.save(net.layer.state_dict(prefix="layer.") | {"shift": torch.full((4,), 2.0)}, tmp_path / "weights.pt")
    loaded = snapshot.load(tmp_path)
    x = torch.randn(2, 4)
    for module in (loaded, copy.deepcopy(loaded)):
        assert torch.allclose(module(x), net.layer(x + torch.arange(4)) + 2)
        assert torch.allclose(module(x), net.layer(x + torch.arange(4)) + 2)
    assert (net._device, net.config["where"]) == (CUDA, [CUDA])


def test_a_module_that_names_no_device_is_intercepted_once():
    """Every function of PyTorch would be slower for it, and eager PyTorch is timed."""
    within = OnTheCpu()
    for depth in (1, 0, 0):
        with within:
            assert len(torch.overrides._get_current_function_mode_stack()) == depth
            torch.zeros(2).to("cpu", torch.float64)


def test_a_default_device_that_an_import_sets_is_reset(tmp_path):
    dump(SetsTheDefault(), tmp_path / "x.pkl")
    try:
        restore(tmp_path / "x.pkl")
        assert torch.get_default_device().type == "cpu"
        assert not torch.overrides._get_current_function_mode_stack()
    finally:
        torch.set_default_device(None)


class SetsTheDefault:
    def __setstate__(self, state):
        torch.set_default_device("meta")

    def __getstate__(self):
        return {"some": "state"}


def test_a_lightning_module_knows_that_it_is_on_the_cpu(tmp_path):
    """`self.device` is what `.to` left there, in training."""
    from lightning.pytorch import LightningModule

    class Placed(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x + torch.arange(4, device=self.device, dtype=self.dtype))

    net = Placed().eval()
    x = torch.randn(3, 4)
    expected = net(x)
    net._device = CUDA
    assert torch.equal(snapshot.load(saved(net, tmp_path, x))(x), expected)
