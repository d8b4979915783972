"""What the packages share: a few steps of training with the callback in the trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_export import ExportCallback

FORMATS = ("pt2", "torchscript", "onnx", "openvino", "coreml", "saved_model")
STEPS = 3

VERIFIED = dict.fromkeys(FORMATS, "verified")
"""What is right where nothing in the model stands in the way."""


class Task(LightningModule):
    """A network that learns to answer zeros."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.network(*inputs)

    def answer(self, batch: Any) -> torch.Tensor:
        """What the network makes of a batch of the loader."""
        return self(batch)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.answer(batch).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.answer(batch).square().mean(), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(rows: Sequence[Any], batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=batch_size)


def settings(callback: ExportCallback, monitor: str = "val_loss") -> dict[str, Any]:
    """What a trainer needs for a few steps on the CPU, also where a package makes the trainer."""
    return {
        "max_epochs": 1,
        "limit_train_batches": STEPS,
        "limit_val_batches": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": sys.argv[1],
        "callbacks": [callback, ModelCheckpoint(sys.argv[1], monitor=monitor)],
    }


def fit(model: LightningModule, data: DataLoader[Any], callback: ExportCallback) -> None:
    """Train and validate on the same data."""
    Trainer(**settings(callback)).fit(model, data, data)


def main(train: Callable[[ExportCallback], object], **asked: Any) -> None:
    """Run `train` with a callback that exports to `exports` in the folder that the command line names."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train(ExportCallback(FORMATS, into=Path(sys.argv[1], "exports"), bench=False, publish=(), **asked))
