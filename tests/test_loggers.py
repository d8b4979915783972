"""Which sink belongs to which logger, and what loggers other than W&B's have when their files are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import written
from lightning_export import ExportCallback, Wandb
from lightning_export.loggers import sinks
from polyexport import Report


@pytest.fixture
def reports(tmp_path: Path) -> list[Report]:
    return written.run(tmp_path / "exports")


def test_tensorboard_has_each_figure_over_the_checkpoints_and_the_report(reports, tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs")
    (sink,) = sinks("auto", [logger])
    sink(reports[-1])
    found = EventAccumulator(logger.log_dir).Reload()
    latency = found.Scalars("export/good/p50_ms")
    assert [event.step for event in latency] == [4, 8]
    assert [event.value for event in latency] == pytest.approx([0.7, 0.5])
    assert found.Scalars("export/eager/speedup")[0].value == 1
    assert "export/wrong/p50_ms" not in found.Tags()["scalars"]
    texts = {event.step: event.tensor_proto for event in found.Tensors("export/report/text_summary")}
    assert "| wrong | mismatch |" in texts[8].string_val[0].decode()


def test_mlflow_has_each_figure_over_the_checkpoints_and_what_agreed(reports, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlflow")
    (sink,) = sinks("auto", [logger])
    sink(reports[-1])
    client, best = logger.experiment, reports[-1].folder
    latency = client.get_metric_history(logger.run_id, "export/good/p50_ms")
    assert [(each.step, each.value) for each in latency] == [(4, 0.7), (8, 0.5)]
    tags = client.get_run(logger.run_id).data.tags
    assert (tags["export/good/state"], tags["export/lost/state"]) == ("verified", "skipped")
    (artifacts,) = tmp_path.glob("mlflow/*/*/artifacts/export")
    files = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert files == {"report.json", "report.md", "report.html", "good/model.json", "static/model.json"}
    assert (artifacts / "good" / "model.json").read_bytes() == (best / "good" / "model.json").read_bytes()


def test_a_busy_machine_is_noted_in_every_logger(reports, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as above
    busy = written.busy(reports[-1])
    board = TensorBoardLogger(tmp_path / "logs")
    flow = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlflow")
    for sink in sinks("auto", [board, flow]):
        sink(busy)
    events = EventAccumulator(board.log_dir).Reload()
    texts = {event.step: event.tensor_proto for event in events.Tensors("export/report/text_summary")}
    assert busy.notes[0].text in texts[8].string_val[0].decode()
    assert [event.step for event in events.Scalars("export/good/speedup")] == [4], "of the one that was timed quietly"
    assert flow.experiment.get_run(flow.run_id).data.tags["export/notes"] == busy.notes[0].text


def test_a_logger_without_a_sink_gets_nothing(tmp_path):
    assert list(sinks("auto", [CSVLogger(tmp_path)])) == []


def test_both_namespaces_of_lightning_have_their_loggers_found(tmp_path):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path)
    assert [sink.__qualname__ for sink in sinks("auto", [logger])] == ["tensorboard.<locals>.publish"]


def test_options_of_a_sink_can_be_given_in_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ExportCallback, "export")
    options = {"registry": "model", "ttl_days": 30, "upload": "all", "tags": ["digits"]}
    publish = [{"class_path": "lightning_export.Wandb", "init_args": options}]
    made = parser.instantiate(parser.parse_object({"export": {"formats": ["onnx"], "publish": publish}}))
    (sink,) = made.export.publish
    assert isinstance(sink, Wandb)
    assert {name: getattr(sink, name) for name in options} == options
    wrong = [{"class_path": "lightning_export.Wandb", "init_args": {"registri": "model"}}]
    with pytest.raises(Exception, match="registri"):
        parser.parse_object({"export": {"formats": ["onnx"], "publish": wrong}})


def test_a_list_of_sinks_is_taken_as_it_is(tmp_path):
    mine = Wandb(run=object())
    assert list(sinks([mine, print], [TensorBoardLogger(tmp_path)])) == [mine, print]


@pytest.mark.parametrize("mode", ["none", "partial", "object", "all"])
def test_a_hydra_configuration_makes_the_callback_with_its_sinks(mode):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    sink = {"_target_": "lightning_export.Wandb", "registry": "model/digits", "tags": ["a"], "upload": "all"}
    given = {"formats": ["onnx"], "dynamic": {"x": {0: "batch"}}, "fail_on": ["failed"], "publish": [sink]}
    config = OmegaConf.create({"_target_": "lightning_export.ExportCallback", **given})
    callback = instantiate(config, _convert_=mode)
    (made,) = callback.publish
    assert isinstance(made, Wandb)
    assert (made.registry, made.tags, made.upload) == ("model/digits", ["a"], "all")
    assert json.loads(json.dumps(callback.options.dynamic)) == {"x": {"0": "batch"}}
    assert list(sinks(callback.publish, [])) == [made]
