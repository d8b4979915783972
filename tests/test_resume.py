"""A run that is interrupted and goes on: nothing finished is repeated, nothing interrupted is lost."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import planted
import runs
from lightning_export import ExportCallback
from polyexport import BadRequest, Report


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


def test_an_interrupted_export_is_finished_by_the_run_that_goes_on(tmp_path):
    with pytest.raises(RuntimeError, match="the power went off"):
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
    with pytest.raises(RuntimeError, match="the power went off"):
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


def test_two_callbacks_are_told_apart_by_what_their_functions_read(tmp_path):
    unnamed = functools.partial(runs.Scripted.get_submodule, target="head")
    parts = [lambda root: root.head, lambda root: root.clock, unnamed, "head", None]
    callbacks = [ExportCallback([planted.GOOD], module=part) for part in parts]
    assert len({each.state_key for each in callbacks}) == len(parts)
    runs.trainer(tmp_path, callbacks)  # which refuses two of one key


def test_two_callbacks_for_one_folder_are_told_before_training(tmp_path):
    callbacks = [ExportCallback([name], into=tmp_path / "here") for name in ("onnx", "pt2")]
    with pytest.raises(BadRequest, match=r"two ExportCallbacks write into .*here; give each a folder of its own"):
        fit(tmp_path, *callbacks)


def test_a_checkpoint_that_is_called_best_is_exported_beside_what_points_to_it(tmp_path):
    callback = ExportCallback([planted.GOOD], bench="all")
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="best")
    trainer = runs.trainer(tmp_path, [checkpoint, callback, runs.OneByOne(callback)], max_epochs=2)
    trainer.fit(runs.Scripted([3.0, 2.0]), runs.loader(), runs.loader())
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"best", "best.ckpt"}
    report = Report.load(tmp_path / "exports" / "best")
    assert (report["good"].state, report.checkpoint.score) == ("verified", 2.0)
    assert callback.reports == [report], "the one before it has no folder any more"


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
    typed, argument = (text, "-") if how == "typed" else (None, "train.py")
    done = subprocess.run(
        [sys.executable, argument], input=typed, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = Report.load(tmp_path / "exports" / "best")
    assert (report["torchscript"].state, report.model.class_name) == ("verified", "__main__.Mine")
    assert (tmp_path / "starts.txt").read_text() == "started\n"
