"""What the training thread pays per new best, against a callback that exports in process.

    python tests/benchmarks/stall.py [--sizes 1 25 100] [--bests 20] [--naive 2] [--accelerator gpu]

Every run is a process of its own. Its time is all that is spent in the callback's hooks around one new best while
earlier exports run beside training; `capture` is what the first validation batch costs, once. `naive` is a callback
that converts right there, without proving anything: by PyTorch's exporters and OpenVINO's, in turn where there are
more formats than those four.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from training import FORMATS, Timed, accelerator_option, fit, in_process

COLUMNS = ("parameters", "formats", "p50 ms", "p95 ms", "max ms", "capture ms", "naive p50 ms", "naive max ms")


class Leaving(Timed):
    """Leaves before the exports are done, which is not measured."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.teardown(trainer, pl_module, "fit")


class Naive(Callback):
    """Exports each new best in the training process."""

    def __init__(self, formats: int) -> None:
        self.formats = formats
        self.stalls_ms: list[float] = []
        self.capture_ms: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        start = time.perf_counter()
        net = pl_module.net.eval()
        rows = torch.randn(8, net[0].in_features)
        with tempfile.TemporaryDirectory() as folder:
            for convert in itertools.islice(itertools.cycle(CONVERSIONS), self.formats):
                convert(net, rows, str(Path(folder, "model")))
        net.train()
        self.stalls_ms.append((time.perf_counter() - start) * 1e3)


def torchscript(net: Any, rows: torch.Tensor, path: str) -> None:
    torch.jit.trace(net, rows).save(path)


def pt2(net: Any, rows: torch.Tensor, path: str) -> None:
    torch.export.save(torch.export.export(net, (rows,)), f"{path}.pt2")


def onnx(net: Any, rows: torch.Tensor, path: str) -> None:
    torch.onnx.export(net, (rows,), path, dynamo=True, verbose=False)


def openvino(net: Any, rows: torch.Tensor, path: str) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(net, example_input=rows), f"{path}.xml")


CONVERSIONS = (onnx, torchscript, pt2, openvino)


def child(accelerator: str, who: str, millions: str, formats: str, bests: str) -> dict[str, Any]:
    """One training; what it measured."""
    count = int(formats)
    export = Naive(count) if who == "naive" else Leaving(FORMATS[count])
    fit(int(millions), [export], max_epochs=int(bests), accelerator=accelerator)
    return {"stalls_ms": export.stalls_ms, "capture_ms": export.capture_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 25, 100], help="millions of parameters")
    parser.add_argument("--bests", type=int, default=20, help="new bests in each run")
    parser.add_argument("--naive", type=int, default=2, help="new bests in each run that exports in process")
    accelerator_option(parser)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.accelerator, *given.child)))
        return
    on = ("--accelerator", given.accelerator)
    table = Table(*COLUMNS, title="the training thread, per new best")
    for millions in given.sizes:
        for formats in (1, 4, 12):
            found = in_process(__file__, "callback", millions, formats, given.bests, *on)
            p50, p95, most = np.percentile(found["stalls_ms"], [50, 95, 100])
            cells = [f"{p50:.1f}", f"{p95:.1f}", f"{most:.1f}", f"{found['capture_ms'][0]:.0f}", "", ""]
            if given.naive:
                there = in_process(__file__, "naive", millions, formats, given.naive, *on)["stalls_ms"]
                cells[-2:] = [f"{np.median(there):.0f}", f"{max(there):.0f}"]
            table.add_row(f"{millions} M", str(formats), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
