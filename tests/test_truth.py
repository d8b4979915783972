"""What is found out before anything is claimed of a module: other values, other sizes, what it keeps and reads."""

from __future__ import annotations

import importlib
import queue
import random
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from polyexport import worker
from polyexport.capture import snapshot
from polyexport.capture.answer import ANSWER, answer as record, ask
from polyexport.capture.calls import example_inputs, save_call
from polyexport.capture.flatten import as_call
from polyexport.capture.pickling import dump
from polyexport.capture.threads import in_one_thread
from polyexport.capture.traced import save_traced
from polyexport.capture.weights import WEIGHTS
from polyexport.engine import routes
from polyexport.errors import BadRequest
from polyexport.measure import reference
from polyexport.measure.other_values import changed, jittered
from polyexport.measure.parity import compare
from polyexport.measure.reference import Reference
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import read_arrays
from polyexport.workers.job import Convert, Verify, proofs

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))

PLAIN = ["rows mixed and negated", "zeros among the values"]
"""The batches of other values of a module that reads none of its data into Python."""


def saved(folder: Path, net: nn.Module, *calls, trained: nn.Module | None = None) -> Path:
    """Where a module is saved, with what it received in one validation batch after another.

    `trained` is the one whose answer is recorded.
    """
    source = folder / "source"
    source.mkdir()
    for index, call in enumerate(calls):
        save_call(*as_call(call), source, index)
    snapshot.save_structure(net, None, source)
    torch.save(net.state_dict(), source / WEIGHTS)
    if trained is not None:
        ask(trained, as_call(calls[0]), source)
        assert (source / ANSWER).exists()
    return source


def prepared(folder: Path, net: nn.Module, *calls, dynamic=True, trained: nn.Module | None = None) -> Reference:
    """The reference of a module that was saved so."""
    return reference.make(folder, saved(folder, net, *calls, trained=trained), dynamic)


TRACED = "source/made/torchscript/model.torchscript"


def traced(folder: Path, found: Reference, *, route: str = "trace") -> tuple[dict, tuple[str, ...]]:
    """What the verification of its TorchScript trace says, and the sites that the trace froze."""
    return converted(folder, found, Convert(format="torchscript", spec=found.spec, route=route, target=TRACED))


def converted(folder: Path, found: Reference, job: Convert) -> tuple[dict, tuple[str, ...]]:
    judge = Verify(format=job.format, source=job.target, spec=found.spec, batches=found.batches, noise=found.noise)
    with warnings.catch_warnings(action="ignore"):
        made = worker.convert(folder, job)
    return worker.verify(folder, judge), tuple(made["frozen"])


class Branch(nn.Module):
    """Loud inputs are made quiet first; ordinary ones are not loud."""

    def __init__(self, decide) -> None:
        super().__init__()
        self.decide, self.head = decide, nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x / 7 if self.decide(x) else x)


def in_a_thread(compute):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(compute()))
    thread.start()
    thread.join()
    return answers[0]


BRANCHES = {
    "a truth value": lambda x: x.abs().max() > 8,
    "a number": lambda x: x.abs().max().item() > 8,
    "an integer": lambda x: int(x.abs().max()) > 8,
    "a list": lambda x: max(x.abs().flatten().tolist()) > 8,
    "an array": lambda x: np.abs(x.numpy()).max() > 8,
    "membership": lambda x: float(X[0].min()) not in x,
    "silence": lambda x: x.any() and x.abs().max() < 0.1,
    "the sign of a sum": lambda x: x[0].sum() * float(X[0].sum()) < 0,
    "equality": lambda x: torch.equal(x, x.abs()),
    "a text": lambda x: "-" not in repr(x[0]),
    "memory that is shared": lambda x: np.abs(np.from_dlpack(x)).max() > 8,
    "a pool": lambda x: next(ThreadPoolExecutor(1).map(lambda y: bool(y.abs().max() > 8), [x])),
    "another pool": lambda x: ThreadPool(1).map(lambda y: bool(y.abs().max() > 8), [x])[0],
    "a thread": lambda x: in_a_thread(lambda: bool(x.abs().max() > 8)),
    "one element": lambda x: abs(float(x[0, 0])) > 100,
}


class Halves(nn.Module):
    """Halves the greatest number as often as it takes: a loop and a branch, in a part of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.abs().max() > 8:
            x = x / 2
        if x.sum() < 0:
            x = -x
        return x


class Attached(Halves):
    """As a LightningModule without a trainer."""

    @property
    def trainer(self) -> object:
        raise RuntimeError("not attached to a trainer")


class Quiet(nn.Module):
    """What it answers, and how it calls the part, no script could take."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.head = Halves(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, **kwargs: object) -> dict[str, object]:
        return {"y": self.head(self.quiet(x)), "about": object()}


@pytest.mark.parametrize("net", [Quiet(), nn.Sequential(Attached())], ids=["a part", "an unnamed part"])
def test_both_sides_of_a_branch_are_kept_where_the_part_with_it_can_be_scripted(tmp_path, net):
    found = prepared(tmp_path, net, X)
    one, _ = traced(tmp_path, found)
    assert one["elsewhere"] or not one["parity"].passed, "a trace keeps one side"
    answer, frozen = traced(tmp_path, found, route="script")
    assert (answer["parity"].passed, answer["elsewhere"], frozen) == (True, "", ())
    made = "source/made/onnx/model.onnx"
    job = Convert(format="onnx", spec=found.spec, route="script", source=TRACED, target=made)
    answer, frozen = converted(tmp_path, found, job)
    assert (answer["parity"].passed, answer["elsewhere"], frozen) == (True, "", ())


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (nn.Linear(5, 3), "forward does not branch on its data"),
        (Branch(lambda x: x.abs().max() > 8), "torch.jit.script refuses Branch: "),
    ],
)
def test_what_a_script_cannot_keep_is_a_one_line_reason(tmp_path, net, why):
    found = prepared(tmp_path, net, X)
    with pytest.raises(RuntimeError) as raised:
        traced(tmp_path, found, route="script")
    assert str(raised.value).startswith(why)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_data_that_a_trace_froze_is_reported_with_its_line(tmp_path, name):
    found = prepared(tmp_path, Branch(BRANCHES[name]), X)
    assert {site.rpartition(":")[0] for site in found.read_at} == {__file__}
    assert found.one_side == ()
    verified, frozen = traced(tmp_path, found)
    assert verified["parity"].passed, "it is right on the first batch"
    why = routes.narrow(verified["elsewhere"], frozen, found)
    assert why.startswith("right on data like the first batch only: on ")
    assert f"forward branches on its data at {Path(__file__).name}:" in why
    assert routes.with_advice("ValueError", found).startswith(
        "ValueError; forward branches on its data at test_truth.py"
    )
    assert routes.with_advice(why, found) == why


def test_a_thread_that_waits_for_another_one_is_refused():
    with in_one_thread(), pytest.raises(RuntimeError, match="waits for another one"):
        threading.Thread(target=queue.Queue().get).start()


def test_a_selection_that_may_be_empty_is_named_where_an_artifact_is_wrong_on_other_data(tmp_path):
    class Experts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.where(x.sum(1) > 0)[0]
            return torch.zeros(x.shape[0], 3).index_add(0, rows, super().forward(x[rows]))

    found = prepared(tmp_path, Experts(5, 3), X)
    why = routes.narrow("on shifted down: RuntimeError: no rows", (), found)
    assert re.search(r"forward selects elements by their values \(test_truth.py:\d+\), of which there may be none", why)


class Checked(Branch):
    """Raises where its data are wrong, and says how large they were."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.isnan(x).any(), "no number"
        print(f"at most {x.abs().max().item():.3f}")
        return super().forward(x)


def test_checks_and_prints_are_not_branches_and_checks_get_a_note(tmp_path):
    found = prepared(tmp_path, Checked(lambda x: False), X)
    assert (found.read_at, found.one_side) == ((), ())
    (note,) = [note for note in found.notes if "artifacts do not check it" in note]
    assert note.startswith("forward checks its data and raises if it is wrong (test_truth.py:")
    verified, frozen = traced(tmp_path, found)
    assert (verified["parity"].passed, verified["elsewhere"], routes.narrow("", frozen, found)) == (True, "", "")


def test_both_sides_of_torch_cond_are_among_the_proofs(tmp_path):
    class Cond(Branch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x[0].sum() > 0, torch.sin, torch.cos, (self.head(x),))

    found = prepared(tmp_path, Cond(len), X)
    sides = {float(np.load(tmp_path / each.path)["x"][0].sum()) > 0 for each in found.batches}
    assert sides == {True, False}


def test_a_branch_that_no_value_reached_is_reported_where_a_trace_froze_it(tmp_path):
    found = prepared(tmp_path, Branch(lambda x: x.abs().max() > 1e30), X)
    assert found.one_side == found.read_at
    verified, frozen = traced(tmp_path, found)
    assert verified["elsewhere"] == ""
    why = routes.narrow("", frozen, found)
    assert why.startswith(
        "one branch only: forward branches on its data, and every batch took the same branch (test_truth"
    )
    assert routes.narrow("", (), found) == "", "another route froze nothing"


def test_a_number_read_from_each_batch_and_always_used_in_one_way_is_reported(tmp_path):
    found = prepared(tmp_path, Branch(lambda x: float(x.abs().max()) * 0), X)
    assert found.one_side == found.read_at
    assert len(found.read_at) == 1


@pytest.mark.parametrize(
    "decide",
    [lambda x: x.shape[0] > 3, lambda x: len(x) > 3, lambda x: torch.ones(3).sum() > 2, lambda x: x.dtype is None],
)
def test_sizes_and_constants_are_not_data(tmp_path, decide):
    found = prepared(tmp_path, Branch(decide), X)
    assert found.read_at == ()
    assert [each.label for each in found.batches if each.label] == PLAIN, "no more are needed"


class Keeps(nn.Module):
    """Answers by what it saw before."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.keep, self.head = keep, nn.Linear(5, 3)
        self.register_buffer("state", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.keep(self.state, x)
        return self.head(x - self.state)


STATES = {
    "a moving mean": lambda state, x: 0.5 * state + 0.5 * x.mean(0),
    "the greatest so far": lambda state, x: torch.maximum(state, x.amax(0)),
    "a count": lambda state, x: state + 1,
    "the last": lambda state, x: x[-1] * 1.0 if x.shape[0] == 6 and x[0, 0] != X[0, 0] else state,
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_forward_with_state_between_calls_is_unverified(tmp_path, name, dynamic):
    found = prepared(tmp_path, Keeps(STATES[name]), X, dynamic=dynamic)
    assert found.undecidable.startswith("forward returns different outputs")


class Begins(nn.Module):
    """Normalizes by the first batch that it sees, from then on, or masks by sizes alone."""

    def __init__(self, begin, *, on_weights: bool = False) -> None:
        super().__init__()
        self.begin, self.on_weights, self.first = begin, on_weights, None
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            self.first = self.begin(x)
            self.shift.data.copy_(self.first if self.on_weights else self.shift)
        return x - self.shift if self.on_weights else x - self.first


@pytest.mark.parametrize("on_weights", [True, False])
@pytest.mark.parametrize(("begin", "keeps"), [(lambda x: x.mean(0), True), (lambda x: torch.arange(5.0), False)])
def test_what_forward_keeps_of_its_first_inputs_is_a_state(tmp_path, begin, keeps, on_weights):
    net = Begins(begin, on_weights=on_weights)
    found = prepared(tmp_path, net, X, trained=net)
    assert bool(found.undecidable) == keeps


def test_a_module_whose_first_call_sets_its_weights_is_not_changed(tmp_path):
    net = Begins(lambda x: x.mean(0), on_weights=True)
    source = saved(tmp_path, net, X, trained=net)
    assert (source / ANSWER).exists()
    assert (net.first, net.shift.tolist()) == (None, [0.0] * 5)


def test_a_state_that_changes_no_output_is_ignored(tmp_path):
    assert prepared(tmp_path, Keeps(lambda state, x: x.sum() * 0 + state), X).undecidable == ""


class Wrong(nn.Module):
    """Has one feature too few in its head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_a_forward_that_raises_is_said_to_raise_with_its_line(tmp_path):
    with pytest.raises(BadRequest, match=r"raises at test_truth\.py:\d+: RuntimeError: mat1 and mat2 shapes"):
        prepared(tmp_path, Wrong(), X)


class Angles(nn.Module):
    """Of rows in a plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.atan2(x[:, :2], x[:, 2:4])


def turned_down(y, x):
    """As exporters to ONNX have it, by -π where y is 0 and x negative."""
    return torch.atan(y / x) + torch.where(x < 0, torch.where(y > 0, torch.pi, -torch.pi), 0.0)


def test_an_angle_that_is_wrong_at_zero_alone_is_refuted(tmp_path, monkeypatch):
    found = prepared(tmp_path, Angles(), X)
    answer, _ = traced(tmp_path, found)
    assert (answer["parity"].passed, answer["elsewhere"]) == (True, "")
    monkeypatch.setattr(torch, "atan2", turned_down)
    answer, _ = traced(tmp_path, found)
    assert answer["parity"].passed
    assert answer["elsewhere"].startswith("on zeros among the values, batch=6: ")


class Guarded(nn.Module):
    """Takes zero for NaN, and one for infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nan_to_num(x, nan=0.0, posinf=1.0, neginf=-1.0))


def test_a_guard_against_nan_and_infinity_is_proven_though_no_batch_has_them(tmp_path, monkeypatch):
    found = prepared(tmp_path, Guarded(), X)
    answer, _ = traced(tmp_path, found)
    assert (answer["parity"].passed, answer["elsewhere"]) == (True, "")
    monkeypatch.setattr(torch, "nan_to_num", lambda x, **_: x)
    unguarded, _ = traced(tmp_path, found)
    assert unguarded["parity"].passed
    assert unguarded["elsewhere"].startswith("on NaN among the values, batch=6: ")


class Ranks(nn.Module):
    """Looks for NaN, which is the greatest of all in PyTorch; one of its outputs is NaN then."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        greatest, place = x.max(1)
        order = {"argmax": x.argmax(1), "argmin": torch.argmin(x, dim=1), "place": place, "top": x.topk(3, 1).indices}
        logical = {"any": x.bool().any(1), "not": torch.logical_not(x), "sorted": torch.sort(x)[0][:, :2].isnan()}
        kept = {"greatest": greatest.nan_to_num(7.0), "relu": torch.relu(x).nan_to_num(5.0)}
        return {"sum": x.sum(1), **order, **logical, **kept}


def test_nan_is_the_greatest_in_artifacts_of_a_module_that_looks_for_it(tmp_path):
    found = prepared(tmp_path, Ranks(), X)
    assert "NaN among the values" in [batch.label for batch in found.batches]
    job = Convert(format="pt2", spec=found.spec, route="export", target="source/made/pt2/model.pt2")
    converted(tmp_path, found, job)
    job = Convert(format="onnx", spec=found.spec, route="dynamo", source=job.target, target="source/made/onnx/m.onnx")
    answer, _ = converted(tmp_path, found, job)
    assert (answer["parity"].passed, answer["elsewhere"]) == (True, "")


def test_a_module_that_was_in_training_mode_in_validation_is_told_so(tmp_path):
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    source = saved(tmp_path, net, X)
    dump(record(net, (X,), {}, net.train()(X)), source / ANSWER)
    assert "was in training mode in that call" in reference.make(tmp_path, source, True).undecidable


def test_hooks_on_all_modules_are_told(tmp_path):
    net = nn.Linear(5, 3).eval()
    source = saved(tmp_path, net, X)
    hook = nn.modules.module.register_module_forward_hook(lambda net, args, output: output + 1)
    dump(record(net, (X,), {}, net(X)), source / ANSWER)
    hook.remove()
    assert "hooks on all modules" in reference.make(tmp_path, source, True).undecidable


class Seldom(nn.Module):
    """Random numbers that change nothing for once."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.draw() < 1 else -x


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: random.random(), "by Python's random or by numpy; "),
        (lambda: np.random.rand(), "by Python's random or by numpy; "),
        (lambda: torch.rand(()), f"({Path(__file__).name}:"),
    ],
)
def test_random_numbers_without_an_effect_are_told_too(tmp_path, draw, told):
    found = prepared(tmp_path, Seldom(draw), X)
    assert not found.undecidable
    assert any(note.startswith("forward draws random numbers without a seed") and told in note for note in found.notes)


class Hashed(nn.Module):
    """Looks up ids of any size, and short numbers as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(97, 4)

    def forward(self, ids: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        return self.table(ids % 97) + kind[:, None, None]


def test_integers_of_more_than_32_bits_are_among_the_proofs_where_any_will_do(tmp_path, monkeypatch):
    ids = torch.randint(0, 50000, (6, 5), generator=torch.Generator().manual_seed(0))
    found = prepared(tmp_path, Hashed(), (ids, torch.arange(6)))
    answer, _ = traced(tmp_path, found)
    assert (answer["parity"].passed, answer["elsewhere"]) == (True, "")
    monkeypatch.setattr(torch.Tensor, "__mod__", lambda x, other: torch.remainder(x.int(), other))
    answer, _ = traced(tmp_path, found)
    assert answer["parity"].passed
    assert answer["elsewhere"].startswith("on integers of more than 32 bits, batch=6: ")


class Chosen(nn.Module):
    """The sum over the rows that are chosen, which may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x[x.sum(1) > 0]).sum(0) + len(x[:, 0].round().unique())


def test_selections_of_nothing_and_of_one_are_among_the_proofs(tmp_path):
    found = prepared(tmp_path, Chosen(), X)
    batches = [read_arrays(tmp_path / batch.path, ("x",))["x"] for batch in found.batches]
    assert 0 in [(x.sum(1) > 0).sum() for x in batches]
    assert 1 in [len(np.unique(x[:, 0].round())) for x in batches]


def test_one_change_that_pytorch_cannot_answer_is_left_out_for_the_next(tmp_path):
    found = prepared(tmp_path, nn.Embedding(8, 2), torch.tensor([[7, 1], [2, 2], [5, 0]]))
    (values,) = [np.load(tmp_path / each.path)["input"] for each in found.batches if not each.real]
    assert values.max() <= 7
    assert not np.array_equal(values, [[7, 1], [2, 2], [5, 0]])


def test_a_change_that_rounding_alone_moves_far_is_left_out(tmp_path):
    class Chaotic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x < 0, torch.sin(x * 1e9), x)

    found = prepared(tmp_path, Chaotic(), X.abs())
    assert [each.label for each in found.batches if each.label] == ["elements shuffled", PLAIN[1]]


def test_every_change_is_one_and_keeps_shape_and_type():
    inputs = {
        "x": X.numpy(),
        "ids": np.arange(12, dtype=np.int64).reshape(6, 2),
        "mask": np.ones((6, 4), np.int64),
        "flag": np.array([True]),
        "scalar": np.array(2.0, np.float32),
        "lengths": np.array([4, 4, 3, 2, 1, 1], np.int32),
        "no categories": np.zeros((6, 4, 0), np.int64),
        "no reals": np.zeros((0, 4), np.float32),
    }
    labels = [label for label, _ in changed(inputs)]
    assert len(labels) == len(set(labels)) > 10
    for label, values in [*changed(inputs), ("jittered", jittered(inputs))]:
        assert {n: (a.shape, a.dtype) for n, a in values.items()} == {n: (a.shape, a.dtype) for n, a in inputs.items()}
        assert {type(array) for array in values.values()} == {np.ndarray}, label  # arithmetic makes a scalar of no axes
        assert any(not np.array_equal(values[name], array) for name, array in inputs.items()), label
        assert values["ids"].min() >= 0, label
        assert values["ids"].max() <= 11, label
        assert set(np.unique(values["mask"])) <= {0, 1}, label


# --- sizes ------------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Sums over neighbors, then over each graph of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = x.index_add(0, edges[1], x[edges[0]])
        return self.head(torch.zeros(targets.shape[0], 5).index_add(0, graph, x)) + targets


def graphs(nodes: int, edges: int, graphs: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(nodes)
    ends = torch.randint(0, nodes, (2, edges), generator=generator)
    graph = torch.arange(nodes) * graphs // nodes
    return torch.randn(nodes, 5, generator=generator), ends, graph, torch.zeros(graphs, 1)


def test_axes_that_differ_between_batches_are_dynamic_and_named_by_equal_sizes(tmp_path):
    found = prepared(tmp_path, Graph(), graphs(12, 30, 4), graphs(17, 41, 5), graphs(9, 20, 3))
    assert [tensor.shape for tensor in found.spec.inputs] == [
        ("batch", 5),
        (2, "edges_axis_1"),
        ("batch",),
        ("targets_axis_0", 1),
    ]
    assert found.spec.outputs[0].shape == ("targets_axis_0", 3)
    real = {each.label: each.sizes["edges_axis_1"] for each in found.batches if each.label and each.real}
    assert real == {"batch 2 of the data": 41, "batch 3 of the data": 20}, "the next, the smallest and the largest"


def test_a_batch_of_another_kind_is_left_out_with_a_note(tmp_path):
    found = prepared(tmp_path, Graph(), graphs(12, 30, 4), graphs(17, 41, 5)[:3])
    assert "1 of 1 further batches have other arguments than the first, and are left out" in found.notes


def test_axes_that_differ_though_fixed_are_named_with_the_option_to_change(tmp_path):
    net = nn.AdaptiveAvgPool1d(2)
    found = prepared(tmp_path, net, {"input": torch.rand(4, 3, 10)}, {"input": torch.rand(4, 3, 14)}, dynamic=False)
    assert "dynamic={'input': {2: 'input_axis_2'}} makes them dynamic" in found.notes[0]
    assert "axis 2 of input (10, 14)" in found.notes[0]
    assert all(np.load(tmp_path / each.path)["input"].shape == (4, 3, 10) for each in found.batches)


def test_fixed_axes_are_named_with_the_option_to_change(tmp_path):
    found = prepared(tmp_path, Graph(), graphs(12, 30, 4), graphs(17, 41, 5))
    assert routes._fixed(found.spec) == (
        " (axis 1 of edges is 30, axis 0 of targets is 4; dynamic={'x': {0: 'batch'}, 'graph': {0: 'batch'}} keeps "
        "the batch axis dynamic)"
    )


def test_fixed_sizes_are_proven_on_other_values_of_those_sizes(tmp_path):
    found = prepared(tmp_path, Graph(), graphs(12, 30, 4), graphs(17, 41, 5))
    fixed = proofs(found.batches, dynamic=False, made_up=True)
    assert {tuple(each.sizes.values()) for each in fixed} == {(12, 30, 4)}
    assert [each.label for each in fixed][1:] == PLAIN
    assert all(each.real for each in proofs(found.batches, dynamic=True, made_up=False)), "of low precision"


class Sized(nn.Module):
    """Another head for some sizes."""

    def __init__(self, decide) -> None:
        super().__init__()
        self.decide, self.one, self.other = decide, nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x) if self.decide(x) else self.one(x)


SIZES = {
    "more rows": (lambda x: x.shape[0] > 40, {0: "batch"}, {"batch": 41}),
    "an odd length": (lambda x: x.shape[1] % 2, {1: "length"}, {"length": 5}),
    "more rows, and reads its data": (lambda x: x.shape[0] > 12 and x.max().item() < 99, {0: "batch"}, {"batch": 13}),
    "far more rows": (lambda x: x.shape[0] > 400, {0: "batch"}, None),
    "one row, which is among all proofs": (lambda x: x.shape[0] == 1, {0: "batch"}, None),
    "a loop": (lambda x: not [row + 1 for row in x], {0: "batch"}, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_at_which_forward_takes_another_branch_is_among_the_proofs(tmp_path, name):
    decide, axes, expected = SIZES[name]
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(3))
    found = prepared(tmp_path, Sized(decide), x, dynamic={"x": axes})
    sizes = [each.sizes for each in found.batches if each.label == "a size at which forward takes another branch"]
    assert sizes == ([] if expected is None else [expected])
    answer, frozen = traced(tmp_path, found)
    why = routes.narrow(answer["elsewhere"], frozen, found)
    assert why.startswith("right on data like the first batch only: on a size") == (expected is not None)


def test_inputs_without_axes_and_without_rows_are_traced_as_what_they_are(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, by: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
            return x * by + boxes.sum()

    calls = (X, torch.tensor(2.0), torch.zeros(0, 4)), (X, torch.tensor(3.0), torch.rand(3, 4))
    found = prepared(tmp_path, Scaled(), *calls)
    assert [tensor.shape for tensor in found.spec.inputs] == [("batch", 5), (), ("boxes_axis_0", 4)]
    inputs = example_inputs(tmp_path / "source", found.spec)
    assert [tuple(tensor.shape) for tensor in inputs] == [(6, 5), (), (2, 4)]
    answer, _ = traced(tmp_path, found)
    assert (answer["parity"].passed, answer["elsewhere"]) == (True, "")


# --- what is no tensor ------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Reads a switch and the first entry of an array, and nothing of its remarks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, scale: object, remarks: object) -> torch.Tensor:
        return self.head(x) * (scale[0] if isinstance(scale, np.ndarray) else float(scale))


def test_an_array_that_forward_reads_is_reported_and_an_unread_one_is_not(tmp_path):
    found = prepared(tmp_path, Mixed(), (X, np.array([2.0, 3.0]), np.zeros(6)))
    told = [note for note in found.notes if "numpy array" in note]
    assert len(told) == 1
    assert told[0].startswith("forward reads scale, a numpy array, which becomes a constant in every artifact; give")
    assert found.narrow == ""


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (2, 3, "right for scale=2 only: forward reads it, it is not a tensor, and it is 3 in batch 2"),
        (
            np.array([2.0]),
            np.array([3.0]),
            "right for scale=array([2.]) only: forward reads it, it is not a tensor, and",
        ),
        (True, False, "right for scale=True only: "),
        ("2", "none", "right for scale='2' only: "),
        (2, 2, ""),
        (np.array([2.0, 1.0]), np.array([2.0, 5.0]), ""),
    ],
    ids=str,
)
def test_a_constant_that_differs_between_batches_makes_artifacts_right_for_one_of_them(tmp_path, first, second, why):
    found = prepared(tmp_path, Mixed(), (X, first, ["a", 1]), (X, second, ["b", 2]))
    assert found.narrow.startswith(why)
    assert routes.narrow("", (), found) == found.narrow


class Averaged(nn.Module):
    """Divides by a number that is given."""

    def forward(self, x: torch.Tensor, rows: int, unread: int = 6) -> torch.Tensor:
        return x.sum(0, keepdim=True) / rows


@pytest.mark.parametrize(
    ("calls", "why"),
    [
        ([(X, 6), (X + 1, 6)], "right for batch=6 only: forward reads rows, which is as large and not a tensor; give"),
        ([(X, 6), (X[:4], 6)], ""),
        ([(X, 6), (X[:4], 4)], "right for rows=6 only: "),
        ([(X, 7)], ""),
        ([(X, 5)], ""),
    ],
    ids=["as many as rows", "whatever the rows", "with the rows", "another number", "as many as columns"],
)
def test_a_number_as_large_as_the_batch_is_taken_for_its_size_unless_a_batch_shows_otherwise(tmp_path, calls, why):
    found = prepared(tmp_path, Averaged(), *calls)
    assert found.narrow.startswith(why)
    assert bool(found.narrow) == bool(why)


def test_static_shapes_that_fail_alike_are_no_second_reason() -> None:
    def why(folder: str) -> str:
        return f"Load model from source/made/{folder}/model.onnx failed: duplicate name"

    assert routes.also_static(why("onnx.dynamo"), why("onnx.dynamo.static")) == why("onnx.dynamo")
    assert routes.also_static("no such operator", "too large") == "no such operator; with static shapes: too large"


class Learns(nn.Module):
    """Answers with a loss where it is given labels, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(x)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize(("call", "told"), [({"x": X, "labels": torch.arange(6) % 3}, True), ({"x": X}, False)])
def test_targets_and_losses_are_reported_with_the_option_that_leaves_them_out(tmp_path, call, told):
    found = prepared(tmp_path, Learns(), call)
    notes = [note for note in found.notes if note.startswith("forward takes labels and returns loss, as in training")]
    assert [("inputs=<a function of the batch>" in note) for note in notes] == [True] * told
    assert not any("as in training" in note for note in found.notes) or told


# --- what numpy lacks -------------------------------------------------------------------------------------------------


class Narrow(nn.Module):
    """Answers in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).to(torch.bfloat16)


def test_an_output_in_bfloat16_is_float32_in_artifacts_and_judged_as_such(tmp_path):
    found = prepared(tmp_path, Narrow(), X)
    assert "output output_0 is float32 in artifacts, since numpy lacks its dtype in PyTorch" in found.notes
    assert found.spec.outputs[0].dtype == "float32"
    answer, _ = traced(tmp_path, found)
    assert (answer["parity"].passed, answer["elsewhere"]) == (True, "")
    batch, noise = (read_arrays(tmp_path / path) for path in (found.batches[0].path, found.noise))
    reference, limits = {"output_0": batch["output_0"]}, Tolerance.for_precision("float32")
    assert compare({"output_0": reference["output_0"] * np.float32(1 - 2**-8)}, reference, limits, noise).passed
    assert not compare({"output_0": reference["output_0"] * np.float32(0.8)}, reference, limits, noise).passed


# --- what was trained -------------------------------------------------------------------------------------------------


class Cooled(nn.Module):
    """A head whose temperature is no parameter."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.temperature = nn.Linear(5, 3), temperature
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) / self.temperature + self.shift


def shifted() -> Cooled:
    net = Cooled()
    net.shift += 0.1
    return net


@pytest.mark.parametrize(("trained", "same"), [(Cooled(), True), (Cooled(1.01), False), (shifted(), False)])
def test_a_module_that_disagrees_with_training_is_unverified(tmp_path, trained, same):
    found = prepared(tmp_path, Cooled(), X, trained=trained)
    assert (found.undecidable == "") == same
    assert same or "returns other outputs than in training (output_0 is off by" in found.undecidable


class Bent(nn.Module):
    """Has no weights at all, or such as are no real numbers."""

    def __init__(self, by: float, weights: torch.Tensor | None = None) -> None:
        super().__init__()
        self.by = by
        if weights is not None:
            self.weights = nn.Parameter(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**self.by + (self.weights.abs().sum() if hasattr(self, "weights") else 0)


@pytest.mark.parametrize("weights", [None, torch.tensor([1 + 2j, 3 - 1j])], ids=["none", "complex"])
@pytest.mark.parametrize("trained", [2.0, 3.0])
def test_a_module_of_any_weights_is_compared_with_what_was_trained(tmp_path, weights, trained):
    found = prepared(tmp_path, Bent(2.0, weights), X, trained=Bent(trained, weights))
    assert (found.undecidable == "") == (trained == 2.0)
    assert not any("not compared" in note for note in found.notes)


def test_an_output_computed_with_other_weights_is_not_compared_and_noted(tmp_path):
    later = Cooled(5.0)
    with torch.no_grad():
        later.head.weight *= 1.001
    found = prepared(tmp_path, Cooled(), X, trained=later)
    assert found.undecidable == ""
    assert [note for note in found.notes if "the checkpoint has other weights than the module had" in note]


def test_buffers_that_changed_after_the_recorded_call_are_named(tmp_path):
    class Counting(Cooled):
        def __init__(self, count: float) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(count))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + self.count)

    found = prepared(tmp_path, Counting(2.0), X, trained=Counting(1.0))
    assert "buffers (count) had other values in that call than in the checkpoint" in found.undecidable


def test_low_precision_in_training_is_rounding_and_a_temperature_is_not(tmp_path):
    for name, temperature, same in (("same", 1.0, True), ("other", 1.5, False)):
        (tmp_path / name).mkdir()
        with torch.autocast("cpu", torch.bfloat16):
            found = prepared(tmp_path / name, Cooled(), X, trained=Cooled(temperature))
        assert (found.undecidable == "") == same


@pytest.mark.parametrize(("temperature", "same"), [(1.0, True), (1.5, False)])
def test_a_trace_is_compared_with_what_was_trained_too(tmp_path, temperature, same):
    source = tmp_path / "source"
    source.mkdir()
    save_call((X,), {}, source)
    save_traced(Cooled().eval(), None, (X,), {}, source)
    torch.save(Cooled().state_dict(), source / WEIGHTS)
    ask(Cooled(temperature), as_call(X), source)
    assert (reference.make(tmp_path, source, True).undecidable == "") == same


def test_a_forward_that_changes_its_inputs_is_not_compared(tmp_path):
    class InPlace(Cooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    found = prepared(tmp_path, InPlace(), X, trained=InPlace())
    assert found.undecidable == ""
    assert "not compared with the outputs in training: forward changes its own inputs" in found.notes


def test_running_a_module_leaves_it_as_it_was(tmp_path):
    net, state = Keeps(STATES["a count"]).train(), torch.get_rng_state()
    ask(net, as_call(X), tmp_path)
    assert (tmp_path / ANSWER).exists()
    assert net.training
    assert torch.equal(net.state, torch.zeros(5))
    assert torch.equal(torch.get_rng_state(), state)


USERS = """
import torch
SCALE = 1.0
CONFIG = {"scales": [1.0]}
SHIFT = torch.zeros(3)
def bend(x):
    return x
def seven():
    return lambda self, x: self.head(x) * 7
class Net(torch.nn.Module):
    power = 1
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(5, 3)
    def forward(self, x):
        return bend(self.head(x) * SCALE * CONFIG["scales"][0] + SHIFT) ** self.power
"""


def doubled(x):
    return 2 * x


@pytest.mark.parametrize(
    "change", ["SCALE", "CONFIG", "SHIFT", "bend", "Net.power", "Net.forward", "Net.forward, to one of its file"]
)
def test_what_a_script_set_in_an_imported_file_is_set_again(tmp_path, monkeypatch, change):
    name = "users_" + re.sub(r"\W", "_", change)
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    home = importlib.import_module(name)
    values = {
        "SCALE": 3.0,
        "CONFIG": {"scales": [3.0]},
        "SHIFT": torch.ones(3),
        "bend": doubled,
        "Net.power": 3,
        "Net.forward": lambda self, x: self.head(x) - 1,
        "Net.forward, to one of its file": home.seven(),
    }
    value, change = values[change], change.partition(",")[0]
    owner = home.Net if "." in change else home
    attribute = change.rpartition(".")[2]
    net, was = home.Net(), vars(owner)[attribute]
    setattr(owner, attribute, value)
    source = saved(tmp_path, net, X, trained=net)
    expected = net(X).detach().numpy()
    setattr(owner, attribute, was)  # as a worker imports it
    found = reference.make(tmp_path, source, True)
    assert found.undecidable == ""
    assert found.notes == (f"global variables were set to their values in training: {name}.{change}",)
    np.testing.assert_allclose(np.load(tmp_path / "validation_batch.npz")["output_0"], expected, rtol=1e-5)
    setattr(owner, attribute, was)
    snapshot.load(source)
    assert vars(owner)[attribute] is not was, "every later worker sets it too"


def test_a_script_that_changes_a_package_makes_everything_unverified(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Linear(5, 3), nn.GELU())
    relu = nn.functional.relu
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "gelu", lambda x, approximate: relu(x))
        source = saved(tmp_path, net, X, trained=net)
    assert "returns other outputs than in training" in reference.make(tmp_path, source, True).undecidable
