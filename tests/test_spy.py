"""The first call of forward is captured, without any side effect."""

from __future__ import annotations

import copy
import cProfile
import functools
import inspect
import io
import pickle
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import nn

import runs
from lightning_export import ExportCallback
from lightning_export.answers import Recorder
from lightning_export.capture import Spy
from planted import GOOD

ROWS = torch.arange(12.0).reshape(2, 6)


class Net(nn.Module):
    """Takes its arguments in every way that Python knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, scale: Any = None, *rest: Any, shift: Any = 0.0, **more: Any) -> torch.Tensor:
        inner = lambda: x  # noqa: E731  # a cell variable is an argument too
        return self.inner(inner()) + shift


class Reduced(Net):
    """Pickles in its own way."""

    def __reduce__(self) -> Any:
        return Reduced, (), {name: value for name, value in vars(self).items() if name != "forward"}


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def pickled(net: nn.Module) -> Any:
    return pickle.dumps(net)


def saved(net: nn.Module) -> Any:
    torch.save(net, buffer := io.BytesIO())
    buffer.seek(0)
    return sorted(vars(torch.load(buffer, weights_only=False)))


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "pickle": pickled,
    "copy": lambda net: sorted(vars(copy.copy(net))),
    "deepcopy": lambda net: sorted(vars(copy.deepcopy(net))),
    "torch.save": saved,
    "vars": lambda net: sorted(vars(net)),
    "signature": lambda net: inspect.signature(net.forward),
    "source": lambda net: inspect.getsource(net.forward),
    "function": lambda net: net.forward.__func__,
    "of whom": lambda net: net.forward.__self__ is net,
    "reduce": lambda net: net.__reduce_ex__(4)[0],
    "class": type,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("kind", [Net, Reduced])
def test_a_module_looks_as_it_is_while_it_is_watched(kind, look):
    torch.manual_seed(0)
    net = kind()
    before = look(net)
    spy = Spy(net, net)
    try:
        assert look(net) == before
    finally:
        spy.remove()


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "script": torch.jit.script,
    "fx": torch.fx.symbolic_trace,
    "export": lambda net: torch.export.export(net, (ROWS,)),
    "trace": lambda net: torch.jit.trace(net, ROWS),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("tracer", TRACERS)
def test_scripting_and_tracing_a_watched_module_is_not_a_call(tracer):
    net = Plain()
    spy = Spy(net, net)
    try:
        TRACERS[tracer](net)
        assert spy.call is None or tracer == "trace", "which runs the module too"
        net(ROWS)
        assert torch.equal(spy.call[0][0], ROWS)
    finally:
        spy.remove()


@pytest.mark.parametrize(
    ("args", "kwargs", "seen"),
    [
        ((ROWS,), {}, ((ROWS,), {})),
        ((), {"x": ROWS, "shift": 1.0}, ((ROWS,), {"shift": 1.0})),
        ((ROWS, 2, 3), {"mask": 4}, ((ROWS, 2, 3), {"mask": 4})),
        ((ROWS, None), {"mask": 4}, ((ROWS,), {"mask": 4})),
    ],
    ids=["one", "by name", "rest", "default"],
)
@pytest.mark.parametrize("how", ["watched", "profiled", "called by name", "partial"])
def test_the_arguments_of_the_first_call_are_seen(how, args, kwargs, seen):
    net, other = Net(), Net()
    if how == "partial":
        net.forward = functools.partial(Net.forward, net)
    own = dict(vars(net))
    spy = Spy(net, net, profiled=how == "profiled")
    other(ROWS + 1)
    call = net.forward if how == "called by name" else net
    answer = call(*args, **kwargs)
    call(ROWS + 2)
    spy.remove()
    assert torch.equal(answer, net(*args, **kwargs))
    if how == "profiled":
        assert len(spy.call[0]) == len(args), "a function in the place of forward is given what was given"
    else:
        assert repr(spy.call) == repr(seen)
    assert spy.call[0 if args or how != "profiled" else 1]
    assert vars(net) == own


def test_wrappers_of_one_decorator_are_distinguished():
    """`torch.compile` puts such ones in the place of forward and of validation_step."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*args)

    net = Plain()
    net.forward, other = wrapped(net.forward), wrapped(lambda *args: args)
    spy = Spy(net, net)
    other(1, 2)
    assert spy.call is None
    net(ROWS)
    spy.remove()
    ((seen,), _) = spy.call
    assert torch.equal(seen, ROWS)


def test_another_profiler_is_left_alone():
    net = Plain()
    with cProfile.Profile() as profile:
        spy = Spy(net, net)
        net(ROWS)
        spy.remove()
    assert torch.equal(spy.call[0][0], ROWS)
    assert any("test_spy" in str(entry.code) for entry in profile.getstats() if "forward" in str(entry.code))


def test_a_forward_that_the_user_replaces_meanwhile_stays():
    net = Plain()
    spy = Spy(net, net, profiled=True)
    mine = net.forward = torch.nn.functional.relu
    spy.remove()
    assert net.forward is mine


@dataclass
class Stubborn:
    """Cannot be copied."""

    x: torch.Tensor

    def __copy__(self) -> Any:
        raise RuntimeError("one of me is enough")


class Frozen(UserDict[str, Any]):
    """Cannot be changed, nor be made from another."""

    def __init__(self, x: torch.Tensor) -> None:
        self.data = {"x": x}

    def __setitem__(self, key: str, item: Any) -> None:
        raise TypeError("frozen")


class Immutable(Mapping[str, Any]):
    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Any:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


ARGUMENTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a proxy": lambda x: MappingProxyType({"x": x}),
    "an immutable mapping": lambda x: Immutable({"x": x}),
    "a dataclass that refuses": Stubborn,
    "a frozen dict": Frozen,
    "a meta tensor": lambda x: {"x": x, "shape": torch.empty(3, device="meta")},
    "a sparse tensor": lambda x: {"x": x.to_sparse()},
}


class Takes(runs.Scripted):
    """Its forward takes its rows out of whatever holds them."""

    make: Callable[[torch.Tensor], Any]

    def forward(self, held: Any) -> torch.Tensor:
        x = held.x if isinstance(held, Stubborn) else held["x"]
        return super().forward(x.to_dense() if x.is_sparse else x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.clock

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([type(self).make(batch[0])], batch_idx)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_fit_goes_on_whatever_forward_is_given(tmp_path, monkeypatch, recwarn, name):
    monkeypatch.setattr(Takes, "make", ARGUMENTS[name], raising=False)
    model, callback = Takes([3.0]), ExportCallback([GOOD], bench=False, when="fit_end")
    trainer = runs.trainer(tmp_path, [ModelCheckpoint(monitor="val_loss"), callback], max_epochs=1)
    trainer.fit(model, runs.loader(), runs.loader())
    assert float(model.clock) == 4
    states = {report["good"].state for report in callback.reports}
    assert states == ({"verified"} if name in list(ARGUMENTS)[:3] else states)
    refused = [str(each.message) for each in recwarn if "Nothing is exported" in str(each.message)]
    assert len(refused) == ("is a sparse tensor" in "".join(refused)) == (name == "a sparse tensor")


# --- what forward answered --------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As DDP wraps a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class CallsItsHead(runs.Scripted):
    """Validates without a call of its own forward."""

    def validation_step(self, batch, batch_idx):
        return self.head(batch[0])


@pytest.mark.parametrize(("kind", "recorded"), [(runs.Scripted, True), (CallsItsHead, False)])
def test_within_a_strategys_wrapper_the_answer_is_that_of_forward(kind, recorded):
    net, x = kind().eval(), torch.randn(4, runs.FEATURES)
    recorder = Recorder(net, net)
    _ForwardRedirection()(Wrapper(net), net, "validation_step", (x, None), 0)
    recorder.remove()
    assert (recorder.answer is not None) == recorded
    if recorder.answer is not None:
        assert torch.equal(recorder.answer.call[0][0], x)
        assert torch.equal(recorder.answer.outputs[0], net(x))
    assert not nn.modules.module._has_any_global_hook()


def test_the_user_gets_no_advice_on_our_hooks(recwarn):
    """PyTorch gives it at each call of a compiled module while there are global hooks, and it forgets to forget one."""
    net = runs.Scripted()
    net.head = torch.compile(net.head, backend="eager")
    recorder = Recorder(net, net)
    with torch.compiler.set_stance("force_eager"):
        net(torch.randn(4, runs.FEATURES))
        assert recorder.answer is not None
        recorder.remove()
        net(torch.randn(4, runs.FEATURES))
    assert not nn.modules.module._has_any_global_hook()
    assert not [each for each in recwarn if "global hooks" in str(each.message)]


def test_hooks_of_the_module_itself_are_a_part_of_it():
    net, x = runs.Scripted().eval(), torch.randn(4, runs.FEATURES)
    net.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.register_forward_hook(lambda module, args, returned: returned + 1)
    spy, recorder = Spy(net, net), Recorder(net, net)
    returned = net(x)
    spy.remove()
    recorder.remove()
    assert torch.equal(spy.call[0][0], x)
    assert torch.equal(recorder.answer.call[0][0], x)
    assert torch.equal(recorder.answer.outputs[0], returned)
    assert len(net._forward_hooks) == 1


def test_a_compiled_module_is_not_compared_and_the_report_says_so(tmp_path):
    net = runs.Scripted()
    net.compile(backend="eager")
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints")
    runs.trainer(tmp_path, [checkpoint, callback], max_epochs=1).fit(net, runs.loader(), runs.loader())
    told = "not compared with the outputs in training: forward is compiled"
    assert any(note.text.startswith(told) for note in callback.reports[0].notes)
