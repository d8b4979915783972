"""A module to a folder and back, and its flat form."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import threading
from collections import UserDict, namedtuple
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import polyexport
import zoo
from polyexport import BadRequest
from polyexport.capture import snapshot
from polyexport.capture.answer import ANSWER, ask
from polyexport.capture.calls import call_file, call_tensors, save_call
from polyexport.capture.changes import beside_weights
from polyexport.capture.code import import_path
from polyexport.capture.flatten import flat, named_tensors
from polyexport.capture.selection import selected
from polyexport.capture.traced import save_traced
from polyexport.capture.weights import WEIGHTS
from saving import saved

Pair = namedtuple("Pair", "first second")


@dataclass
class Found:
    boxes: torch.Tensor
    scores: torch.Tensor


def test_a_module_comes_back_with_its_weights_and_answers_the_same(tmp_path):
    net = zoo.UNet().eval()
    image = torch.rand(2, 3, 16, 16)
    loaded = snapshot.load(saved(net, tmp_path, image))
    assert torch.equal(loaded(image), net(image))


def test_saving_the_structure_writes_no_parameter_and_changes_nothing(tmp_path):
    net = nn.Linear(1000, 1000)
    before = copy.deepcopy(net.state_dict())
    snapshot.save_structure(net, None, tmp_path)
    assert (tmp_path / "structure.pkl").stat().st_size < 10_000
    assert not net.weight.is_meta
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


class Hidden(nn.Module):
    """Has a teacher that no optimizer and no checkpoint shall see."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.teacher = nn.Linear(4, 3), [nn.Linear(4, 4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.teacher[0](x))


def test_a_module_that_is_hidden_in_a_list_keeps_its_weights(tmp_path):
    x, net = torch.randn(2, 4), Hidden().eval()
    loaded = snapshot.load(saved(net, tmp_path, x))
    assert torch.equal(loaded(x), net(x))
    with pytest.warns(DeprecationWarning, match="jit"):
        assert torch.equal(torch.jit.trace(loaded.requires_grad_(False), (x,))(x), net(x))


class Bank(nn.Module):
    """Has rows that training adds to."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.ones(rows, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.rows.T


def test_a_buffer_that_has_grown_since_comes_back_as_it_is_in_the_checkpoint(tmp_path):
    x = torch.randn(2, 4)
    folder = saved(Bank(0), tmp_path, x)
    torch.save(Bank(3).state_dict(), folder / WEIGHTS)
    assert torch.equal(snapshot.load(folder)(x), Bank(3)(x))


def test_a_checkpoint_of_pytorchs_old_kind_is_read(tmp_path):
    x, net = torch.randn(2, 4), nn.Linear(4, 3)
    folder = saved(net, tmp_path, x)
    checkpoint = {"state_dict": net.state_dict()}
    torch.save(checkpoint, folder / WEIGHTS, _use_new_zipfile_serialization=False)
    assert torch.equal(snapshot.load(folder)(x), net(x))


class Versioned(nn.Linear):
    """Has seen two layouts of its state, and asks which one it is given."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_module_is_told_the_version_of_its_state(tmp_path):
    x, net = torch.randn(2, 4), nn.Sequential(Versioned(4, 3))
    assert torch.equal(snapshot.load(saved(net, tmp_path, x))(x), net(x))


def reshaped(net):
    net[2] = nn.Linear(4, 7)


def grown(net):
    net.register_buffer("rows", torch.ones(2))


CHANGES = {
    "a layer of another kind": lambda net: net.__setitem__(1, nn.Tanh()),
    "a layer of another size": reshaped,
    "one more layer": lambda net: net.append(nn.ReLU()),
    "one more buffer": grown,
    "a hook": lambda net: net[0].register_forward_hook(lambda *told: told[-1] * 2),
    "a hook before": lambda net: net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "an attribute": lambda net: setattr(net, "scale", 2.0),
    "a number in a namespace": lambda net: setattr(net.config, "scale", 2.0),
    "a tensor that is no buffer": lambda net: net.config.state["mean"].add_(1),
    "a number in a closure": lambda net: net.count(),
    "a bound argument": lambda net: net.scaled.keywords.update(by=2.0),
}


def counter():
    seen = 0

    def count():
        nonlocal seen
        seen += 1

    return count


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_structure_while_training_is_seen_and_a_step_is_none(name):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.LazyLinear(2))
    net.config = SimpleNamespace(scale=1.0, state={"mean": torch.zeros(2)})
    net.config.itself, net.count, net.scaled = net.config, counter(), functools.partial(torch.mul, by=1.0)
    before = beside_weights(net)
    with torch.no_grad():
        for weight in net[:3].parameters():
            weight.add_(1)
    net.eval()
    assert beside_weights(net) == before
    CHANGES[name](net)
    assert beside_weights(net) != before


def test_the_structure_of_scripted_parts_is_looked_at_too():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
    before = beside_weights(net)
    net.append(nn.ReLU())
    assert beside_weights(net) != before


def test_tied_weights_stay_tied(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    loaded = snapshot.load(saved(net, tmp_path, torch.randn(2, 4)))
    assert len(list(loaded.parameters())) == 3


def test_a_hook_that_refers_to_a_context_variable_comes_back(tmp_path):
    """As those by which transformers gathers hidden states, from the first call that asks for them on."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    net, image = transformers.ViTModel(config).eval(), torch.rand(2, 3, 8, 8)
    expected = net(image, output_hidden_states=True).hidden_states[-1]
    assert any(each._forward_hooks for each in net.modules())
    loaded = snapshot.load(saved(net, tmp_path, pixel_values=image, output_hidden_states=True))
    loaded(image)
    at = loaded.output_names.index("hidden_states_1")
    assert torch.equal(loaded(image)[at], expected)


def test_buffers_that_no_checkpoint_has_are_kept(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([3.0]), persistent=False)

        def forward(self, x):
            return x * self.scale

    loaded = snapshot.load(saved(Scaled(), tmp_path, torch.ones(2, 1)))
    assert loaded(torch.ones(2, 1)).tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize("persistent", [True, False])
def test_a_sparse_buffer_is_kept(tmp_path, persistent):
    class Neighbors(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", torch.eye(2).flip(0).to_sparse(), persistent=persistent)

        def forward(self, x):
            return self.adjacency @ x

    loaded = snapshot.load(saved(Neighbors(), tmp_path, torch.rand(2, 1)))
    assert loaded(torch.tensor([[1.0], [2.0]])).tolist() == [[2.0], [1.0]]


def test_a_lightning_checkpoint_is_read_by_its_state_dict(tmp_path):
    net = nn.Linear(3, 2)
    saved(net, tmp_path, torch.randn(2, 3))
    torch.save({"state_dict": net.state_dict(), "epoch": 3, "extra": {1, 2}}, tmp_path / "weights.pt")
    assert torch.equal(snapshot.load(tmp_path).inner.weight, net.weight)


def test_weights_that_the_checkpoint_lacks_are_named(tmp_path):
    net = nn.Linear(3, 2)
    net.strict_loading = False
    saved(net, tmp_path, torch.randn(2, 3))
    torch.save({"weight": net.weight.detach()}, tmp_path / "weights.pt")
    with pytest.raises(BadRequest, match=r"no weights for bias \(1 parameters"):
        snapshot.load(tmp_path)


def test_half_precision_is_exported_as_float32(tmp_path):
    net = nn.Linear(3, 2).to(torch.bfloat16)
    loaded = snapshot.load(saved(net, tmp_path, torch.randn(2, 3).to(torch.bfloat16)))
    assert loaded(*loaded.example).dtype == torch.float32


def test_a_part_of_the_module_can_be_exported(tmp_path):
    net = nn.ModuleDict({"backbone": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
    loaded = snapshot.load(saved(net, tmp_path, torch.randn(2, 3), select="backbone"))
    assert loaded.inner.out_features == 2
    with pytest.raises(BadRequest, match="has no 'bakbone'; it has backbone, head"):
        selected(net, "bakbone")


def test_a_function_may_select_the_part(tmp_path):
    net = nn.ModuleDict({"backbone": nn.Linear(3, 2)})
    loaded = snapshot.load(saved(net, tmp_path, torch.randn(2, 3), select=lambda root: root["backbone"]))
    assert torch.equal(loaded.inner.weight, net["backbone"].weight)
    with pytest.raises(BadRequest, match="is a int, not a torch"):
        selected(net, lambda root: 1)


def test_inputs_have_the_names_of_the_arguments():
    class Net(nn.Module):
        def forward(self, ids, options, *rest, mask=None, scale=1.0):
            return ids + options["a"] + options["b"][0] + rest[0] + mask

    one = torch.ones(2)
    made = flat(Net(), (one, {"a": one, "b": (one, 5)}, one), {"mask": one, "scale": 2.0})
    assert made.input_names == ("ids", "options_a", "options_b_0", "rest_0", "mask")
    assert made(*made.example).tolist() == [5.0, 5.0]


class Batch(UserDict):
    """As transformers' `BatchEncoding`: a mapping that is no dict, with attributes of its own."""

    rows = 2


@dataclass(frozen=True)
class Sample:
    batch: Batch
    scale: float = 1.0


def test_mappings_and_dataclasses_reach_forward_as_their_own_types(tmp_path):
    class Net(nn.Module):
        def forward(self, samples):
            first = samples[0]
            assert isinstance(first, Sample)
            assert isinstance(first.batch, Batch)
            return first.batch["x"] * first.scale + first.batch["more"]["y"] + first.batch.rows

    one = torch.ones(2)
    call = [Sample(Batch(x=one, more=Batch(y=3 * one)), 5.0)]
    made = flat(Net(), (call,), {})
    assert made.input_names == ("samples_0_batch_x", "samples_0_batch_more_y")
    assert made(one, 2 * one).tolist() == [9.0, 9.0]
    save_call((call,), {}, tmp_path)
    tensors = call_tensors(call_file(tmp_path))
    assert [tensor.tolist() for tensor in tensors] == [[1.0, 1.0], [3.0, 3.0]]
    assert call[0].batch["x"] is one


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda x: x, ["output_0"]),
        (lambda x: (x, [x, x]), ["output_0", "output_1_0", "output_1_1"]),
        (lambda x: {"logits": x, "aux": {"a": x}}, ["logits", "aux_a"]),
        (lambda x: Pair(x, x), ["first", "second"]),
        (lambda x: Found(x, x), ["boxes", "scores"]),
        (lambda x: {"x": x, "a b": x, "count": 3, "none": None}, ["x_output", "a_b"]),
        (lambda x: (x, pack_sequence([x])), ["output_0", "output_1_padded", "output_1_lengths"]),
    ],
)
def test_outputs_have_the_names_of_their_keys(answer, names):
    outputs, dropped = named_tensors(answer(torch.ones(1)), taken={"x": 0})
    assert list(outputs) == names
    assert dropped == ()


def test_an_output_that_holds_no_tensor_is_named():
    assert named_tensors({"y": torch.ones(1), "cache": object()}, {})[1] == ("cache (object)",)


def test_an_output_without_any_tensor_is_an_error():
    with pytest.raises(BadRequest, match="without a tensor in it; return tensors, or dicts"):
        named_tensors({"count": 3}, {})


class Graph:
    def __init__(self, x):
        self.parts = {"x": x}


def test_an_object_with_tensors_in_it_is_an_error_that_says_what_to_do():
    with pytest.raises(BadRequest, match=r"input is a Graph.*give inputs=.*a wrapper whose forward builds the Graph"):
        flat(nn.Identity(), (Graph(torch.ones(2)),), {})


@pytest.mark.parametrize(
    ("given", "kind"), [(torch.eye(2).to_sparse(), "sparse"), (torch.nested.nested_tensor([torch.ones(2)]), "nested")]
)
def test_a_tensor_that_is_not_dense_is_an_error_that_says_what_to_do(tmp_path, given, kind):
    told = f"input is a {kind} tensor.*give inputs=.*a wrapper whose forward makes the {kind} one"
    with pytest.raises(BadRequest, match=told):
        polyexport.export(nn.Identity(), given, ["onnx"], tmp_path / "e")


class Task(Enum):
    SEGMENT = "segment"


def test_arguments_that_are_not_tensors_are_constants(tmp_path):
    class Net(nn.Module):
        def forward(self, batch):
            assert batch["task"] is Task.SEGMENT
            return batch["x"] * float(batch["scale"]) + len(batch["when"])

    batch = {
        "x": torch.ones(2),
        "task": Task.SEGMENT,
        "file": Path("a.png"),
        "when": np.arange(3),
        "scale": np.float32(2),
    }
    loaded = snapshot.load(saved(Net(), tmp_path, batch))
    assert loaded.input_names == ("batch_x",)
    assert loaded(torch.ones(2)).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_that_differentiates_is_reported(mode):
    class Forces(nn.Module):
        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad((x**2).sum(), x)[0]

    with mode(), pytest.raises(BadRequest, match=r"forward differentiates .* module=<that part>"):
        flat(Forces(), (torch.ones(2),), {})(torch.ones(2))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_number_among_the_outputs_stays_out_of_a_trace_too(tmp_path):
    class Net(nn.Module):
        def forward(self, x):
            return {"rows": x.shape[0], "y": x + 1, "mean": float(x.mean())}

    folder = saved(Net(), tmp_path, torch.ones(2, 3))
    loaded = snapshot.load(folder)
    loaded(torch.ones(2, 3))
    assert loaded.output_names == ("y",)
    traced = torch.jit.trace(snapshot.load(folder, ("y",)), (torch.ones(2, 3),), check_trace=False)
    assert torch.equal(traced(torch.zeros(5, 3)), torch.ones(5, 3))


def test_a_call_without_a_tensor_is_an_error():
    with pytest.raises(BadRequest, match="received no tensor"):
        flat(nn.Identity(), (1,), {})


def test_a_traced_structure_takes_the_weights_of_the_checkpoint(tmp_path):
    root = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))}).eval()
    x = torch.randn(4, 3)
    save_call((x,), {}, tmp_path)
    root["net"][0].train()
    save_traced(root, "net", (x,), {}, tmp_path)
    assert [each.training for each in root.modules()] == [False, False, True, False]
    root.eval()
    nn.init.ones_(root["net"][0].weight)
    torch.save(root.state_dict(), tmp_path / "weights.pt")
    loaded = snapshot.load(tmp_path)
    for size in (4, 2, 7):
        rows = torch.randn(size, 3)
        assert torch.allclose(loaded(rows), root["net"](rows))
    assert loaded.input_names == ("input",)


def test_arrays_are_written_under_any_name(tmp_path):
    from polyexport.spec import write_arrays

    arrays = {"file": np.arange(3), "allow_pickle": np.zeros((2, 2), np.float32)}
    write_arrays(tmp_path / "x.npz", arrays)
    with np.load(tmp_path / "x.npz") as found:
        assert {name: found[name].tolist() for name in found.files} == {n: a.tolist() for n, a in arrays.items()}


def test_the_import_path_is_complete_in_another_working_folder(tmp_path, monkeypatch):
    """As Hydra does, when a script has named its folder of modules by a relative path."""
    for name in ("src", "outputs"):
        (tmp_path / name).mkdir()
    (tmp_path / "src" / "only_there.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("src")
    importlib.import_module("only_there")
    monkeypatch.chdir(tmp_path / "outputs")
    assert import_path()[0] == str(tmp_path / "src")
    assert all(map(os.path.isabs, import_path()))


class HoldsItsData(nn.Module):
    """As many a tutorial's module does from `setup` on; this data could not be pickled either."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.train_set = TensorDataset(torch.zeros(100_000, 4))
        self.train_set.file = threading.Lock()
        self.loaders = [DataLoader(self.train_set)]
        self.asks = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + (self.train_set.tensors[0][0, 0] if self.asks else 0)


def test_data_that_a_module_refers_to_is_not_saved(tmp_path):
    net = HoldsItsData().eval()
    x = torch.randn(3, 4)
    loaded = snapshot.load(saved(net, tmp_path, x))
    assert torch.equal(copy.deepcopy(loaded)(x), net(x))
    assert (tmp_path / "structure.pkl").stat().st_size < 20_000
    assert isinstance(net.train_set, TensorDataset)
    net.asks = True
    loaded = snapshot.load(saved(net, tmp_path, x))
    with pytest.raises(AttributeError, match="tensors of a TensorDataset: it stays with training"):
        loaded(x)


class Registers(nn.Module):
    """Registers a hook at its first call and remembers that, as transformers do, and appends to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_ready, self.seen = nn.Linear(5, 3), False, []

    def forward(self, x):
        if not self.is_ready:
            self.layer.register_forward_hook(lambda *call: self.seen.append(call))
            self.is_ready = True
        return self.layer(x)


def test_a_module_that_runs_once_more_has_the_hooks_and_lists_of_before(tmp_path):
    module = Registers()
    ask(module, ((torch.rand(4, 5),), {}), tmp_path)
    assert (tmp_path / ANSWER).exists()
    assert (module.is_ready, len(module.layer._forward_hooks), module.seen) == (False, 0, [])
