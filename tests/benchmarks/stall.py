"""What the training thread pays: time per new best, memory, and steps per second, with and without the callback.

    python tests/benchmarks/stall.py [--sizes 1 25 100] [--bests 20]

Every run is a process of its own. `stall` is all time spent in the callback's hooks around one new best while earlier
exports run beside training; `capture` is what the first validation batch costs, once; `memory` is the difference of the
resident peaks of two runs of the same training, with and without the callback.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_export import ExportCallback

FORMATS = {0: (), 1: ("onnx",), 4: ("torchscript", "pt2", "onnx", "openvino")}


class Improving(LightningModule):
    """Of about `millions` of parameters; each epoch is better than the one before."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        width = int((millions * 1e6 / 4) ** 0.5)
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
    """Sums up the time in its hooks; leaves before the exports are done, which is not what is measured here."""

    def __init__(self, formats: Any) -> None:
        super().__init__(formats)
        self.stalls_ms: list[float] = []
        self.capture_ms: list[float] = []

    def _look(self, trainer: Any, pl_module: Any) -> None:
        seen, start = self._seen, time.perf_counter()
        super()._look(trainer, pl_module)
        if self._seen is not seen:
            self.stalls_ms.append((time.perf_counter() - start) * 1e3)

    def _capture(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super()._capture(*arguments)
        self.capture_ms.append((time.perf_counter() - start) * 1e3)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()


class Clock(Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.ends.append(time.perf_counter())


def child(millions: int, formats: int, bests: int) -> dict[str, Any]:
    """One training; what it measured."""
    model = Improving(millions)
    rows = torch.randn(16, model.net[0].in_features)
    loader = DataLoader(TensorDataset(rows), batch_size=8)
    export = Timed(list(FORMATS[formats])) if formats else None
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, max_epochs=bests, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(monitor="val_loss"), clock, *([export] if export else [])],
        )  # fmt: skip  # settings that say: nothing but training
        trainer.fit(model, loader, loader)
    return {
        "stalls_ms": export.stalls_ms if export else [],
        "capture_ms": export.capture_ms if export else [],
        "seconds": clock.ends[-1] - clock.ends[0],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measured(millions: int, formats: int, bests: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(millions), str(formats), str(bests)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 25, 100], help="millions of parameters")
    parser.add_argument("--bests", type=int, default=20, help="new bests in each run")
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(*given.child)))
        return
    table = Table(title="the training thread, per new best")
    for column in (
        "parameters",
        "formats",
        "stall p50 ms",
        "stall p95 ms",
        "capture ms",
        "memory MB",
        "time with / without",
    ):
        table.add_column(column, justify="right")
    for millions in given.sizes:
        without = measured(millions, 0, given.bests)
        for formats in (1, 4):
            found = measured(millions, formats, given.bests)
            p50, p95 = np.percentile(found["stalls_ms"], [50, 95])
            added = (found["peak_bytes"] - without["peak_bytes"]) / 1e6
            table.add_row(
                f"{millions} M", str(formats), f"{p50:.1f}", f"{p95:.1f}", f"{found['capture_ms'][0]:.0f}",
                f"{added:+.0f}", f"{found['seconds'] / without['seconds']:.2f}",
            )  # fmt: skip  # a row is a row
    Console().print(table)


if __name__ == "__main__":
    main()
