"""What a checkpoint leaves out, which parts of a module are called, and copies of the callback."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn

from lightning_export import ExportCallback
from lightning_export.capture import Called
from polyexport.engine.weights import save_lacking


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def validation_step(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(x))


def folders(tmp_path):
    for name in ("captured", "one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "captured", tmp_path / "one", tmp_path / "two"


def write(path, net, without):
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith(without)}
    torch.save({"state_dict": state, "optimizer_states": [{"lr": 0.1}]}, path)
    return str(path)


def test_frozen_weights_that_a_checkpoint_lacks_are_copied_once(tmp_path):
    net, (captured, one, two) = Backbone(), folders(tmp_path)
    checkpoint = write(tmp_path / "a.ckpt", net, "frozen.")
    for source in (one, two):
        for file in captured.iterdir():  # as of a second best
            os.link(file, source / file.name)
        assert save_lacking(net, checkpoint, captured, source) == ["frozen.weight", "frozen.bias"]
    assert (one / "lacking.pt").samefile(two / "lacking.pt")
    assert torch.equal(torch.load(one / "lacking.pt")["frozen.weight"], net.frozen.weight)


def test_state_that_changes_is_copied_each_time(tmp_path):
    net, (captured, one, two) = Backbone(), folders(tmp_path)
    checkpoint = write(tmp_path / "a.ckpt", net, "head.1.")
    for source in (one, two):
        assert "head.1.running_mean" in save_lacking(net, checkpoint, captured, source)
        net.head[1].running_mean += 1
    means = [torch.load(source / "lacking.pt")["head.1.running_mean"] for source in (one, two)]
    assert torch.equal(means[0] + 1, means[1])


def test_a_whole_checkpoint_lacks_nothing(tmp_path):
    net, (captured, one, _) = Backbone(), folders(tmp_path)
    assert save_lacking(net, write(tmp_path / "a.ckpt", net, "none"), captured, one) == []
    assert not list(one.iterdir())


def test_the_outermost_parts_that_were_called_are_named():
    net = Backbone()
    called = Called(net)
    net.validation_step(torch.ones(2, 4))
    called.remove()
    nn.Sequential(net.head[0])(torch.ones(2, 4))
    assert called.outermost == ["frozen", "head"]
    assert not nn.modules.module._global_forward_pre_hooks


def test_exports_of_a_copied_callback_are_in_the_reports_of_both():
    """As libraries that keep a trainer's arguments, and make a trainer of a deep copy of them."""
    callback = ExportCallback(["onnx"])
    made = copy.deepcopy({"callbacks": [callback]})["callbacks"][0]
    assert made is not callback
    assert made.state_key == callback.state_key
    made.reports.append("a report")
    assert callback.reports == ["a report"]
