"""An export is made exactly when a `ModelCheckpoint` wrote a new best, whatever its settings.

The validation losses are scripted, and the parameter `clock` counts optimizer steps, so the expected checkpoints are
known in advance, and each one that was taken can be recognized by its weights. Nothing is exported here: what the
callback hands over is recorded instead.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import planted
import runs
from lightning_export import ExportCallback
from lightning_export.best import bases
from lightning_export.trainer import exports_folder
from polyexport import Report
from polyexport.engine import session, weights
from polyexport.engine.weights import is_written
from polyexport.report.report import history
from polyexport.serialization import write_json


class Recording(ExportCallback):
    """Keeps what would be exported: name, step and the `clock` in the weights that were taken."""

    def __init__(self, **settings: Any) -> None:
        super().__init__([planted.GOOD], bench=False, **settings)
        self.taken: list[tuple[str, int, float]] = []
        self.requests: list[Any] = []
        self.notes: tuple[str, ...] = ()

    def _open(self, trainer: Any, pl_module: Any) -> None:
        super()._open(trainer, pl_module)
        self.session._submit = self._record

    def _record(self, work: Path, name: str, checkpoint: Any, *rest: Any) -> None:
        blob = torch.load(work / "source" / "weights.pt", weights_only=False)
        clock = float(blob.get("state_dict", blob)["clock"])
        self.taken.append((name, checkpoint.global_step, clock))
        self.requests.append(checkpoint)
        self.notes = self.session._notes
        superseded: Future[Any] = Future()
        superseded.cancel()
        self.session._exports[superseded] = name


STEPS = 4  # batches in an epoch


def fit(folder: Path, losses: list[float], *callbacks: Any, **settings: Any) -> Recording:
    recording = Recording(**settings.pop("export", {}))
    settings = {"max_epochs": len(losses)} | settings
    runs.trainer(folder, [recording, *callbacks], **settings).fit(runs.Scripted(losses), runs.loader(), runs.loader())
    return recording


def clocks(recording: Recording) -> list[float]:
    return [clock for _, _, clock in recording.taken]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [4, 8, 16]),
        ({"save_on_train_epoch_end": False}, [4, 8, 16]),
        ({"save_top_k": -1}, [4, 8, 16]),
        ({"save_top_k": 2}, [4, 8, 16]),
        ({"save_weights_only": True}, [4, 8, 16]),
        ({"save_last": True}, [4, 8, 16]),
        ({"mode": "max"}, [4, 12]),
        ({"filename": "same", "enable_version_counter": False}, [4, 8, 16]),
    ],
)
def test_each_new_best_is_taken_once_with_its_own_weights(tmp_path, settings, steps):
    recording = fit(tmp_path, [3.0, 2.0, 5.0, 1.0], ModelCheckpoint(monitor="val_loss", **settings))
    assert [step for _, step, _ in recording.taken] == steps
    assert clocks(recording) == steps


def test_a_checkpoint_in_a_folder_of_its_own_gives_its_whole_name(tmp_path):
    """As a metric that is called `val/loss` makes one."""
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="{epoch}-val/loss={val_loss:.1f}")
    recording = fit(tmp_path, [3.04, 3.02], checkpoint)
    assert [name for name, *_ in recording.taken] == ["epoch=0-val-loss=val_loss=3.0", "epoch=1-val-loss=val_loss=3.0"]
    reports = [
        Report(each, None, (), folder=tmp_path / "exports" / name)
        for (name, *_), each in zip(recording.taken, recording.requests, strict=True)
    ]
    for report in reports:
        report.folder.mkdir(parents=True)
        write_json(report.folder / "report.json", report)
    assert [each.folder.name for each in history(reports[-1])] == [report.folder.name for report in reports]


def test_score_and_monitor_are_the_checkpoints(tmp_path):
    recording = fit(tmp_path, [3.0, 2.0], ModelCheckpoint(monitor="val_loss"))
    assert [(each.monitor, each.score) for each in recording.requests] == [("val_loss", 3.0), ("val_loss", 2.0)]


def test_validation_inside_an_epoch_counts(tmp_path):
    recording = fit(
        tmp_path, [4.0, 3.0, 9.0, 1.0], ModelCheckpoint(monitor="val_loss"), max_epochs=2, val_check_interval=0.5
    )
    assert clocks(recording) == [2, 4, 8]


def test_checkpoints_by_training_steps_count(tmp_path):
    checkpoint = ModelCheckpoint(monitor=None, every_n_train_steps=3)
    assert clocks(fit(tmp_path, [1.0, 1.0], checkpoint)) == [3, 6]


def test_without_a_monitor_the_newest_is_the_best(tmp_path):
    with pytest.warns(UserWarning, match=r"no ModelCheckpoint monitors .* give the trainer ModelCheckpoint\(monitor="):
        assert clocks(fit(tmp_path, [1.0, 2.0, 3.0], ModelCheckpoint())) == [4, 8, 12]


def test_with_a_monitor_nothing_is_said(tmp_path, recwarn):
    fit(tmp_path, [1.0, 2.0], ModelCheckpoint(monitor="val_loss"))
    assert not [each for each in recwarn if "no ModelCheckpoint monitors" in str(each.message)]


def test_without_a_monitor_under_one_name_too(tmp_path):
    checkpoint = ModelCheckpoint(filename="same", enable_version_counter=False)
    assert clocks(fit(tmp_path, [1.0, 2.0], checkpoint)) == [4, 8]


def test_lightnings_own_default_checkpoint_is_followed(tmp_path):
    assert clocks(fit(tmp_path, [1.0, 2.0])) == [4, 8]


def test_save_top_k_zero_gives_the_weights_at_fit_end(tmp_path):
    recording = fit(tmp_path, [2.0, 1.0], ModelCheckpoint(monitor="val_loss", save_top_k=0))
    assert recording.taken == [("epoch=2-step=8", 8, 8.0)]
    assert "there was no best checkpoint on disk" in recording.notes[-1]


def test_no_checkpointing_at_all_gives_the_weights_at_fit_end(tmp_path):
    recording = fit(tmp_path, [2.0, 1.0], enable_checkpointing=False)
    assert clocks(recording) == [8]


def test_among_several_the_one_with_a_monitor_is_followed_or_the_one_named(tmp_path):
    def several() -> list[ModelCheckpoint]:
        last = ModelCheckpoint(filename="last-{step}")
        return [last, ModelCheckpoint(monitor="val_loss"), ModelCheckpoint(monitor="val_loss", mode="max")]

    assert clocks(fit(tmp_path / "a", [3.0, 4.0, 1.0], *several())) == [4, 12]
    named = fit(tmp_path / "b", [3.0, 4.0, 1.0], *several(), export={"monitor": "val_loss"})
    assert clocks(named) == [4, 12]


def test_the_last_best_alone_is_taken_when_asked_for(tmp_path):
    recording = fit(tmp_path, [3.0, 2.0, 5.0], ModelCheckpoint(monitor="val_loss"), export={"when": "fit_end"})
    assert clocks(recording) == [8]


def test_a_checkpoint_that_is_written_in_the_background_is_taken_once_it_is_there(tmp_path):
    recording = fit(tmp_path, [3.0, 2.0, 1.0], ModelCheckpoint(monitor="val_loss"), plugins=[AsyncCheckpointIO()])
    taken = [(name, clock) for name, _, clock in recording.taken]
    assert taken[-1] == ("epoch=2-step=12", 12)
    assert set(taken) <= {("epoch=0-step=4", 4), ("epoch=1-step=8", 8), ("epoch=2-step=12", 12)}


def test_what_training_needs_of_the_disk_is_left_to_it_and_the_best_is_taken_when_fit_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "free_bytes", lambda folder: 1000)
    with pytest.warns(match=r"epoch=0-step=4 is not exported, .* GB are free; this is tried again when fit ends"):
        recording = fit(tmp_path, [3.0, 2.0, 5.0], ModelCheckpoint(monitor="val_loss"))
    assert clocks(recording) == [8]


def test_a_best_that_cannot_be_written_is_tried_once_more_when_fit_ends(tmp_path, monkeypatch):
    tried = []

    def hold(*arguments: Any) -> Any:
        tried.append(arguments)
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return weights.hold(*arguments)

    monkeypatch.setattr(session, "hold", hold)
    with pytest.warns(match="epoch=0-step=4 is not exported, .*: No space left on device; this is tried again"):
        recording = fit(tmp_path, [3.0, 4.0, 5.0], ModelCheckpoint(monitor="val_loss"))
    assert clocks(recording) == [4]
    assert len(tried) == 2


@pytest.mark.parametrize(
    ("written", "is_complete"),
    [
        ({}, False),
        ({"file": b""}, False),
        ({"file": b"PK\x03\x04 and the half of a zip archive"}, False),
        ({"file": b"\x80\x02 and a pickle"}, True),
        ({"folder/": b""}, False),
        ({"folder/__0_0.distcp": b"x"}, False),
        ({"folder/__0_0.distcp": b"x", "folder/.metadata": b"x"}, True),
        ({"folder/shard-0": b"x"}, True),
    ],
)
def test_a_checkpoint_that_is_being_written_is_recognized(tmp_path, written, is_complete):
    for name, content in written.items():
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(content)
    assert is_written(str(tmp_path / next(iter(written), "file").partition("/")[0])) == is_complete
    torch.save({}, tmp_path / "whole.ckpt")
    assert is_written(str(tmp_path / "whole.ckpt"))


def test_the_order_of_the_callbacks_does_not_matter(tmp_path):
    recording = Recording()
    checkpoint = ModelCheckpoint(monitor="val_loss")
    trainer = runs.trainer(tmp_path, [checkpoint, recording], max_epochs=2)
    trainer.fit(runs.Scripted([2.0, 1.0]), runs.loader(), runs.loader())
    assert clocks(recording) == [4, 8]
    assert trainer.checkpoint_callback is checkpoint


def test_two_fits_in_a_row_take_what_is_new(tmp_path):
    recording = Recording()
    trainer = runs.trainer(tmp_path, [ModelCheckpoint(monitor="val_loss"), recording], max_epochs=1)
    model = runs.Scripted([3.0, 2.0])
    trainer.fit(model, runs.loader(), runs.loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, runs.loader(), runs.loader())
    assert clocks(recording) == [4, 8]
    assert not any("Tail" in bases(each) for each in trainer.callbacks)


def test_validate_and_test_take_nothing_and_work(tmp_path):
    recording = Recording()
    trainer = runs.trainer(tmp_path, [ModelCheckpoint(monitor="val_loss"), recording], max_epochs=1)
    model = runs.Scripted([3.0])
    trainer.validate(model, runs.loader(), verbose=False)
    assert recording.taken == []
    trainer.fit(model, runs.loader(), runs.loader())
    model.test_step = model.validation_step
    trainer.test(model, runs.loader(), ckpt_path="best", verbose=False)
    assert len(recording.taken) == 1


def test_a_file_system_without_hard_links_costs_copies(tmp_path, monkeypatch):
    def link(*paths: Any) -> None:
        raise OSError(errno.EPERM, "it has none")

    monkeypatch.setattr(os, "link", link)
    assert clocks(fit(tmp_path, [3.0, 2.0], ModelCheckpoint(monitor="val_loss"))) == [4, 8]


def test_messages_of_one_fit_are_not_repeated_in_the_next(tmp_path):
    recording = fit(tmp_path / "one", [3.0], enable_checkpointing=False)
    assert len(recording.notes) == 1, "there was no ModelCheckpoint"
    checkpoint = ModelCheckpoint(monitor="val_loss")
    trainer = runs.trainer(tmp_path / "other", [recording, checkpoint], max_epochs=1)
    trainer.fit(runs.Scripted([3.0]), runs.loader(), runs.loader())
    assert recording.notes == ()


def test_a_development_run_takes_nothing(tmp_path):
    assert fit(tmp_path, [1.0], ModelCheckpoint(monitor="val_loss"), fast_dev_run=True).taken == []
    assert not list(tmp_path.rglob("exports"))


def test_the_other_namespace_works_the_same(tmp_path):
    import pytorch_lightning

    class Scripted(pytorch_lightning.LightningModule):
        __init__, forward = runs.Scripted.__init__, runs.Scripted.forward
        training_step, validation_step = runs.Scripted.training_step, runs.Scripted.validation_step
        on_validation_epoch_end = runs.Scripted.on_validation_epoch_end
        configure_optimizers = runs.Scripted.configure_optimizers

    recording = Recording()
    checkpoint = pytorch_lightning.callbacks.ModelCheckpoint(monitor="val_loss")
    trainer = pytorch_lightning.Trainer(
        default_root_dir=tmp_path,
        callbacks=[recording, checkpoint],
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_with_parts(Scripted, [3.0, 4.0, 1.0]), runs.loader(), runs.loader())
    assert clocks(recording) == [4, 12]


def _with_parts(kind: Any, losses: list[float]) -> Any:
    model = kind.__new__(kind)
    super(kind, model).__init__()
    model.losses, model.validations = losses, 0
    model.head = torch.nn.Linear(runs.FEATURES, runs.CLASSES)
    model.clock = torch.nn.Parameter(torch.zeros(()))
    return model


def test_the_checkpoint_may_be_deleted_at_once(tmp_path):
    recording = fit(tmp_path, [3.0, 2.0, 1.0], ModelCheckpoint(monitor="val_loss", save_top_k=1))
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1
    assert clocks(recording) == [4, 8, 12]


def test_exports_are_next_to_the_checkpoints_of_the_run(tmp_path):
    recording = Recording()
    trainer = runs.trainer(tmp_path, [ModelCheckpoint(dirpath=tmp_path / "run" / "checkpoints"), recording])
    assert exports_folder(trainer, recording.into, recording.monitor, 0) == tmp_path / "run" / "exports"
