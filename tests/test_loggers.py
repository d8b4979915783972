"""The callback with loggers other than W&B's, read back from what they wrote; and which sink `publish` leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import planted
import runs
from lightning_export import ExportCallback, Wandb
from lightning_export.loggers import sinks
from planted import GOOD
from planted import planted as plant
from polyexport import Report


class OneByOne(Callback):
    """Lets each export finish before the next best can take its place."""

    def __init__(self, export: ExportCallback) -> None:
        self.export = export

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for future in self.export._futures:
            future.result()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Report], TensorBoardLogger, MLFlowLogger, Path]:
    """Two exports of one run, both timed, with three loggers on the trainer."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
        written = TensorBoardLogger(folder)
        tracked = MLFlowLogger(tracking_uri=f"file:{folder}/mlflow")
        export = ExportCallback([GOOD, plant("wrong", planted.wrong)], bench="all")
        callbacks = [ModelCheckpoint(monitor="val_loss", save_top_k=-1), OneByOne(export), export]
        trainer = runs.trainer(folder, callbacks, max_epochs=2, logger=[CSVLogger(folder / "csv"), written, tracked])
        trainer.fit(runs.Scripted([3.0, 2.0]), runs.loader(), runs.loader())
        tracked.experiment.get_run(tracked.run_id)
        yield export.reports, written, tracked, folder


def test_tensorboard_has_each_figure_over_the_checkpoints_and_the_report(run):
    reports, logger, _, _ = run
    found = EventAccumulator(logger.log_dir).Reload()
    latency = found.Scalars("export/good/p50_ms")
    assert [event.step for event in latency] == [4, 8]
    assert [event.value for event in latency] == pytest.approx([each["good"].latency.p50_ms for each in reports])
    assert [event.value for event in found.Scalars("export/good/max_abs_error")] == [0, 0]
    assert found.Scalars("export/eager/speedup")[0].value == 1
    assert "export/wrong/p50_ms" not in found.Tags()["scalars"]
    (text,) = {event.step: event for event in found.Tensors("export/report/text_summary") if event.step == 8}.values()
    assert "| wrong | mismatch |" in text.tensor_proto.string_val[0].decode()


def test_mlflow_has_each_figure_over_the_checkpoints_and_what_agreed(run):
    reports, _, logger, folder = run
    client, best = logger.experiment, reports[-1]
    latency = client.get_metric_history(logger.run_id, "export/good/p50_ms")
    assert [(each.step, each.value) for each in latency] == [
        (4, reports[0]["good"].latency.p50_ms), (8, best["good"].latency.p50_ms),
    ]  # fmt: skip  # rows
    tags = client.get_run(logger.run_id).data.tags
    assert (tags["export/good/state"], tags["export/wrong/state"]) == ("verified", "mismatch")
    (artifacts,) = folder.rglob("artifacts/export")
    files = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert files == {"report.json", "report.md", "manifest.json", "good/model.json"}
    assert (artifacts / "good" / "model.json").read_bytes() == (best.folder / "good" / "model.json").read_bytes()


def test_a_logger_without_a_sink_gets_nothing(run):
    *_, folder = run
    assert list(sinks("auto", [CSVLogger(folder)])) == []
    assert "export" not in "".join(path.read_text() for path in (folder / "csv").rglob("*.csv"))


def test_both_namespaces_of_lightning_have_their_loggers_found(tmp_path):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path)
    assert [sink.__qualname__ for sink in sinks("auto", [logger])] == ["tensorboard.<locals>.publish"]


def test_options_of_a_sink_can_be_given_in_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ExportCallback, "export")
    options = {"registry": "model", "ttl_days": 30, "upload": "all", "tags": ["digits"]}
    publish = [{"class_path": "lightning_export.Wandb", "init_args": options}]
    made = parser.instantiate_classes(parser.parse_object({"export": {"formats": ["onnx"], "publish": publish}}))
    assert made.export.publish == [Wandb(**options)]
    wrong = [{"class_path": "lightning_export.Wandb", "init_args": {"registri": "model"}}]
    with pytest.raises(Exception, match="registri"):
        parser.parse_object({"export": {"formats": ["onnx"], "publish": wrong}})


def test_a_list_of_sinks_is_taken_as_it_is(tmp_path):
    mine = Wandb(run=object())
    assert list(sinks([mine, print], [TensorBoardLogger(tmp_path)])) == [mine, print]
