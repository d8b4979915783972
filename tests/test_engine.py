"""The engine end to end on a small module: faults become states, folders are whole, nothing is done twice."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import planted
import polyexport
from planted import GOOD, planted as plant
from polyexport import BadRequest, Engine, Report, Request, Toolchain, export
from polyexport.capture import snapshot
from polyexport.capture.calls import save_call
from polyexport.capture.code import importable, script
from polyexport.engine import earlier
from polyexport.engine.dispatch import _by_value, prepared_with
from polyexport.engine.request import _read, interrupted, interruption
from polyexport.measure.latency import QUIET
from polyexport.report.folders import REQUEST, finished, followed, point_best, take_place, unfinished
from polyexport.report.outcome import Checkpoint, Note
from polyexport.workers import gpu
from polyexport.workers.process import Workers
from polyexport.workers.refusals import NotAgain

TIMEOUT = 15.0  # rebuilding a module takes a few seconds on a busy machine, most of it importing torch


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def request(parent: Path, formats=(GOOD,), *, name="epoch=1", module=None, **more) -> Request:
    work = unfinished(parent)
    module = module or net()
    snapshot.save_structure(module, None, work / "source")
    save_call((torch.randn(4, 5, generator=torch.Generator().manual_seed(1)),), {}, work / "source")
    torch.save(module.state_dict(), work / "source" / "weights.pt")
    return Request(work, name, tuple(formats), checkpoint=Checkpoint(f"{name}.ckpt", epoch=1, global_step=10), **more)


def fixed(each: polyexport.Format) -> polyexport.Format:
    """The format with a first route that takes fixed shapes only."""
    return replace(each, routes=(replace(each.routes[0], static=True), *each.routes[1:]))


FAULTS = (
    plant("segfaults", planted.segfaults),
    plant("hangs", planted.hangs),
    plant("raises", planted.raises),
    plant("wrong", planted.wrong),
    plant("exits", planted.exits),
    plant("quits", planted.quits),
    plant("gets-a-sigterm", planted.gets_a_sigterm),
    plant("writes-nothing", planted.writes_nothing),
    plant("lacks-a-tool", planted.lacks_a_tool),
    plant("runs-nowhere", planted.replay, load=planted.load_nowhere),
    plant("loads-badly", planted.replay, load=planted.load_badly),
    plant("static", planted.static_only),
    plant("behind-static", planted.replay, upstream="static"),
    plant("second-route", planted.wrong, planted.raises, planted.replay),
    plant("lacks-half", planted.replay, planted.raises, planted.calibrates, load=planted.load_without_its_half),
    plant("nothing-to-do", planted.raises, planted.has_nothing_to_do),
    plant("behind-a-fault", planted.replay, upstream="raises"),
    fixed(plant("fixed-first", planted.raises, planted.replay)),
    fixed(plant("fixed-only", planted.replay)),
    GOOD,
)


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Report:
    with Engine(timeout=TIMEOUT) as engine:
        return engine.submit(request(tmp_path_factory.mktemp("faults"), FAULTS)).result()


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("segfaults", "failed", "killed by SIGSEGV"),
        ("hangs", "failed", "timed out after 15 s"),
        ("raises", "failed", "NotImplementedError: no rule for aten::frobnicate"),
        ("wrong", "mismatch", "output_0: 100.000% of the elements are off"),
        ("exits", "failed", "ended with exit code 3 and no result"),
        ("quits", "failed", "SystemExit: 0"),
        ("gets-a-sigterm", "verified", ""),
        ("writes-nothing", "failed", "RuntimeError: the converter ended without an error but wrote no model.json"),
        ("lacks-a-tool", "skipped", "frobnicator is not on PATH; get it from its vendor"),
        ("runs-nowhere", "unverified", "there is no runtime for it on this machine"),
        ("loads-badly", "failed", "the artifact does not run: OSError: the artifact is broken"),
        ("static", "degraded", "static shapes only; with dynamic axes: ValueError: no symbolic batch"),
        ("behind-static", "degraded", "static shapes only; with dynamic axes: made from static, which is failed"),
        ("behind-a-fault", "skipped", "made from raises, which is failed: NotImplementedError"),
        ("fixed-first", "verified", ""),
        ("fixed-only", "degraded", "static shapes only; with dynamic axes: replay: for static shapes only"),
        ("lacks-half", "degraded", "half of its weights in float; raises: failed: NotImplementedError: no rule for"),
        ("nothing-to-do", "failed", "NotImplementedError: no rule for aten::frobnicate"),
        ("good", "verified", ""),
    ],
)
def test_each_fault_of_a_converter_becomes_the_right_state(faults, name, state, reason):
    outcome = faults[name]
    assert outcome.state == state
    assert outcome.reason.startswith(reason)
    assert bool(outcome.reason) == bool(reason)


class Detector(nn.Module):
    """Boxes in pixels beside scores between 0 and 1, in one output."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([640 * self.boxes(x).sigmoid(), (4 * self.scores(x)).sigmoid()], -1)


def test_scores_that_int8_loses_next_to_boxes_are_a_mismatch_and_a_classifiers_are_not(tmp_path):
    coarse = plant("coarse", planted.replay, load=planted.load_in_steps, precision="int8")
    with Engine(timeout=TIMEOUT) as engine:
        detector = engine.submit(request(tmp_path, (coarse, GOOD), name="detector", module=Detector())).result()
        classifier = engine.submit(request(tmp_path, (coarse,), name="classifier")).result()
    assert (detector["coarse"].state, detector["good"].state) == ("mismatch", "verified")
    named = re.search(r"in columns? ([\d, ]+) of axis 1 \(", detector["coarse"].reason)
    assert named is not None, detector["coarse"].reason
    assert set(named[1].split(", ")) <= {"4", "5", "6"}, "of the scores"
    assert classifier["coarse"].state == "verified", classifier["coarse"].reason
    assert 0 < detector["good"].parity.noise_floor < 1e-3


def into_a_folder(source: Path, target: Path, spec: polyexport.ExportSpec) -> None:
    target.mkdir()
    planted.replay(source, target / "model.json", spec)


def load_from_a_folder(path: Path, spec: polyexport.ExportSpec, *, threads: int) -> polyexport.Runner:
    return planted.load(path / "model.json", spec, threads=threads)


def test_an_artifact_may_be_a_folder_and_a_failed_one_leaves_others_alone(tmp_path):
    whole = replace(plant("whole", into_a_folder, load=load_from_a_folder), artifact=".")
    broken = replace(plant("broken", planted.raises, upstream="whole"), artifact=".")
    report = polyexport.export(net(), torch.rand(4, 5), [whole, broken, GOOD], tmp_path / "out", bench=False)
    assert {each.format: each.state for each in report.outcomes} == {
        "whole": "verified",
        "broken": "failed",
        "good": "verified",
    }
    assert report["whole"].artifact.path == "whole"
    assert [path.name for path in (tmp_path / "out" / "whole").iterdir()] == ["model.json"]
    made = {path.name for path in (tmp_path / "out" / "source" / "made").iterdir()}
    assert made == {"whole.into_a_folder", "whole.into_a_folder.static", "good.replay"}


def test_a_route_that_verifies_wins_over_an_earlier_one_with_a_note(faults):
    outcome = faults["second-route"]
    assert (outcome.state, outcome.route, outcome.reason) == ("verified", "replay", "")
    (note,) = (note.text for note in faults.notes if note.kind == "route")  # a route that is static by nature is none
    assert note.startswith("second-route: made by the route replay, since wrong: mismatch")
    assert "raises: failed" in note


def test_verifying_again_leaves_an_outcome_that_still_agrees_unchanged(faults):
    asked = replace(faults, outcomes=(faults["second-route"], faults["static"]))
    with Engine(timeout=TIMEOUT) as engine:
        again = engine.verify(asked, FAULTS)
    assert [(each.state, each.reason) for each in again.outcomes] == [(o.state, o.reason) for o in asked.outcomes]


def test_verifying_again_claims_nothing_that_was_not_run_now(faults, tmp_path):
    report = replace(faults, folder=Path(shutil.copytree(faults.folder, tmp_path / "copy")))
    good = report["good"]
    changed = report.folder / "good" / "model.json"
    asked = (
        replace(good, format="of-another-version"),
        replace(good, artifact=None),
        replace(good, parity=None),
        replace(good, artifact=replace(good.artifact, path="good/removed.json")),
        report["raises"],
    )
    with Engine(timeout=TIMEOUT) as engine:
        unknown, lost, run, removed, never = engine.verify(replace(report, outcomes=asked), FAULTS).outcomes
        text = changed.read_text()
        changed.unlink()  # a link to what it was made from
        changed.write_text(text + " ")  # what it answers stays the same
        other = engine.verify(replace(report, outcomes=(good,)), FAULTS)["good"]
    assert (unknown.state, unknown.parity) == ("unverified", None)
    assert "the format 'of-another-version' is unknown here" in unknown.reason
    assert lost.state == "unverified"
    assert run.state == "verified"
    assert run.parity.passed
    assert (removed.state, removed.parity) == ("failed", None)
    assert never == report["raises"]
    assert other.state == "unverified"
    assert "its SHA-256 differs" in other.reason


def test_an_artifact_without_a_runtime_here_keeps_size_and_hash_when_verified_again(faults, tmp_path):
    report = replace(faults, folder=Path(shutil.copytree(faults.folder, tmp_path / "copy")))
    asked = replace(report, outcomes=(report["runs-nowhere"],))
    with Engine(timeout=TIMEOUT) as engine:
        again = engine.verify(asked, FAULTS)["runs-nowhere"]
        file = report.folder / again.artifact.path
        text = file.read_text()
        file.unlink()  # a link to what it was made from
        file.write_text(text + " ")
        changed = engine.verify(asked, FAULTS)["runs-nowhere"]
    assert again.artifact == report["runs-nowhere"].artifact
    assert again.artifact.bytes
    assert (again.state, changed.state) == ("unverified", "unverified")
    assert "its SHA-256 differs" in changed.reason


def test_a_verified_format_was_run_at_three_batch_sizes(faults):
    sizes = [batch["batch"] for batch in faults["good"].parity.batches]
    assert sizes == [4, 1, 3]
    assert [batch["batch"] for batch in faults["static"].parity.batches] == [4]


def test_a_format_folder_has_only_the_artifact(faults):
    assert [path.name for path in (faults.folder / "good").iterdir()] == ["model.json"]
    assert not (faults.folder / "raises").exists()


def test_the_log_has_what_the_converter_printed(faults):
    assert "NotImplementedError: no rule" in (faults.folder / faults["raises"].log).read_text()


def test_the_validation_batch_holds_the_inputs_and_what_pytorch_answers(faults):
    with np.load(faults.folder / "validation_batch.npz") as arrays:
        expected = net()(torch.from_numpy(arrays["input"])).detach().numpy()
        assert np.allclose(arrays["output_0"], expected, atol=1e-6)


def test_the_manifest_names_signature_and_weights(faults):
    manifest = json.loads((faults.folder / "manifest.json").read_text())
    assert len(manifest["checkpoint"]["sha256"]) == 64
    assert manifest["spec"]["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 5]}]
    assert manifest["artifacts"]["good"]["path"] == "good/model.json"


@pytest.mark.parametrize("name", ["raises", "good"])
def test_the_reproduce_command_works_by_copy_and_paste(faults, name):
    before = sorted(faults.folder.rglob("*"))
    done = subprocess.run(shlex.split(faults[name].reproduce), capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (name == "good")
    assert ("no rule\nfor aten::frobnicate" in done.stderr) == (name == "raises")
    assert sorted(faults.folder.rglob("*")) == before


def test_the_report_says_what_a_reader_asks(faults):
    assert faults.model.class_name == "torch.nn.modules.container.Sequential"
    assert faults.model.parameters == 5 * 8 + 8 + 8 * 3 + 3
    assert faults.checkpoint.global_step == 10
    assert faults.environment["torch"] == metadata.version("torch")
    assert faults["good"].parity.noise_floor > 0
    assert Report.load(faults.folder) == faults


def test_best_points_to_the_newest_export_and_old_ones_are_removed(tmp_path):
    with Engine(timeout=TIMEOUT) as engine:
        for name in ("a", "b", "c"):
            engine.submit(request(tmp_path, name=name, keep=2)).result()
    assert [folder.name for folder in finished(tmp_path)] == ["b", "c"]
    assert (tmp_path / "best").resolve() == tmp_path / "c"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "best", "c"]


def test_the_exports_of_another_run_in_the_same_folder_are_not_counted(tmp_path):
    with Engine(timeout=TIMEOUT) as engine:
        for run, name in (("one", "a"), ("other", "b"), ("other", "c")):
            asked = request(tmp_path, name=name, keep=1)
            engine.submit(replace(asked, checkpoint=Checkpoint(f"{run}/{name}.ckpt", epoch=1, global_step=10))).result()
    assert [folder.name for folder in finished(tmp_path)] == ["a", "c"]


def test_the_same_checkpoint_is_not_exported_twice_but_another_is(tmp_path, monkeypatch):
    known = polyexport.FORMATS["pt2"]
    with Engine(timeout=TIMEOUT) as engine:
        first = engine.submit(request(tmp_path, (known,))).result()
        again = engine.submit(request(tmp_path, (known,))).result()
        (first.folder / "manifest.json").write_text("{}")  # as of a version that wrote other things
        other = engine.submit(request(tmp_path, (known,), module=nn.Linear(5, 3))).result()
    assert again == first
    assert other.checkpoint.sha256 != first.checkpoint.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "epoch=1"]


def test_the_same_weights_are_exported_again_for_other_inputs_or_another_forward(tmp_path):
    """A report of inputs that were never run, or of a forward that was edited since, would be wrong."""
    linear, batch = nn.Linear(5, 5), torch.ones(4, 5)
    asked = [
        (nn.Sequential(linear, nn.LeakyReLU(0.1)), batch),
        (nn.Sequential(linear, nn.LeakyReLU(0.1)), batch),
        (nn.Sequential(linear, nn.LeakyReLU(0.1)), torch.ones(4, 3, 5)),
        (nn.Sequential(linear, nn.LeakyReLU(0.9)), torch.ones(4, 3, 5)),
    ]
    reports = [export(module, inputs, ["pt2"], tmp_path / "export", bench=False) for module, inputs in asked]
    one, same, other_inputs, other_forward = reports
    assert len({each.checkpoint.sha256 for each in reports}) == 1, "the weights are the same"
    assert same == one
    assert other_inputs != same
    assert other_forward != other_inputs
    outputs = polyexport.load(other_forward.folder / "pt2")({"input": np.ones((4, 3, 5), np.float32)})
    expected = asked[-1][0](asked[-1][1]).detach().numpy()
    np.testing.assert_allclose(next(iter(outputs.values())), expected, rtol=1e-5)


def test_a_skipped_format_is_tried_again_once_its_tool_is_installed(tmp_path, monkeypatch):
    asked = (replace(polyexport.FORMATS["tensorrt"], lacks=lambda: gpu.missing()),)
    monkeypatch.setattr(earlier, "known", lambda: {"tensorrt": asked[0]})
    monkeypatch.setenv("POLYEXPORT_CACHE", "/dev/null/here")
    monkeypatch.setattr(gpu, "missing", lambda: "there is no GPU")
    folders = []
    with Engine(timeout=TIMEOUT) as engine:
        for there in (False, False, True):
            if there:
                monkeypatch.setattr(gpu, "missing", str)
            made = engine.submit(request(tmp_path, asked)).result()
            folders.append((made["tensorrt"].state, made["tensorrt"].reason, made.folder.stat().st_ino))
    first, second, third = folders
    assert first[:2] == ("skipped", "there is no GPU")
    assert second == first, "all formats would be made anew for one that cannot be"
    assert third != first


def test_a_newer_request_replaces_one_that_waits(tmp_path):
    with Engine(timeout=TIMEOUT) as engine:
        running = engine.submit(request(tmp_path, name="running"))
        while not engine.doing:
            time.sleep(0.01)
        asked = request(tmp_path, name="waiting")
        held = tmp_path / f".weights.{asked.work.name}"  # the folder is on another file system than the checkpoint
        held.touch()
        waiting = engine.submit(replace(asked, held=str(held)))
        newest = engine.submit(request(tmp_path, name="newest"))
        assert running.result().folder.name == "running"
        assert newest.result()["good"].state == "verified"
    assert waiting.cancelled()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "newest", "running"]


def test_best_points_to_the_export_without_symbolic_links_too(faults, tmp_path, monkeypatch):
    def refused(*arguments: object, **more: object) -> None:
        raise OSError("A required privilege is not held by the client")

    shutil.copytree(faults.folder, tmp_path / faults.folder.name)
    monkeypatch.setattr(Path, "symlink_to", refused)
    point_best(tmp_path / faults.folder.name)
    best = tmp_path / "best"
    assert best.is_file()
    assert Report.load(best).folder == tmp_path / faults.folder.name
    assert followed(best / "good") == tmp_path / faults.folder.name / "good"


def test_of_many_exports_that_finish_under_one_name_the_last_stays_complete(tmp_path):
    works = [unfinished(tmp_path) for _ in range(16)]
    for work in works:
        (work / work.name).touch()
    with ThreadPoolExecutor(len(works)) as pool:
        list(pool.map(lambda work: take_place(work, tmp_path / "name"), works))
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    left = [path.name for path in (tmp_path / "name").iterdir() if path.is_file()]
    assert len(left) == 1
    assert left[0] in {work.name for work in works}


def test_an_export_that_another_run_removes_meanwhile_is_missing_without_an_error(tmp_path, monkeypatch):
    for name in ("pruned", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").touch()

    def found_before_it_went(parent: Path, pattern: str) -> list[Path]:
        shutil.rmtree(tmp_path / "pruned")
        return [tmp_path / name / "report.json" for name in ("pruned", "kept")]

    monkeypatch.setattr(Path, "glob", found_before_it_went)
    assert finished(tmp_path) == [tmp_path / "kept"]


@pytest.mark.parametrize("name", ["", "../model", "a/b", "source", "logs", "module"])
def test_a_format_that_cannot_be_a_folder_of_the_export_is_refused(name):
    with pytest.raises(BadRequest, match="a format cannot be called"):
        plant(name, planted.replay)


def modules_named_in(pickled: bytes) -> set[str]:
    """From where a pickle imports anything."""
    named = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            named.add(module)
            return super().find_class(module, name)

    Reader(io.BytesIO(pickled)).load()
    return named


def test_formats_of_one_module_are_pickled_by_value_from_many_threads_at_once():
    """Who is done must not take away from another, who still pickles, that the module goes by value."""
    formats = [plant(f"f{index}", planted.replay) for index in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            pickled = list(pool.map(_by_value, formats * 25))
    finally:
        sys.setswitchinterval(interval)
    assert "planted" in modules_named_in(pickle.dumps(formats[0])), "by reference it would be seen"
    assert not any("planted" in modules_named_in(each) for each in pickled)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two folders in one step")
def test_replacing_an_export_never_leaves_its_name_without_a_folder(tmp_path):
    take_place(unfinished(tmp_path), tmp_path / "name")
    missing, over = [], threading.Event()

    def look() -> None:
        while not over.is_set():
            missing.append(not (tmp_path / "name" / "source").exists())

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for _ in range(300):
            take_place(unfinished(tmp_path), tmp_path / "name")
        over.set()
        looking.result()
    assert missing
    assert not any(missing)


def test_temporary_files_of_a_killed_worker_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    leaves = "import os, tempfile; print(tempfile.mkdtemp(), flush=True); os.kill(os.getpid(), 9)"
    log = tmp_path / "log"
    ended = Workers().run(
        [sys.executable, "-c", leaves], tmp_path / "job.json", log, timeout=TIMEOUT, environment=os.environ
    )
    assert ended.error == "killed by SIGKILL"
    assert Path(log.read_text().splitlines()[-1]).is_relative_to(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()} | {
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


@pytest.mark.usefixtures("own_servers")
def test_closing_ends_every_worker_and_leaves_one_export_to_be_resumed(tmp_path):
    before = children()
    engine = Engine(timeout=TIMEOUT)
    future = engine.submit(request(tmp_path, (plant("hangs", planted.hangs),)))
    while "hangs" not in engine.doing:
        time.sleep(0.05)
    waiting = engine.submit(request(tmp_path, name="newer"))
    start = time.monotonic()
    left = engine.close()
    assert time.monotonic() - start < TIMEOUT / 2
    assert isinstance(future.exception(), InterruptedError)
    assert waiting.cancelled()
    assert children() == before
    assert list(tmp_path.iterdir()) == [left]
    command = f"polyexport resume {tmp_path}"
    assert (
        interruption(left)
        == f"the export of newer was interrupted; there is no best until then; to finish it: {command}"
    )
    asked = interrupted(tmp_path)
    assert (asked.work, asked.name) == (left, "newer")
    with pytest.raises(BadRequest, match="has no interrupted export"):
        interrupted(tmp_path)  # it is ours by now
    with Engine(timeout=TIMEOUT) as second:
        report = second.submit(asked).result()
    assert (report.folder, report["good"].state) == (tmp_path / "newer", "verified")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "newer"]


def test_an_interrupted_export_that_cannot_be_read_is_reported_without_an_exception(tmp_path):
    work = request(tmp_path).work
    why = interruption(work)
    assert why.startswith(f"an export was interrupted, and cannot be finished: {work / REQUEST} cannot be read")
    assert why.endswith("; there is no best until then")
    with pytest.raises(BadRequest, match="cannot be read"):
        _read(work)


def test_at_most_two_checkpoints_are_kept_however_many_bests_there_are(tmp_path):
    most = 0
    with Engine(timeout=TIMEOUT) as engine:
        engine.submit(request(tmp_path, (plant("hangs", planted.hangs),), name="0"))
        for index in range(1, 12):
            while not engine.supersede():
                time.sleep(0.001)
            engine.submit(request(tmp_path, name=str(index)))
            most = max(most, len(list(tmp_path.glob(".unfinished-*"))))
    assert most == 2
    assert [json.loads(file.read_text())["name"] for file in tmp_path.glob("*/source/request.json")] == ["11"]


def test_a_module_that_cannot_be_rebuilt_fails_every_format_with_the_reason_and_the_best_before_it_stays(tmp_path):
    asked = request(tmp_path, keep=1)
    (asked.work / "source" / "weights.pt").write_bytes(b"not a checkpoint")
    with Engine(timeout=TIMEOUT) as engine:
        before = engine.submit(request(tmp_path, name="before")).result()
        report = engine.submit(asked).result()
    assert report["good"].state == "failed"
    assert report["good"].reason.startswith("the module cannot be rebuilt: ")
    assert (tmp_path / "best").resolve() == before.folder
    assert Report.load(tmp_path / "best")["good"].state == "verified"


class InPlace(nn.Module):
    """Normalizes its input in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sub_(3.0).square().sum(-1)


def test_a_forward_that_changes_its_inputs_in_place_is_judged_on_what_they_were(tmp_path):
    with Engine(timeout=TIMEOUT) as engine:
        report = engine.submit(request(tmp_path, module=InPlace())).result()
    assert report["good"].state == "verified"
    expected = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    with np.load(report.folder / "validation_batch.npz") as batch:
        assert np.array_equal(batch["x"], expected)
        assert np.allclose(batch["output_0"], (expected - 3).square().sum(-1))


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(5)


def test_a_forward_that_draws_random_numbers_is_unverified(tmp_path):
    formats = plant("wrong", planted.wrong), plant("raises", planted.raises)
    with Engine(timeout=TIMEOUT) as engine:
        report = engine.submit(request(tmp_path, formats, module=Drawing())).result()
    assert [report[each.name].state for each in formats] == ["unverified", "failed"]
    for each, begin in zip(formats, ("nothing can be proven: ", ".*; nor could it be proven: "), strict=True):
        assert re.match(
            f"{begin}forward returns different outputs for the same inputs in eval mode: it draws random numbers "
            r"without a seed \(test_engine.py:\d+; draw them from torch.Generator\(\).manual_seed\(…\) in forward, or "
            "make them an input",
            report[each.name].reason,
        )


class Fixed(nn.Module):
    """Cannot run at another batch size than four."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, 5).sum(-1)


def test_a_module_with_a_fixed_batch_is_degraded(tmp_path):
    with Engine(timeout=TIMEOUT) as engine:
        report = engine.submit(request(tmp_path, module=Fixed())).result()
    assert report["good"].state == "degraded"
    assert "PyTorch itself fails at batch=" in report["good"].reason


class Graph(nn.Module):
    """Cannot run with fewer rows than four, to which it refers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x[3]


def test_a_graph_that_may_only_grow_is_verified_as_it_grows(tmp_path):
    with Engine(timeout=TIMEOUT) as engine:
        report = engine.submit(request(tmp_path, module=Graph())).result()
    assert report["good"].state == "verified"
    assert [sizes["batch"] for sizes in report["good"].parity.batches] == [4, 5, 6]


def test_impossible_bounds_are_an_error():
    with pytest.raises(BadRequest, match="workers=0"):
        Engine(workers=0)


def test_dynamic_axes_may_be_named_by_input(tmp_path):
    axes = {"input": {0: "rows"}}
    with Engine(timeout=TIMEOUT) as engine:
        good = engine.submit(request(tmp_path, name="good", dynamic=axes)).result()
        bad = engine.submit(request(tmp_path, name="bad", dynamic={"image": {0: "rows"}})).result()
    assert good.model.inputs[0].shape == ("rows", 5)
    assert bad["good"].reason == "dynamic names the input 'image'; forward received input"


def test_latency_is_measured_beside_eager_pytorch(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYEXPORT_CACHE", "/dev/null/here")
    nowhere = Toolchain("nowhere", ("toposort==0.1",))
    with Engine(timeout=TIMEOUT) as engine:
        formats = (GOOD, plant("dies", planted.replay, load=planted.load_once), plant("moved", planted.replay))
        report = engine.submit(request(tmp_path, formats)).result()
        timed = engine.bench(report, (*formats[:2], replace(formats[2], runtime=nowhere)))
    assert report["good"].latency is None
    latency = timed["good"].latency
    assert latency.samples == timed.baseline.samples == 100
    assert latency.batch == 4
    assert latency.batch_1_p50_ms > 0
    assert timed.baseline.batch_1_p50_ms > 0
    if max(latency.waited, timed.baseline.waited, 0.0 if timed.is_quiet else 1.0) <= QUIET:
        assert latency.speedup == pytest.approx(timed.baseline.p50_ms / latency.p50_ms)
    else:  # the tests have not the machine to themselves
        assert latency.speedup is None
    assert latency.peak_memory_bytes > 1_000_000
    assert 0 <= latency.waited <= 1
    assert timed["dies"].latency is None
    moved, dies = (
        note.text for note in timed.notes if note.text.startswith("no latency")
    )  # the machine may be busy too
    assert moved.startswith("no latency of moved: ToolMissing: toolchain nowhere cannot be installed")
    assert dies == "no latency of dies: its runtime ended while it was timed, see logs/dies.log"
    assert Report.load(report.folder) == timed


def test_interrupted_timing_is_reported(faults, tmp_path):
    report = replace(faults, folder=Path(shutil.copytree(faults.folder, tmp_path / "copy")))
    engine = Engine(timeout=TIMEOUT)
    engine.close()  # as Ctrl-C does while somebody waits for the figures
    timed = engine.bench(report, FAULTS)
    assert timed.notes == (*report.notes, Note("latency", "not timed: interrupted"))
    assert timed.outcomes == report.outcomes
    assert Report.load(report.folder).notes == timed.notes


@pytest.mark.parametrize("name", ["plugin.nets", "__mp_main__"], ids=["plugin", "script of a process spawned by DDP"])
def test_a_module_that_was_loaded_by_its_files_name_is_exported(tmp_path, monkeypatch, name):
    """No other process could import it."""
    file = tmp_path / "plugin" / "nets.py"
    file.parent.mkdir()
    file.write_text(
        "from torch import nn\n\nFACTOR = 2.0\n\n\ndef scaled(x):\n    return FACTOR * x\n\n\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return scaled(super().forward(x))\n"
    )
    spec = importlib.util.spec_from_file_location(name, file)
    nets = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, nets)
    spec.loader.exec_module(nets)
    assert not importable(name)
    assert importable("torch.nn.modules.linear")
    with Engine(timeout=TIMEOUT) as engine:
        report = engine.submit(request(tmp_path, module=nets.Net(5, 3))).result()
    assert (report["good"].state, report["good"].reason) == ("verified", "")


def test_an_export_is_timed_beside_pytorch_by_a_process_that_cannot_import_its_module(tmp_path, monkeypatch):
    """As `polyexport bench` and `resume` do, from any folder."""
    (tmp_path / "of_the_user.py").write_text("from torch import nn\n\n\nclass Net(nn.Linear):\n    pass\n")
    with monkeypatch.context() as training:
        training.syspath_prepend(tmp_path)
        module = importlib.import_module("of_the_user").Net(5, 3)
        with Engine(timeout=TIMEOUT) as engine:
            report = engine.submit(request(tmp_path, module=module)).result()
    monkeypatch.delitem(sys.modules, "of_the_user")
    with Engine(timeout=TIMEOUT) as engine:
        assert engine.bench(report, [GOOD]).baseline is not None
    (report.folder / "source" / "jobs" / "prepare.json").write_text("{}")
    assert prepared_with(report.folder) == ()


def test_a_users_module_named_like_a_package_is_pickled_by_value(tmp_path, monkeypatch):
    """In a worker packages come first, and this one is another."""
    (tmp_path / "turtledemo.py").write_text("class Net: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "turtledemo", raising=False)
    import turtledemo

    assert Path(turtledemo.__file__).parent == tmp_path
    assert not importable("turtledemo")
    assert importable("json.decoder")
    assert importable("numpy.linalg")


def test_no_worker_imports_the_script_that_trains_whatever_it_is_called(tmp_path, monkeypatch):
    for name in ("train", "other"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "train.py"))
    assert script() == str((tmp_path / "train.py").resolve())
    finder = NotAgain(script())
    assert finder.find_spec("other") is None
    assert finder.find_spec("json") is None
    with pytest.raises(ModuleNotFoundError, match=r"train is the training script .*train\.py, which is not imported"):
        finder.find_spec("train")
    import train

    assert Path(train.__file__).parent == tmp_path
    assert script() == "", "a program that imports itself may be imported"
    del sys.modules["train"]
