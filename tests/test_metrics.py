"""The user's own metrics for each runtime, against the same formula computed by hand from the checkpoint."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchmetrics
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional

from lightning_export import ExportCallback
from planted import GOOD, planted, wrong
from polyexport import BadRequest, Report, Tolerance
from runs import CLASSES, Noisy, loader

ANYTHING_GOES = Tolerance(rtol=None, atol=None, misses=1.0, cosine=-1.0, top1=0.0)
TURNED = replace(planted("turned", wrong), tolerance=ANYTHING_GOES)
"""Answers the negative of what PyTorch does, and is not judged by it."""


class Judged(Noisy):
    """Logs a `torchmetrics.Metric` too, as most do, and holds its data, of which no copy can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.data = loader().dataset
        self.data.file = threading.Lock()

    def validation_step(self, batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)


def fitted(folder: Path, **settings) -> tuple[ExportCallback, Noisy, torch.Tensor]:
    """The callback, the best checkpoint's module, and what is drawn at random next."""
    seed_everything(0, verbose=False)
    export = ExportCallback(into=folder / "exports", bench=False, **settings)
    checkpoint = ModelCheckpoint(dirpath=folder, monitor="val_loss", save_top_k=-1)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, export],
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    model = Judged()
    trainer.fit(model, loader(shuffle=True), loader())
    drawn = torch.rand(3)
    best = Noisy()
    best.load_state_dict(torch.load(checkpoint.best_model_path)["state_dict"])
    return export, best.eval(), drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    formats = [GOOD, TURNED, "torchscript"]
    return fitted(tmp_path_factory.mktemp("run"), formats=formats, metric_batches=1)


def test_each_runtime_has_the_metrics_that_its_answers_give(run):
    export, best, _ = run
    x, y = next(iter(loader()))
    with torch.no_grad():
        expected = float(functional.cross_entropy(best(x), y))
        turned = float(functional.cross_entropy(-best(x), y))
        accuracy = float((best(x).argmax(-1) == y).float().mean())
        turned_accuracy = float((best(x).argmin(-1) == y).float().mean())
    report = export.reports[-1]
    assert report.notes == ()
    assert report.metrics == {"val_loss": pytest.approx(expected, rel=1e-5), "val_acc": accuracy}
    for name in ("good", "torchscript"):
        assert report[name].metrics == {"val_loss": pytest.approx(expected, rel=1e-5), "val_acc": accuracy}
    assert report["turned"].metrics == {"val_loss": pytest.approx(turned, rel=1e-5), "val_acc": turned_accuracy}
    assert abs(turned - expected) > 0.01


def test_metrics_are_in_the_report_next_to_pytorchs(run):
    report = run[0].reports[-1]
    stored = json.loads((report.folder / "report.json").read_text())
    assert stored["metrics"] == dict(report.metrics)
    assert "| turned | " in (report.folder / "report.md").read_text().split("Validation metrics")[1]


def test_training_leaves_the_same_module_and_random_state_without_them(run, tmp_path):
    _, best, drawn = run
    _, plain, drawn_too = fitted(tmp_path, formats=[GOOD], metric_batches=0)
    assert torch.equal(drawn, drawn_too)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in best.state_dict().items())


def test_a_format_that_cannot_be_validated_gets_a_note(tmp_path):
    """The planted runtime knows the first two batches only."""
    export, *_ = fitted(tmp_path, formats=[GOOD], metric_batches=3)
    report = export.reports[-1]
    assert report.metrics
    assert report["good"].metrics == {}
    (note,) = (note.text for note in report.notes)
    assert note.startswith("no metrics of good: CannotRun: good: AssertionError: inputs that were never run")
    assert Report.load(report.folder) == report


def test_a_negative_number_is_refused_at_construction():
    with pytest.raises(BadRequest, match="metric_batches=-1"):
        ExportCallback(["onnx"], metric_batches=-1)
