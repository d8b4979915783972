"""What training pays while exports run beside it: steps per second and memory, with and without the callback.

    python tests/benchmarks/overhead.py [--sizes 1 25] [--seconds 20] [--accelerator gpu]

Every run is a process of its own and trains for the same time; with the callback, an export is under way all along.
Each run with it stands beside one without it, right before. Steps count from the second epoch on, when an export runs.
`lasting` is what the callback keeps alive in the training process: bytes of tensors when training ends, less those
without it.
`resident` and `peak` are the same differences of the whole process's memory, imports included.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console
from rich.table import Table
from training import FORMATS, accelerator_option, fit, in_process

from lightning_export import ExportCallback

STEPS = 20  # in an epoch: most of the time is training, and yet there is a new best every few seconds at most
COLUMNS = ("parameters", "formats", "steps/s without", "with", "ratio", "lasting B", "resident MB", "peak MB")


class Meter(Callback):
    """Counts steps from the second epoch on, and looks at the memory when training ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.memory: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.current_epoch:
            self.ends.append(time.perf_counter())

    def on_train_end(self, *rest: Any) -> None:
        gc.collect()
        tensors = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _tensors()}
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.memory = {"lasting": sum(tensors.values()), "resident": resident, "peak": peak}


def _tensors() -> list[torch.Tensor]:
    return [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]


class Leaving(ExportCallback):
    """Ends what is under way when training ends, which is not what is measured here."""

    def on_fit_end(self, *rest: Any) -> None:
        self._close()


def child(accelerator: str, millions: int, formats: int, seconds: int) -> dict[str, Any]:
    """One training; what it measured."""
    torch.manual_seed(0)
    meter = Meter()
    export = [Leaving(FORMATS[formats])] if formats else []
    timer = Timer(duration={"seconds": seconds}, verbose=False)
    fit(millions, [meter, timer, *export], steps=STEPS, max_epochs=-1, accelerator=accelerator)
    if len(meter.ends) < 2:
        sys.exit(f"no second epoch in {seconds} s; give more --seconds")
    rate = (len(meter.ends) - 1) / (meter.ends[-1] - meter.ends[0])
    return {"rate": rate, **meter.memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 25], help="millions of parameters")
    parser.add_argument("--seconds", type=int, default=20, help="how long each run trains")
    accelerator_option(parser)
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.accelerator, *given.child)))
        return
    on = ("--accelerator", given.accelerator)
    table = Table(*COLUMNS, title="training while exports run beside it")
    for millions in given.sizes:
        for formats in (1, 4, 12):
            without = in_process(__file__, millions, 0, given.seconds, *on)
            found = in_process(__file__, millions, formats, given.seconds, *on)
            added = {key: found[key] - without[key] for key in ("lasting", "resident", "peak")}
            table.add_row(
                f"{millions} M",
                str(formats),
                f"{without['rate']:.0f}",
                f"{found['rate']:.0f}",
                f"{found['rate'] / without['rate']:.2f}",
                f"{added['lasting']:+d}",
                f"{added['resident'] / 1e6:+.0f}",
                f"{added['peak'] / 1e6:+.0f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
