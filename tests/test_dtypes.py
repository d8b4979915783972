"""A forward that asks for another precision is exported in float32, and the report says so."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from polyexport import worker
from polyexport.capture import snapshot
from polyexport.capture.answer import ask
from polyexport.capture.calls import save_call
from polyexport.capture.dtypes import InFloat32, needs_float32
from polyexport.capture.flatten import flat
from polyexport.capture.traced import save_traced
from polyexport.capture.weights import WEIGHTS
from polyexport.errors import BadRequest
from polyexport.measure import reference
from polyexport.workers.job import Convert, Verify
from saving import saved

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Calls `answer` with itself and its input; `low` has other weights than float32."""

    def __init__(self, answer, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.low = nn.Linear(5, 5), nn.Linear(5, 3).to(dtype)
        self.answer = answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(self, x)


def under_autocast(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.low(net.head(x)).float()


@torch.autocast("cpu", dtype=torch.float16)
def decorated(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.low(net.head(x))


LOW = {
    "autocast": (under_autocast, torch.float32),
    "a function under autocast": (decorated, torch.float32),
    "half": (lambda net, x: net.low(net.head(x).half()).float(), torch.float16),
    "to": (lambda net, x: net.low(net.head(x).to(torch.bfloat16)), torch.bfloat16),
    "a made tensor": (lambda net, x: net.low(net.head(x).type_as(torch.ones(1, dtype=torch.half))), torch.float16),
    "an argument": (lambda net, x: net.low(torch.softmax(net.head(x), 1, dtype=torch.bfloat16)), torch.bfloat16),
    "weights that forward casts": (lambda net, x: net.low.half()(net.head(x).half()), torch.float32),
    "a product": (lambda net, x: net.low((net.head(x).half() @ torch.eye(5).half()).float()), torch.float32),
    "double": (lambda net, x: net.low(net.head(x).double()).float(), torch.float64),
}


def in_float32(net: Net, x: torch.Tensor) -> torch.Tensor:
    """What all of them compute, but for rounding; of one it is the softmax."""
    y = net.head(x)
    return net.low.float()(y.softmax(1) if net.answer is LOW["an argument"][0] else y)


@pytest.mark.parametrize("name", LOW)
def test_a_forward_that_asks_for_another_precision_comes_out_in_float32_with_a_note(name, tmp_path):
    answer, dtype = LOW[name]
    net = Net(answer, dtype).eval()
    source = saved(net, tmp_path / "source", X)
    ask(copy.deepcopy(net), ((X,), {}), source)
    found = reference.make(tmp_path, source, True)
    (note,) = [note for note in found.notes if note.startswith("forward asks for ")]
    assert "(test_dtypes.py:" in note
    assert [found.undecidable, found.static_because, found.spec.outputs[0].dtype] == ["", "", "float32"]
    made = tmp_path / "model.torchscript"
    with warnings.catch_warnings(action="ignore"):
        worker.convert(tmp_path, Convert(format="torchscript", spec=found.spec, route="trace", target=str(made)))
    job = Verify(format="torchscript", source=str(made), spec=found.spec, batches=found.batches, noise=found.noise)
    assert worker.verify(tmp_path, job)["parity"].passed
    other = torch.randn(4, 5)
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(made)(other), in_float32(net, other), atol=1e-5)


LEFT = {
    "an answer in half": lambda net, x: net.low(x).half(),
    "rounding": lambda net, x: net.low(x.half().float()),
    "a sum in double": lambda net, x: net.low(x).double().logsumexp(-1),
    "autocast to float32": lambda net, x: torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)(net.low)(x),
}


@pytest.mark.parametrize("name", LEFT)
def test_casts_that_compute_nothing_are_left_as_they_are(name, tmp_path):
    net = Net(LEFT[name], torch.float32).eval()
    found = reference.make(tmp_path, saved(net, tmp_path / "source", X), True)
    assert not [note for note in found.notes if note.startswith("forward asks for ")]
    assert found.spec.outputs[0].dtype == str(net(X).dtype).removeprefix("torch.")


def test_a_forward_that_fails_for_another_reason_keeps_that_reason(tmp_path):
    net = Net(lambda net, x: net.low(x.half().float()) @ torch.ones(7), torch.float32).eval()
    assert needs_float32(flat(net, (X,), {}))
    with pytest.raises(BadRequest, match=r"raises at test_dtypes.py:\d+: RuntimeError: size mismatch"):
        reference.make(tmp_path, saved(net, tmp_path / "source", X), True)
    assert not Path(tmp_path, "source", "in_float32").exists()


@pytest.mark.parametrize("name", ["autocast", "a function under autocast", "half", "to", "an argument"])
def test_a_module_that_is_traced_in_training_comes_out_in_float32_too(name, tmp_path):
    answer, dtype = LOW[name]
    net, source = Net(answer, dtype).eval(), tmp_path / "source"
    source.mkdir()
    save_traced(net, None, (X,), {}, source)
    save_call((X,), {}, source)
    torch.save(net.state_dict(), source / WEIGHTS)
    ask(net, ((X,), {}), source)
    found = reference.make(tmp_path, source, True)
    assert found.undecidable == ""
    assert [note for note in found.notes if note.startswith("forward asks for ") and "test_dtypes.py:" in note]
    other = torch.randn(4, 5)
    with torch.no_grad():
        assert torch.allclose(snapshot.load(source)(other), in_float32(net, other), atol=1e-5)


def test_another_thread_keeps_its_autocast():
    def its_dtype() -> torch.dtype:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (X @ X.T).dtype

    with InFloat32(casts_left_out=False), ThreadPoolExecutor(1) as pool:
        assert [its_dtype(), pool.submit(its_dtype).result()] == [torch.float32, torch.bfloat16]
    assert its_dtype() is torch.bfloat16
