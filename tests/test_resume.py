"""A run that is interrupted and goes on: nothing finished is repeated, nothing interrupted is lost."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import faults
import forked
import planted
import runs
from lightning_export import ExportCallback
from polyexport import BadRequest, Report
from polyexport.report.folders import CAPTURE, REQUEST, clear, discard, let_go, lies_elsewhere, locked, unfinished
from polyexport.serialization import read_json, write_json


def fit(folder: Path, callback: Callback, *more: Callback, resume: Path | None = None, epochs: int = 2) -> Any:
    """Losses get worse after the first epoch, so that its checkpoint stays the best one."""
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val_loss", save_last=True)
    trainer = runs.trainer(folder, [checkpoint, callback, *more], max_epochs=epochs)
    model = runs.Scripted([1.0, 2.0, 3.0] if resume is None else [2.0, 3.0])
    trainer.fit(model, runs.loader(), runs.loader(), ckpt_path=resume)
    return trainer


class Stops(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("the power went off")


@pytest.mark.parametrize("into", ["exports", "elsewhere"])
def test_a_finished_export_is_not_repeated_though_the_run_goes_on_in_another_folder(tmp_path, into):
    first = fit(tmp_path, ExportCallback(["torchscript"], bench=False), epochs=1)
    (made,) = tmp_path.rglob("torchscript/model.torchscript")
    before, exports = made.stat().st_mtime_ns, tmp_path / "exports"
    last = Path(first.checkpoint_callback.last_model_path)
    # its state is primitives only, so that Lightning, and the user, may load the checkpoint without running code
    callbacks = torch.load(last, weights_only=True)["callbacks"]
    assert [value for key, value in callbacks.items() if "Export" in key] == [{"folders": [str(exports)]}]

    callback = ExportCallback(["torchscript"], bench=False, into=tmp_path / into)
    fit(tmp_path, callback, resume=last)
    assert [report.folder for report in callback.reports] == [exports / "epoch=0-step=4"]
    assert list(tmp_path.rglob("torchscript/model.torchscript")) == [made]
    assert made.stat().st_mtime_ns == before


INTERRUPTED = pytest.warns(UserWarning, match="was interrupted; there is no best until then")


def test_an_interrupted_export_is_finished_by_the_run_that_goes_on(tmp_path):
    with INTERRUPTED, pytest.raises(RuntimeError, match="the power went off"):
        fit(tmp_path, ExportCallback([planted.planted("hangs", planted.hangs)], bench=False), Stops())
    assert not list(tmp_path.rglob("report.json"))
    callback = ExportCallback(["torchscript"], bench=False)
    fit(tmp_path, callback, resume=next(tmp_path.rglob("last.ckpt")), epochs=3)
    (report,) = callback.reports
    assert report["torchscript"].state == "verified"
    assert (report.checkpoint.epoch, report.checkpoint.score) == (0, 1.0)


def test_the_same_callback_finishes_in_a_second_fit_what_the_first_did_not(tmp_path):
    callback = ExportCallback([planted.GOOD], bench=False)
    checkpoint, stops = ModelCheckpoint(monitor="val_loss", save_last=True), Stops()
    trainer = runs.trainer(tmp_path, [checkpoint, callback, stops], max_epochs=3)
    model = runs.Scripted([1.0, 2.0, 3.0])
    with INTERRUPTED, pytest.raises(RuntimeError, match="the power went off"):
        trainer.fit(model, runs.loader(), runs.loader())
    trainer.callbacks.remove(stops)
    trainer.fit(model, runs.loader(), runs.loader())
    assert [report["good"].state for report in callback.reports] == ["verified"]


def test_two_callbacks_in_one_trainer_keep_their_exports_and_their_state_apart(tmp_path):
    one = ExportCallback([planted.GOOD], bench=False)
    other = ExportCallback([planted.planted("other", planted.replay)], bench=False)
    trainer = fit(tmp_path, one, other, epochs=1)
    assert one.state_key != other.state_key
    folders = [each.reports[-1].folder.parent.name for each in (one, other)]
    assert folders == ["exports", "exports-2"]
    assert Report.load(one.reports[-1].folder)["good"].state == "verified"
    assert Report.load(other.reports[-1].folder)["other"].state == "verified"
    state = torch.load(trainer.checkpoint_callback.last_model_path, weights_only=True)["callbacks"]
    assert {one.state_key, other.state_key} <= state.keys()


def test_two_callbacks_are_distinguished_by_what_their_functions_read(tmp_path):
    unnamed = functools.partial(runs.Scripted.get_submodule, target="head")
    parts = [lambda root: root.head, lambda root: root.clock, unnamed, "head", None]
    callbacks = [ExportCallback([planted.GOOD], module=part) for part in parts]
    assert len({each.state_key for each in callbacks}) == len(parts)
    runs.trainer(tmp_path, callbacks)  # which refuses two of one key


def test_two_callbacks_for_one_folder_are_refused_before_training(tmp_path):
    callbacks = [ExportCallback([name], into=tmp_path / "here") for name in ("onnx", "pt2")]
    with pytest.raises(BadRequest, match=r"two ExportCallbacks write to .*here; give each its own folder"):
        fit(tmp_path, *callbacks)


def test_a_checkpoint_named_best_is_exported_next_to_the_link(tmp_path):
    callback = ExportCallback([planted.GOOD], bench="all")
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="best")
    trainer = runs.trainer(tmp_path, [checkpoint, callback, runs.OneByOne(callback)], max_epochs=2)
    trainer.fit(runs.Scripted([3.0, 2.0]), runs.loader(), runs.loader())
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"best", "best.ckpt"}
    report = Report.load(tmp_path / "exports" / "best")
    assert (report["good"].state, report.checkpoint.score) == ("verified", 2.0)
    assert callback.reports == [report], "the one before it has no folder any more"


class Counts(Callback):
    """Folders of exports under way, before each training batch."""

    most = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.most = max(self.most, len(list(Path("exports").glob(".unfinished-*"))))


def test_two_checkpoints_are_kept_at_most_where_each_step_is_a_new_best_and_the_newest_can_be_resumed(tmp_path):
    counts, hangs = Counts(), planted.planted("hangs", planted.hangs)
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="{step}")
    callbacks = [checkpoint, ExportCallback([hangs], bench=False), counts, Stops()]
    trainer = runs.trainer(tmp_path, callbacks, max_epochs=2, val_check_interval=1)
    with (
        pytest.warns(UserWarning, match="was interrupted") as told,
        pytest.raises(RuntimeError, match="the power went off"),
    ):
        trainer.fit(runs.Scripted([float(loss) for loss in range(20, 0, -1)]), runs.loader(), runs.loader())
    name = Path(checkpoint.best_model_path).stem
    expected = f"the export of {name} was interrupted; there is no best until then; to finish it: polyexport resume "
    assert [str(each.message) for each in told if expected in str(each.message)]
    assert counts.most in (1, 2), "one where the engine had not begun yet"
    assert len(list(Path("exports").glob(".unfinished-*"))) == 1
    assert not list(Path("exports").glob(".capture-*"))


# --- scripts and notebooks --------------------------------------------------------------------------------------------

UNGUARDED = """
import sys
sys.path.insert(0, {tests!r})
with open("starts.txt", "a") as file:
    file.write("started\\n")
import runs, torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_export import ExportCallback

SCALE = 3.0

class Block(torch.nn.Module):
    def forward(self, x):
        return x * SCALE

class Mine(runs.Noisy):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(self.net(x))

trainer = runs.trainer(".", [ModelCheckpoint(monitor="val_loss"), ExportCallback(["torchscript"], bench=False)],
                       max_epochs=1)
trainer.fit(Mine(), runs.loader(), runs.loader())
"""


@pytest.mark.parametrize("how", ["script", "typed"])
def test_classes_of_a_script_without_a_main_guard_and_of_a_notebook_are_exported(tmp_path, how):
    text = UNGUARDED.format(tests=str(Path(__file__).parent / "support"))
    (tmp_path / "train.py").write_text(text)
    # what is typed has no file that a worker could import, as in a notebook
    done = forked.script("-" if how == "typed" else "train.py", cwd=tmp_path, typed=text)
    assert done.returncode == 0, done.stderr[-3000:]
    report = Report.load(tmp_path / "exports" / "best")
    assert (report["torchscript"].state, report.model.class_name) == ("verified", "__main__.Mine")
    assert (tmp_path / "starts.txt").read_text() == "started\n"


# --- a training that is killed ----------------------------------------------------------------------------------------

FORKS = """
import os, sys, time
sys.path.insert(0, {tests!r})
import planted, runs
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_export import ExportCallback

class Forks(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            export.session.hurry()  # training waits, so that nothing else needs the machine
            while "converting" not in export.session.doing.get("waits", ""):
                time.sleep(0.05)
            if os.fork():
                open("forked.txt", "w").close()
            time.sleep(600)

export = ExportCallback([planted.planted("waits", planted.waits_for_leave)], bench=False)
trainer = runs.trainer(".", [ModelCheckpoint(monitor="val_loss"), export, Forks()], max_epochs=2)
trainer.fit(runs.Scripted([3.0]), runs.loader(), runs.loader())
"""


def test_a_killed_training_leaves_no_worker_and_one_export_that_can_be_resumed(tmp_path):
    """Though it has forked a child, which keeps open whatever tells a worker that its parent is there."""
    (tmp_path / "train.py").write_text(FORKS.format(tests=str(Path(__file__).parent / "support")))
    around = os.environ | {"LEAVE": str(tmp_path / "leave"), faults.MARK: str(tmp_path)}
    files = [Path(os.devnull)] * 3
    training = forked.started("train.py", cwd=tmp_path, environment=around, files=files, servers="own")
    assert training.pid is not None
    try:
        wait_until(lambda: (tmp_path / "forked.txt").exists())
        assert any("worker" in each for each in faults.workers_of(tmp_path))
        os.kill(training.pid, signal.SIGKILL)
        training.join()
        wait_until(lambda: not any("worker" in each for each in faults.workers_of(tmp_path)))
    finally:
        os.killpg(training.pid, signal.SIGKILL)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "exports").iterdir()) == [".capture", ".unfinished"]
    (tmp_path / "leave").touch()
    command = (Path(sys.executable).with_name("polyexport"), "resume", tmp_path, "--json")
    done = forked.script(*command, cwd=tmp_path, environment=around)
    assert done.returncode == 0, done.stderr
    assert [outcome["state"] for outcome in json.loads(done.stdout)["outcomes"]] == ["verified"]
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["best", "epoch=0-step=4"]
    again = forked.script(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "has no interrupted export" in again.stderr


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


def test_leftovers_of_killed_runs_are_removed_except_the_newest_export(tmp_path):
    exports = tmp_path / "exports"
    names = ("old", "new")
    for name in names:
        work = unfinished(exports)
        hidden = tmp_path / f".{name}.ckpt.{work.name}"
        hidden.touch()
        lies_elsewhere(work, hidden)
        write_json(work / REQUEST, {"name": name})
        os.utime(work / REQUEST, ns=(names.index(name) + 1,) * 2)
    locked(exports, CAPTURE)
    mine = unfinished(exports)
    for folder in exports.iterdir():
        if folder != mine:
            let_go(folder)
    (exports / ".unfinished-of-an-older-version").mkdir()
    left = clear(exports)
    assert {path.name for path in exports.iterdir()} == {left.name, mine.name}
    assert read_json(left / REQUEST) == {"name": "new"}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f".new.ckpt.{left.name}"]
    done = exports / "done"
    write_json(done / "report.json", {})
    write_json(done / REQUEST, {})
    assert clear(exports) is None, "something newer is complete"
    assert {path.name for path in exports.iterdir()} == {"done", mine.name}
    discard(mine)
