"""One small model in every format that this machine has tools for, exported and loaded in a process of its own."""

from __future__ import annotations

import sys

import torch

import polyexport


def main(folder: str, *formats: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 4, 5)
    )
    x = torch.rand(4, 3, 8, 8)
    report = polyexport.export(module, x, formats, folder, dynamic=False, bench=False)
    for outcome in report.outcomes:
        print(outcome.format, outcome.state, outcome.reason)
    polyexport.load(report.folder / "onnx")({"input": x.numpy()})


if __name__ == "__main__":
    main(*sys.argv[1:])
