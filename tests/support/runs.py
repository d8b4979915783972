"""Small Lightning runs whose every number is known in advance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, ROWS = 6, 3, 32


class Scripted(LightningModule):
    """Reports the validation losses it was given, one per validation; its `clock` parameter counts optimizer steps."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        super().__init__()
        self.losses = list(losses)
        self.validations = 0
        self.head = nn.Linear(FEATURES, CLASSES)
        self.clock = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + self.clock

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.clock + 0 * self(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        if self.losses:
            self.log("val_loss", self.losses[min(self.validations, len(self.losses) - 1)])

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Noisy(LightningModule):
    """A classifier with dropout and batch norm: any stray random number would show in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def step(self, batch: Any, name: str) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log(name, loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.step(batch, "train_loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "val_loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class OneByOne(Callback):
    """Lets each export finish before the next best can take its place."""

    def __init__(self, export: Any) -> None:
        self.export = export

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.export.session is not None:
            self.export.session.wait()


def loader(*, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def trainer(folder: Path, callbacks: Sequence[Any], **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | settings))
