"""One small model in every format that this machine has tools for, exported and loaded in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import polyexport
from polyexport import Report


@dataclass(frozen=True)
class Everything:
    """One model in every format, static; `packets` has what its export sent, where that can be recorded."""

    report: Report
    packets: Path | None
    home: Path


class Small(torch.nn.Module):
    """Its input and its output have the names of two operators; its weights are most of the size of each artifact."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 3, 2, 1)
        self.head = torch.nn.Sequential(torch.nn.Linear(32 * 4 * 4, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8))
        torch.nn.init.ones_(self.head[2].bias)  # four bits would lose outputs near zero

    def forward(self, relu: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"linear": self.head(self.conv(relu).relu().flatten(1))}


def main(folder: str, *formats: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    # one row per call, which is all that some runtimes take; ranges are calibrated with the other three rows
    report = polyexport.export(Small(), x[:1], formats, folder, calibration=x[1:].split(1), dynamic=False, bench=False)
    for outcome in report.outcomes:
        print(outcome.format, outcome.state, outcome.reason)
    polyexport.load(report.folder / "onnx")({"relu": x[:1].numpy()})


if __name__ == "__main__":
    main(*sys.argv[1:])
