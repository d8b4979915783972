"""What a module may have besides its weights, and how a worker restores it."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict, defaultdict

import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_export import ExportCallback
from polyexport.capture import snapshot
from polyexport.capture.calls import call_file, save_call
from polyexport.capture.pickling import restore


class Holder(nn.Module):
    """A layer, and what `held` says, under its names; `answer` has the module and its input."""

    def __init__(self, held, answer=lambda net, x: net.layer(x)) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.answer = answer
        for name, value in held(self).items():
            if type(value) in weakref.ProxyTypes:  # which PyTorch would take for a part
                self.__dict__[name] = value
            else:
                setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(self, x)


class Slotted(Holder):
    __slots__ = ("empty", "scale")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


class Table(nn.Module):
    """As configurations that look names up in a dict, and say so in a dict's way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = Config(scale=3.0)

    def __getattr__(self, name):
        return self.__dict__["_modules"][name]

    def forward(self, x):
        return self.layer(x) * self.config.scale


class Config:
    def __init__(self, **entries) -> None:
        self.__dict__["entries"] = entries

    def __getattr__(self, name):
        return self.entries[name]


class Bare:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 3.0

    def __getattr__(self, name):
        raise KeyError(name)


def attribute_of(base):
    """A subclass of a container whose entries are also asked for as attributes, and fail in its own way."""
    return type(f"Attributes{base.__name__}", (base,), {"__getattr__": lambda self, name: self[name]})


AttributesDict, AttributesOrdered, AttributesDefault = map(attribute_of, (dict, OrderedDict, defaultdict))
AttributesList, AttributesTuple, AttributesStr = map(attribute_of, (list, tuple, str))


@torch.jit.script
def gate(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.7 * x)


@torch.compile
def squashed(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


def squash(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


class Größe(nn.Linear):
    pass


class Named(Holder):
    """Parts whose names Python keeps for itself, or TorchScript cannot read, under which forward finds them."""

    def __init__(self) -> None:
        super().__init__(lambda net: {})
        self.heads = nn.ModuleDict({"class": nn.Linear(4, 4), "class_": nn.Tanh(), "größe": Größe(4, 4)})
        self.gains = nn.ParameterDict({"global": nn.Parameter(torch.rand(4))})
        self.add_module("lambda", nn.Linear(4, 4))
        self.register_buffer("two\nlines", torch.rand(4))
        self.register_buffer('"quoted\\", (and more', torch.rand(4))

    def forward(self, x):
        assert list(self.heads) == [name for name, _ in self.heads.items()] == ["class", "class_", "größe"]
        assert "class" in self.heads
        assert "class__" not in self.heads
        for name in self.heads:
            x = self.heads[name](x)
        return getattr(self, "lambda")(x) * self.gains["global"] + getattr(self, "two\nlines") / getattr(
            self, '"quoted\\", (and more'
        )


def slotted():
    made = Slotted(lambda net: {})
    object.__setattr__(made, "scale", 3.0)
    return made


def locked(net, x):
    with net.lock, net.again, net.condition:
        return net.layer(x)


HELD = {
    "weak references": lambda: Holder(
        lambda net: {"me": weakref.ref(net), "near": weakref.proxy(net.layer), "some": weakref.WeakSet([net.layer])},
        lambda net, x: net.me().layer(x) + net.near(x),
    ),
    "a weak method": lambda: Holder(
        lambda net: {"method": weakref.WeakMethod(net.layer.forward)}, lambda net, x: net.method()(x)
    ),
    "a reference to what is gone": lambda: Holder(lambda net: {"gone": weakref.ref(nn.Linear(1, 1))}),
    "locks": lambda: Holder(
        lambda net: {"lock": threading.Lock(), "again": threading.RLock(), "condition": threading.Condition()}, locked
    ),
    "slots": slotted,
    "a __getattr__ that raises KeyError": Table,
    "slots and such a __getattr__": lambda: Holder(
        lambda net: {"bare": Bare()}, lambda net, x: net.layer(x) * net.bare.scale
    ),
    "Lightning's hparams": lambda: Holder(
        lambda net: {"hparams": AttributeDict(scale=3.0)}, lambda net, x: net.layer(x) * net.hparams.scale
    ),
    "containers with a __getattr__": lambda: Holder(
        lambda net: {
            "mappings": [AttributesDict(by=2.0), AttributesOrdered(by=3.0), AttributesDefault(float, by=5.0)],
            "sequences": [AttributesList([7.0]), AttributesTuple([11.0]), AttributesStr("13")],
        },
        lambda net, x: (
            net.layer(x)
            * math.prod(each["by"] for each in net.mappings)
            * math.prod(float(each[0]) for each in net.sequences)
        ),
    ),
    "scripted parts": lambda: Holder(
        lambda net: {"norm": torch.jit.script(nn.LayerNorm(4).eval()), "gate": gate},
        lambda net, x: net.norm(net.gate(net.layer(x))),
    ),
    "a traced part": lambda: Holder(
        lambda net: {"part": torch.jit.trace(nn.Tanh(), torch.ones(2, 4))}, lambda net, x: net.part(net.layer(x))
    ),
    "what belongs to training": lambda: Holder(
        lambda net: {
            "trainer_kwargs": {"callbacks": [ExportCallback(["onnx"])], "logger": CSVLogger("logs")},
            "runs": [Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)],
        }
    ),
    "what torch.compile made": lambda: Holder(
        lambda net: {"act": torch.compile(squash), "more": {"act": squashed}, "layer": torch.compile(net.layer)},
        lambda net, x: net.act(net.more["act"](net.layer(x))),
    ),
    "parts with names that no tracer can write": Named,
    "a generator": lambda: Holder(lambda net: {"numbers": (number for number in range(3))}),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", HELD)
def test_a_module_is_restored_and_can_be_traced_despite_holding(name, tmp_path):
    net, x = HELD[name]().eval(), torch.randn(3, 4)
    save_call((torch.ones(2, 4),), {}, tmp_path)
    snapshot.save_module(net, None, (torch.ones(2, 4),), {}, tmp_path)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    loaded = snapshot.load(tmp_path)
    expected = net(x)
    assert torch.allclose(loaded(x), expected)
    torch.jit.save(torch.jit.trace(loaded, (torch.ones(2, 4),), check_trace=False), tmp_path / "trace.pt")
    assert torch.allclose(torch.jit.load(tmp_path / "trace.pt")(x), expected)


def test_an_attribute_that_cannot_be_pickled_is_named_and_the_module_is_traced(tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        net = nn.Sequential(nn.Linear(4, 4), Holder(lambda net: {"logs": {"train": [file]}})).eval()
        note = snapshot.save_module(net, None, (torch.ones(2, 4),), {}, tmp_path)
    assert "(1.logs['train'][0] (a TextIOWrapper): PicklingError" in note
    assert note.endswith("so it was traced in the training process")
    assert (tmp_path / "structure.pt2").exists()


def test_a_constant_argument_that_cannot_be_pickled_is_left_out(tmp_path):
    save_call((torch.ones(2, 4),), {"file": (number for number in range(3)), "scale": 2.0}, tmp_path)
    (x,), rest = restore(call_file(tmp_path))
    assert x.shape == (2, 4)
    assert rest["scale"] == 2.0
    with pytest.raises(AttributeError, match="close of a generator: it stays with training"):
        rest["file"].close()


def test_weights_that_the_checkpoint_lacks_come_from_a_file_next_to_it(tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    save_call((x,), {}, tmp_path)
    snapshot.save_structure(net, None, tmp_path)
    torch.save(net[1].state_dict(prefix="1."), tmp_path / "weights.pt")
    torch.save(net[0].state_dict(prefix="0."), tmp_path / "lacking.pt")
    assert torch.equal(snapshot.load(tmp_path)(x), net(x))


def has_no_source(net, x):
    raise OSError("could not get source code")  # as inspect does, for code that was typed in


def test_an_error_of_the_tracer_is_told_as_one_and_not_as_a_disk_that_cannot_be_written(tmp_path):
    net = Holder(lambda net: {"numbers": (number for number in range(3))}, has_no_source)
    note = snapshot.save_module(net, None, (torch.ones(2, 4),), {}, tmp_path)
    assert note.endswith("nor traced (OSError: could not get source code)")
    assert (tmp_path / snapshot.UNAVAILABLE).read_text() == note
