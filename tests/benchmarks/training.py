"""The training that the benchmarks measure: every epoch is a new best, and every run a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_export import ExportCallback

FORMATS = {
    0: (),
    1: ("onnx",),
    4: ("torchscript", "pt2", "onnx", "openvino"),
    12: (
        "torchscript",
        "pt2",
        "onnx",
        "onnx-opset15",
        "openvino",
        "coreml",
        "executorch",
        "saved_model",
        "graphdef",
        "tfjs",
        "paddle",
        "tensorrt",
    ),
}
"""By their number. What cannot run here is skipped, and costs the training thread the same."""

BATCH, STEPS = 8, 2


class Improving(LightningModule):
    """Of about `millions` of parameters; each epoch is better than the one before."""

    def __init__(self, millions: float) -> None:
        super().__init__()
        width = int((millions * 1e6 / 4) ** 0.5)
        self.width = width
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.log("val_loss", 1.0 / (1 + self.current_epoch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Timed(ExportCallback):
    """Times what its session does in the training thread, in milliseconds."""

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.stalls_ms: list[float] = []
        self.capture_ms: list[float] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        session: Any = self.session
        session.offer = timed(session.offer, self.stalls_ms)
        session.take = timed(session.take, self.capture_ms)


def timed(function: Any, into_ms: list[float]) -> Any:
    """The function, which notes how long each call takes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        answer = function(*args, **kwargs)
        into_ms.append((time.perf_counter() - start) * 1e3)
        return answer

    return call


def accelerator_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accelerator", default="cpu", help="what it trains on, as Lightning's Trainer takes it")


def fit(millions: float, callbacks: Sequence[Callback], *, steps: int = STEPS, **settings: Any) -> Trainer:
    """Train in a folder that is gone afterwards."""
    model = Improving(millions)
    rows = TensorDataset(torch.randn(BATCH * steps, model.width))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(monitor="val_loss"), *callbacks],
            **settings,
        )
        trainer.fit(model, DataLoader(rows, batch_size=BATCH), DataLoader(rows, batch_size=BATCH))
    return trainer


def in_process(script: str, *arguments: object) -> dict[str, Any]:
    """Run `script --child ARGUMENTS`; the JSON object in the last line that it prints."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
