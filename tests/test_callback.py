"""The callback in a real `Trainer.fit`: what it refuses, what it writes, and that training is not affected."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import WandbLogger

import planted
import runs
import wandb_log
from lightning_export import ExportCallback, Wandb, harmless
from lightning_export.trainer import say
from planted import GOOD, planted as plant
from polyexport import BadRequest, Engine, ExportFailed, Report, Toolchain, UnknownFormat
from polyexport.capture.snapshot import load as load_module
from polyexport.engine import judge, session
from polyexport.engine.session import Session
from polyexport.publish.folder import copy_to


def fit(
    folder: Path,
    callback: Callback | None,
    model: Any = None,
    *,
    epochs: int = 2,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Any:
    model = model or runs.Scripted([3.0, 2.0])
    callbacks = [ModelCheckpoint(monitor="val_loss"), *callbacks, *([callback] if callback else [])]
    trainer = runs.trainer(folder, callbacks, max_epochs=epochs, **settings)
    trainer.fit(model, runs.loader(), runs.loader())
    return trainer


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ["onxx"]}, "no format 'onxx'; did you mean 'onnx'. known formats:"),
        ({"formats": []}, "no formats were given"),
        ({"when": "always"}, "when='always'; known: 'improved', 'fit_end'"),
        ({"fail_on": ["broken"]}, "fail_on=.*known: verified, degraded"),
        ({"fail_on": "failed"}, "give a list of states"),
        ({"timeout": 0}, "timeout=0"),
        ({"workers": 0}, "workers=0"),
        ({"keep": 0}, "keep=0"),
        ({"publish": "wandb"}, "publish='wandb'; give 'auto'"),
        ({"publish": [Wandb(alert=True)], "keep": 1}, "compares with the previous best, of which keep=1 leaves"),
        ({"publish": [Wandb(alert=True)], "when": "fit_end"}, "of which when='fit_end' leaves no export on disk"),
        *(({"formats": value}, "give a list of names|no format ") for value in (None, 3, [["onnx"]], [int])),
        *(({name: 1.5}, f"{name}=1.5; give a whole number") for name in ("keep", "workers", "metric_batches")),
        *(({"calibration_batches": value}, "give a whole number") for value in ("8", None, True)),
        *(({"timeout": value}, "give a number of seconds") for value in ("9", None, True)),
        *(({"dynamic": value}, "give True, False, or the axes of") for value in ("yes", 3, {"x": 0}, {"x": {0: 1}})),
        ({"fail_on": None}, "give a list of states"),
        *(({"publish": value}, "give 'auto'") for value in (None, 3, [3])),
        ({"into": 3}, "into=3; give a folder"),
        ({"monitor": 3}, "monitor=3; give the name of a metric"),
        ({"module": 3}, "module=3; give the name of an attribute"),
        ({"labels": 3}, "labels=3; give a list of strings"),
        ({"bench": "none"}, "bench='none'; known: True, False, 'all'"),
    ],
)
def test_an_invalid_argument_is_refused_at_construction(settings, message):
    with pytest.raises((BadRequest, UnknownFormat), match=message):
        ExportCallback(**({"formats": ["onnx"]} | settings))


def test_a_monitor_that_no_checkpoint_has_is_refused_before_training(tmp_path):
    with pytest.raises(
        BadRequest, match=r"monitor='accuracy': no ModelCheckpoint monitors it; they monitor \['val_loss'\]"
    ):
        fit(tmp_path, ExportCallback([GOOD], monitor="accuracy"))


def test_a_missing_submodule_is_refused_before_training(tmp_path):
    with pytest.raises(BadRequest, match="has no 'backbone'; it has head"):
        fit(tmp_path, ExportCallback([GOOD], module="backbone"))


class Silent(runs.Scripted):
    """Never calls `forward` in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.losses[min(self.validations, 1)])


def test_a_forward_that_validation_never_calls_is_reported_in_the_sanity_check(tmp_path):
    model = Silent([3.0, 2.0])
    with pytest.raises(BadRequest, match=r"forward was not called on the first validation batch.*example_input_array"):
        fit(tmp_path, ExportCallback([GOOD]), model)
    assert float(model.clock) == 0


class Opaque(runs.Scripted):
    """Wraps what it is given in something that no converter can take."""

    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x.tensor if isinstance(x, SimpleNamespace) else x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([SimpleNamespace(tensor=batch[0])], batch_idx)


def test_an_argument_that_no_converter_can_take_is_reported_in_the_sanity_check(tmp_path):
    model = Opaque([3.0, 2.0])
    with pytest.raises(
        BadRequest, match=r"forward's argument x is a SimpleNamespace with tensors in it.* give inputs="
    ):
        fit(tmp_path, ExportCallback([GOOD]), model)
    assert float(model.clock) == 0


def test_without_a_sanity_check_training_goes_on_and_a_warning_is_printed(tmp_path):
    model = Silent([3.0, 2.0])
    with pytest.warns(UserWarning, match="Nothing is exported"):
        fit(tmp_path, ExportCallback([GOOD]), model, num_sanity_val_steps=0)
    assert float(model.clock) == 8


def test_without_validation_the_inputs_of_forward_must_be_given(tmp_path):
    with pytest.raises(BadRequest, match="no validation batch to capture it from"):
        runs.trainer(tmp_path, [ExportCallback([GOOD])], max_epochs=1).fit(runs.Scripted(), runs.loader())


def test_toolchains_are_installed_before_training_or_the_failure_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path / "cache"))
    good = plant("isolated", planted.replay, toolchain=Toolchain("isolated", ("toposort==1.10",)))
    bad = plant("hopeless", planted.replay, toolchain=Toolchain("hopeless", ("toposort==999.0",)))
    callback = ExportCallback([good, bad], when="fit_end", bench=False)
    with pytest.warns(
        UserWarning, match="formats that need hopeless will be skipped: toolchain hopeless cannot be installed"
    ):
        fit(tmp_path, callback, epochs=1)
    isolated, hopeless = callback.reports[0].outcomes
    assert (isolated.state, isolated.toolchain.packages) == ("verified", {"toposort": "1.10"})
    assert hopeless.state == "skipped"
    assert "cannot be installed" in hopeless.reason


def test_training_of_several_epochs_does_not_wait_for_toolchains(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path / "cache"))
    chain = Toolchain("isolated", ("toposort==1.10",))
    installs, begun, had_begun = Toolchain.interpreter, threading.Event(), []

    def once_training_has_begun(self: Toolchain, *arguments: Any, **rest: Any) -> Path:
        had_begun.append(begun.wait(20))
        return installs(self, *arguments, **rest)

    class Begins(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            begun.set()

    monkeypatch.setattr(Toolchain, "interpreter", once_training_has_begun)
    callback = ExportCallback([plant("late", planted.replay, toolchain=chain)], when="fit_end", bench=False)
    trainer = runs.trainer(tmp_path, [ModelCheckpoint(monitor="val_loss"), callback, Begins()], max_epochs=2)
    trainer.fit(runs.Scripted([3.0, 2.0]), runs.loader(), runs.loader())
    assert callback.reports[0]["late"].state == "verified"
    assert had_begun
    assert all(had_begun)


def test_missing_tools_are_reported_before_training(tmp_path):
    far = replace(plant("far", planted.replay), lacks=lambda: "its compiler is not on PATH; it is at its vendor's")
    callback = ExportCallback([far], when="fit_end", bench=False)
    with pytest.warns(UserWarning, match="far will be skipped: its compiler is not on PATH"):
        fit(tmp_path, callback, epochs=1)
    assert callback.reports[0]["far"].state == "verified"  # what the engine then sees is for the engine to judge


# --- what forward takes -----------------------------------------------------------------------------------------------


@pytest.fixture
def first_rows() -> torch.Tensor:
    return next(iter(runs.loader()))[0]


def captured(callback: ExportCallback, folder: Path) -> torch.Tensor:
    (report,) = callback.reports
    return load_module(report.folder / "source").example[0]


def test_the_first_validation_batch_is_captured(tmp_path, first_rows):
    callback = ExportCallback([GOOD], when="fit_end", bench=False)
    fit(tmp_path, callback, epochs=1)
    assert torch.equal(captured(callback, tmp_path), first_rows)
    assert callback.reports[0]["good"].state == "verified"


def test_inputs_may_be_a_function_of_the_batch(tmp_path, first_rows):
    callback = ExportCallback([GOOD], when="fit_end", bench=False, inputs=lambda batch: batch[0] * 2)
    fit(tmp_path, callback, Silent([3.0, 2.0]), epochs=1)
    assert torch.equal(captured(callback, tmp_path), first_rows * 2)


def test_without_validation_inputs_gets_the_first_training_batch(tmp_path, first_rows):
    callback = ExportCallback([GOOD], bench=False, inputs=lambda batch: batch[0])
    runs.trainer(tmp_path, [callback], max_epochs=1).fit(runs.Scripted(), runs.loader())
    assert torch.equal(captured(callback, tmp_path), first_rows)


def test_the_example_input_array_is_the_fallback(tmp_path):
    model = Silent([3.0, 2.0])
    model.example_input_array = torch.ones(2, runs.FEATURES)
    callback = ExportCallback([GOOD], when="fit_end", bench=False)
    fit(tmp_path, callback, model, epochs=1)
    assert torch.equal(captured(callback, tmp_path), torch.ones(2, runs.FEATURES))


def test_a_part_of_the_module_gets_what_it_received(tmp_path):
    callback = ExportCallback([GOOD], when="fit_end", bench=False, module="head")
    fit(tmp_path, callback, epochs=1)
    assert callback.reports[0].model.class_name == "torch.nn.modules.linear.Linear"


class Direct(runs.Scripted):
    """Calls `forward` by its name, which fires no hook."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.forward(batch[0])
        self.log("val_loss", 1.0)


def test_a_direct_call_of_forward_is_captured_and_the_method_restored(tmp_path, first_rows):
    callback = ExportCallback([GOOD], when="fit_end", bench=False)
    model = Direct()
    fit(tmp_path, callback, model, epochs=1)
    assert torch.equal(captured(callback, tmp_path), first_rows)
    assert "forward" not in vars(model)


class Unpicklable(runs.Scripted):
    def __init__(self, losses: Any) -> None:
        super().__init__(losses)
        self.numbers = (number for number in range(3))


def test_a_module_that_cannot_be_pickled_is_traced_in_process_and_the_report_says_so(tmp_path):
    callback = ExportCallback([GOOD, "onnx"], bench=False)
    with pytest.warns(UserWarning, match="cannot be pickled"):
        trainer = fit(tmp_path, callback, Unpicklable([3.0, 2.0]))
    report = callback.reports[-1]
    assert (
        "cannot be pickled (numbers (a generator): TypeError: cannot pickle 'generator' object)" in report.notes[0].text
    )
    assert [outcome.state for outcome in report.outcomes] == ["verified", "verified"]
    weights = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(load_module(report.folder / "source").state_dict()["inner.clock"], weights["clock"])


# --- training is never harmed -----------------------------------------------------------------------------------------


class History(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def outcome_of_training(folder: Path, export: ExportCallback | None) -> tuple[Any, ...]:
    from lightning.pytorch import seed_everything

    seed_everything(3)
    model, history = runs.Noisy(), History()
    callbacks = [ModelCheckpoint(monitor="val_loss"), history, *([export] if export else [])]
    trainer = runs.trainer(folder, callbacks, max_epochs=4)
    trainer.fit(model, runs.loader(shuffle=True), runs.loader())
    optimizer = trainer.optimizers[0].state_dict()["state"]
    states = [tensor for each in optimizer.values() for tensor in each.values()]
    return model.state_dict(), states, history.seen, torch.get_rng_state()


def test_weights_optimizer_metrics_and_random_state_are_bit_identical(tmp_path):
    callback = ExportCallback([GOOD], bench=False)
    with_weights, with_states, with_metrics, with_rng = outcome_of_training(tmp_path / "with", callback)
    weights, states, metrics, rng = outcome_of_training(tmp_path / "without", None)
    assert callback.reports[-1]["good"].state == "verified"
    assert all(torch.equal(weights[name], with_weights[name]) for name in weights)
    assert all(torch.equal(one, other) for one, other in zip(states, with_states, strict=True))
    assert metrics == with_metrics
    assert torch.equal(rng, with_rng)


def test_a_warning_stands_at_the_line_that_called_the_library() -> None:
    with pytest.warns(UserWarning, match="ExportCallback: the disk is full") as seen:
        harmless.warn("the disk is full")
    assert Path(seen[0].filename) == Path(__file__)


def test_fail_on_raises_after_everything_is_written(tmp_path):
    callback = ExportCallback([plant("raises", planted.raises), GOOD], bench=False, fail_on=["failed", "mismatch"])
    with pytest.raises(ExportFailed, match=r"fit finished, but raises is failed: NotImplementedError"):
        fit(tmp_path, callback)
    (report,) = tmp_path.rglob("best/report.json")
    assert Report.load(report.parent)["good"].state == "verified"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell's background jobs ignore it, and so does Lightning once it has seen one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def workers_of(folder: Path) -> list[str]:
    """Command lines of the processes that work in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_an_interrupt_while_fit_waits_for_exports_ends_them(tmp_path, interruptible):
    callback = ExportCallback([plant("hangs", planted.hangs)], bench=False)

    def interrupt() -> None:
        while not (callback.session and "hangs" in callback.session.doing and trainer_done()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    model = runs.Scripted([3.0])

    def trainer_done() -> bool:
        return float(model.clock) == 4

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    told = r"epoch=0-step=4 was interrupted; there is no best until then; to finish it: polyexport resume \S+/exports"
    with pytest.warns(UserWarning, match=told), pytest.raises(SystemExit):
        fit(tmp_path, callback, model, epochs=1)
    assert workers_of(tmp_path) == []


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
def test_a_sink_that_fails_stops_neither_training_nor_other_sinks(tmp_path, error):
    got: list[Report] = []

    def broken(report: Report) -> None:
        raise error("no route to host")

    callback = ExportCallback([GOOD], bench=False, publish=[broken, got.append])
    with pytest.warns(UserWarning, match=f"{error.__name__}: no route to host"):
        fit(tmp_path, callback, epochs=1)
    assert got == callback.reports[-1:]


def test_an_interrupt_while_a_report_is_published_tells_that_the_export_is_complete(tmp_path, interruptible):
    def slow(report: Report) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    told = r"publishing to test_an_interrupt_\w+ was interrupted; the export is complete: \S+/epoch=0-step=4"
    with pytest.warns(UserWarning, match=told), pytest.raises(SystemExit):
        fit(tmp_path, ExportCallback([GOOD], bench=False, publish=[slow]), epochs=1)


def test_an_export_whose_metrics_cannot_be_written_is_published(tmp_path, monkeypatch):
    def save(report: Report) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    got: list[Report] = []
    monkeypatch.setattr(judge.files, "save", save)
    with pytest.warns(UserWarning, match=r"epoch=0-step=4 has no metrics: OSError: .*No space left on device"):
        fit(tmp_path, ExportCallback([GOOD], bench=False, metric_batches=1, publish=[got.append]), epochs=1)
    assert [each["good"].state for each in got] == ["verified"]


def test_an_export_that_cannot_be_timed_is_reported_and_published(tmp_path, monkeypatch):
    """Another run that writes to the same folder may have taken it away by then."""

    def find_nothing(engine: Engine, report: Report, formats: Any) -> Report:
        raise BadRequest("there is no manifest.json")

    got: list[Report] = []
    monkeypatch.setattr(Engine, "bench", find_nothing)
    with pytest.warns(UserWarning, match=r"epoch=0-step=4 is not timed: BadRequest: there is no manifest.json"):
        fit(tmp_path, ExportCallback([GOOD], publish=[got.append]), epochs=1)
    assert [(each["good"].state, each.baseline) for each in got] == [("verified", None)]


def test_averaged_weights_are_exported_where_they_are_averaged(tmp_path):
    callback = ExportCallback([GOOD], bench=False, when="fit_end")
    model = runs.Scripted([3.0, 2.0])
    callbacks = [ModelCheckpoint(monitor="val_loss"), EMAWeightAveraging(decay=0.5), callback]
    trainer = runs.trainer(tmp_path, callbacks, max_epochs=2)
    trainer.fit(model, runs.loader(), runs.loader())
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    exported = load_module(callback.reports[0].folder / "source").state_dict()["inner.clock"]
    assert torch.equal(exported, checkpoint["state_dict"]["clock"])
    assert float(exported) != float(checkpoint["current_model_state"]["clock"])
    assert not [note for note in callback.reports[0].notes if "not compared" in note.text], "it validates the average"


class Rising(runs.Scripted):
    """Adds its epoch, and the number of epochs that it counted itself."""

    epochs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.current_epoch + self.epochs

    def on_train_epoch_start(self) -> None:
        self.epochs += 1


@pytest.mark.parametrize("when", ["improved", "fit_end"])
def test_a_best_that_had_to_wait_is_compared_with_its_own_validation_run(tmp_path, monkeypatch, when):
    """Training has gone on with other weights, attributes and epoch, and the last validation was of those."""
    callback = ExportCallback([GOOD], bench=False, when=when)
    trainer = runs.trainer(tmp_path, [ModelCheckpoint(monitor="val_loss"), callback], max_epochs=3)
    monkeypatch.setattr(Session, "is_free", lambda session: trainer.current_epoch == trainer.max_epochs)
    trainer.fit(Rising([3.0, 2.0, 4.0]), runs.loader(), runs.loader())
    (report,) = callback.reports
    assert report.checkpoint.epoch == 1
    assert report["good"].state == "verified"
    assert [note.text for note in report.notes if "not compared" in note.text] == []


class AveragesOnSave(Callback):
    """Writes other weights than validation had, as an average that is kept aside is written."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["state_dict"] = {name: each / 2 for name, each in checkpoint["state_dict"].items()}


def test_weights_that_only_the_checkpoint_has_are_exported_with_a_note(tmp_path):
    callback = ExportCallback([GOOD], bench=False, when="fit_end")
    callbacks = [ModelCheckpoint(monitor="val_loss"), AveragesOnSave(), callback]
    runs.trainer(tmp_path, callbacks, max_epochs=2).fit(runs.Scripted([3.0, 2.0]), runs.loader(), runs.loader())
    (report,) = callback.reports
    assert report["good"].state == "verified"
    assert [note.kind for note in report.notes if "the checkpoint has other weights than the module had" in note.text]


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_an_offline_wandb_run_holds_what_agreed_and_a_table_of_all(tmp_path):
    logger = WandbLogger(project="runs", save_dir=tmp_path, log_model=True)  # offline by the environment of the tests
    formats = [GOOD, plant("wrong", planted.wrong), plant("static", planted.static_only)]
    callback = ExportCallback(formats, bench="all")
    callbacks = [ModelCheckpoint(monitor="val_loss"), runs.OneByOne(callback), callback]
    trainer = runs.trainer(tmp_path, callbacks, max_epochs=2, logger=logger)
    trainer.fit(runs.Scripted([3.0, 2.0]), runs.loader(), runs.loader())
    assert [each["good"].latency is not None for each in callback.reports] == [True, True]
    run_id, best = logger.experiment.id, callback.reports[-1]
    logger.experiment.finish()
    wandb.teardown()  # its service would serve the processes of later tests too, from this folder
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run = wandb_log.read(path)

    exported, checkpoint = [f"model-{run_id}-good", f"model-{run_id}-static"], f"model-{run_id}"
    assert [each.name for each in run.artifacts] == [*exported, checkpoint]
    good = run.artifacts[0]
    assert good.type == "model"
    fastest = {"fastest"} if best.fastest else set()  # nothing is, on a busy machine: see test_latency.py
    assert set(good.aliases) == {"latest", "best", "parity-passed"} | fastest
    assert list(good.files) == ["model.json"]
    assert good.metadata["checkpoint_sha256"] == best.checkpoint.sha256
    assert good.metadata["parity"]["passed"] is True
    assert good.metadata["latency"]["p50_ms"] == best["good"].latency.p50_ms
    assert good.metadata["score"] == 2.0
    assert good.metadata["source_artifact"] == checkpoint
    assert run.summary["export/good/state"] == "verified"
    assert run.summary["export/wrong/state"] == "mismatch"
    assert run.summary["export/good/p50_ms"] == best["good"].latency.p50_ms
    (row,) = [row for row in run.history if "export/latency/nrows" in row]
    assert row["export/latency/nrows"] == 8
    assert row["trainer/global_step"] == trainer.global_step == 8
    assert str(best.folder).startswith(str(tmp_path / "runs" / run_id / "exports"))


def test_finished_exports_are_copied_to_a_url(tmp_path):
    import fsspec

    callback = ExportCallback([GOOD], bench=False, into="memory://bucket/exports")
    fit(tmp_path, callback)
    memory = fsspec.filesystem("memory")
    name = memory.cat_file("/bucket/exports/best").decode()
    assert name == callback.reports[-1].folder.name
    assert memory.exists(f"/bucket/exports/{name}/good/model.json")
    assert (
        memory.cat_file(f"/bucket/exports/{name}/report.json")
        == (callback.reports[-1].folder / "report.json").read_bytes()
    )
    # the module's code and globals stay here; what a copy is verified with goes along
    manifest = json.loads(memory.cat_file(f"/bucket/exports/{name}/manifest.json"))
    paths = [manifest["noise"], *(batch["path"] for batch in manifest["batches"])]
    data = {f"/bucket/exports/{name}/{path}" for path in paths}
    assert data < set(memory.find("/bucket/exports"))
    assert {file for file in memory.find("/bucket/exports") if "/source/" in file} < data
    copy_to("memory://bucket/whole", source=True)(callback.reports[-1])
    assert memory.exists(f"/bucket/whole/{name}/source/structure.pkl")


def test_the_table_is_printed_at_fit_end(tmp_path, capsys):
    fit(tmp_path, ExportCallback([GOOD, plant("raises", planted.raises)], bench=False))
    printed = capsys.readouterr().out
    assert "verified" in printed
    assert "raises: NotImplementedError: no rule for aten::frobnicate" in printed
    assert f"export: {tmp_path}" in printed
    (page,) = [line.removeprefix("report: ") for line in printed.splitlines() if line.startswith("report: ")]
    assert Path(page).name == "report.html"
    assert "no rule for aten::frobnicate" in Path(page).read_text(encoding="utf-8")
    # what ended while fit waited was said above the table, line by line
    lines = printed.splitlines()
    told = [line for line in lines if re.match(r"epoch=\d-step=\d+ (good|raises) \(", line)]
    assert "good (replay): verified in" in "".join(told)
    assert lines.index(told[0]) < lines.index(next(line for line in lines if "noise" in line or "state" in line))


class Waits(Callback):
    """Lets the second epoch start when the export of the first one has something to say."""

    def __init__(self, export: ExportCallback) -> None:
        self.export = export

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        end = time.monotonic() + 300  # beside other programs a worker of the lowest priority hardly runs
        while trainer.current_epoch == 1 and not self.export.session.told and time.monotonic() < end:
            time.sleep(0.05)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        print("training is over")


def test_a_format_that_finishes_during_training_is_reported_during_training(tmp_path, capsys):
    export = ExportCallback([GOOD], bench=False)
    runs.trainer(tmp_path, [ModelCheckpoint(monitor="val_loss"), export, Waits(export)], max_epochs=2).fit(
        runs.Scripted([3.0, 4.0]), runs.loader(), runs.loader()
    )
    lines = capsys.readouterr().out.splitlines()
    (told,) = [line for line in lines if line.startswith("epoch=0-step=4 good (replay): verified in")]
    assert lines.index(told) < lines.index("training is over")


class Says(Callback):
    def __init__(self, export: ExportCallback) -> None:
        self.export = export

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.export.session.told.append(f"batch {batch_idx} [of] good: verified")


@pytest.mark.parametrize("bar", [TQDMProgressBar(), TQDMProgressBar(refresh_rate=0), RichProgressBar(), None])
def test_messages_have_their_own_lines_next_to_each_progress_bar(tmp_path, capsys, bar):
    export = ExportCallback([GOOD])
    callbacks = [ModelCheckpoint(monitor="val_loss"), export, Says(export), *([bar] if bar else [])]
    fitted = runs.trainer(
        tmp_path, callbacks, max_epochs=1, num_sanity_val_steps=0, enable_progress_bar=bar is not None
    )
    with pytest.warns(UserWarning, match="Nothing is exported"):
        fitted.fit(Silent([3.0]), runs.loader(), runs.loader())
    lines = [line.strip() for line in re.split(r"[\r\n]", capsys.readouterr().out)]
    assert [line for line in lines if "good" in line] == [f"batch {index} [of] good: verified" for index in range(4)]


def test_a_closed_output_keeps_no_line(monkeypatch):
    lines = deque(["one", "two"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sys.stdout.close()
    say(SimpleNamespace(progress_bar_callback=None), lines)
    assert not lines


class Sheds(runs.Scripted):
    """The exported part goes during training, as a head for pretraining does."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            self.body = self.head
            del self.head
            self.forward = lambda x: self.body(x) + self.clock


def test_a_part_that_is_gone_does_not_end_training(tmp_path):
    callback = ExportCallback([GOOD], module="head", bench=False)
    with pytest.warns(UserWarning, match="failed, training goes on: BadRequest: module='head': Sheds has no 'head'"):
        trainer = fit(tmp_path, callback, Sheds([3.0, 2.0, 1.0]), epochs=3)
    assert trainer.global_step == 12


class Stops(Callback):
    """The program's own handler of a signal, which came while the callback was at work."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(77))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        signal.signal(signal.SIGUSR1, self.before)


def kill_me(report: Report) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_what_a_handler_of_a_signal_raises_is_for_the_program(tmp_path, capfd):
    with pytest.raises(SystemExit, match="77"):
        fit(tmp_path, ExportCallback([GOOD], publish=[kill_me], bench=False), epochs=1, callbacks=[Stops()])


class Cooling(runs.Scripted):
    """Changes its answers by an attribute and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__([1.0, 0.5])
        self.temperature = 1.0
        self.register_buffer("shift", torch.zeros(runs.CLASSES), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.temperature + self.shift

    def on_train_epoch_start(self) -> None:
        self.temperature += 1
        self.shift += 1


def test_other_state_that_training_changes_is_exported_as_of_the_checkpoint(tmp_path):
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False, when="fit_end")
    module = Cooling()
    fit(tmp_path, callback, module)
    (report,) = callback.reports
    assert report["good"].state == "verified"
    assert module.temperature == 3.0
    with np.load(report.folder / "validation_batch.npz") as batch:
        expected = module.eval()(torch.from_numpy(batch["x"])).detach().numpy()
        np.testing.assert_allclose(batch["output_0"], expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1e9])
def test_each_change_is_exported_or_told_however_long_the_module_takes_to_pickle(tmp_path, monkeypatch, share):
    monkeypatch.setattr(session, "_CHEAP_SECONDS", 0.0)
    monkeypatch.setattr(session, "_CHEAP_SHARE", share)
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False)
    fit(tmp_path, callback, Cooling(), epochs=2)
    report = callback.reports[-1]
    notes = [note.text for note in report.notes if "some have them as they were before" in note.text]
    assert (report["good"].state, len(notes)) == (("unverified", 1) if share == 0.0 else ("verified", 0))


def test_globals_that_training_changes_are_exported_as_of_the_checkpoint(tmp_path, monkeypatch):
    code = """
    import runs
    CONFIG = {"by": 1.0}
    class Net(runs.Scripted):
        def forward(self, x):
            return super().forward(x) * CONFIG["by"]
        def on_train_epoch_start(self):
            CONFIG["by"] += 1
    """
    (tmp_path / "net_with_globals.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("net_with_globals")
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False, when="fit_end")
    fit(tmp_path, callback, net.Net([1.0, 0.5]))
    (report,) = callback.reports
    assert report["good"].state == "verified"
    told = "global variables were set to their values in training: net_with_globals.CONFIG"
    assert told in [note.text for note in report.notes]


class Scheduled(runs.Scripted):
    """Changes after each validation, and asks its trainer for the epoch."""

    def __init__(self) -> None:
        super().__init__([1.0, 0.5])
        self.temperature = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.current_epoch) / self.temperature

    def on_train_epoch_end(self) -> None:
        self.temperature += 1


def test_what_changes_between_validation_and_checkpoint_is_exported_as_it_is_in_the_checkpoint(tmp_path):
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False)
    fit(tmp_path, callback, Scheduled())
    report = callback.reports[-1]
    assert report["good"].state == "unverified"  # which of both changed the outputs, nobody knows
    assert "attributes, layers or buffers changed after that call" in report["good"].reason
    weights = torch.load(report.folder / "source" / "weights.pt", weights_only=True)
    plain = runs.Scripted([1.0])
    plain.load_state_dict(weights)
    with np.load(report.folder / "validation_batch.npz") as batch:
        expected = plain.eval()(torch.from_numpy(batch["x"])).detach().numpy() * 2 / 3
        np.testing.assert_allclose(batch["output_0"], expected, rtol=1e-5)


def test_what_a_worker_cannot_rebuild_is_unverified(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: -(x @ weight.T) - bias)
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False)
    fit(tmp_path, callback, epochs=1)
    (report,) = callback.reports
    assert report["good"].state == "unverified"
    assert report["good"].reason.startswith(
        "nothing can be proven: the module rebuilt in a worker returns other outputs"
    )
