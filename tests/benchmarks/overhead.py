"""What training pays while exports run beside it: steps per second and memory, with and without the callback.

    python tests/benchmarks/overhead.py [--sizes 1 25] [--rounds 60] [--accelerator gpu]

Two processes that train the same may differ by a third in speed, as their memory happens to lie. So one training goes
on with and without exports by turns, for a few seconds each: without, its trainer has no callback, and all workers are
stopped. `ratio` is that of all steps, with its standard error over the rounds. Steps count from the second epoch on;
with the callback, an export is under way all along, and every second or two there is a new best.
`lasting` is what the callback keeps alive in the training process: bytes of tensors when training ends, less those of a
training that never had it. `resident` and `peak` are the same differences of the whole process's memory, imports
included.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from training import FORMATS, accelerator_option, fit

from lightning_export import ExportCallback

STEPS = 500  # in an epoch, divided by the millions of parameters
WINDOW_SECONDS, SETTLING_SECONDS = 1.5, 0.2
COLUMNS = ("parameters", "formats", "steps/s without", "with", "ratio", "lasting B", "resident MB", "peak MB")


# --- the training -----------------------------------------------------------------------------------------------------


def shared_state(path: Path) -> Any:
    """Three integers that both processes see: the steps so far, and whether training is to end, or not to export."""
    return np.memmap(path, np.int64, "r+", shape=(3,))


class Meter(Callback):
    """Counts steps from the second epoch on, takes `export` out of the trainer by turns, and looks at the memory."""

    def __init__(self, state: Any, export: Callback | None) -> None:
        self.state, self.export = state, export
        self.memory: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.current_epoch:
            self.state[0] += 1
        ends, pauses = map(bool, self.state[1:])
        trainer.should_stop = ends
        if self.export is not None and pauses == (self.export in trainer.callbacks):
            others = [each for each in trainer.callbacks if each is not self.export]
            trainer.callbacks[:] = others if pauses else [self.export, *others]

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


def child(accelerator: str, millions: int, formats: int, state: Path) -> None:
    """Train until told to end, and print what the memory was."""
    torch.manual_seed(0)
    export = Leaving(FORMATS[formats]) if formats else None
    meter = Meter(shared_state(state), export)
    callbacks = [export, meter] if export else [meter]
    fit(millions, callbacks, steps=max(20, STEPS // millions), max_epochs=-1, accelerator=accelerator)
    print(json.dumps(meter.memory))


# --- taking turns -----------------------------------------------------------------------------------------------------


class Training:
    """A training in a process of its own, which can go on without exports."""

    def __init__(self, accelerator: str, millions: int, formats: int, folder: Path) -> None:
        path = folder / str(formats)
        path.write_bytes(bytes(24))
        self.state = shared_state(path)
        command = [sys.executable, __file__, "--accelerator", accelerator, "--child"]
        self.process = subprocess.Popen(
            [*command, *map(str, (millions, formats, path))],
            stdout=subprocess.PIPE,
            stderr=(folder / f"{formats}.log").open("w"),
            text=True,
            start_new_session=True,
        )
        while not self.state[0]:  # until its second epoch has begun
            if self.process.poll() is not None:
                sys.exit(f"a training ended with {self.process.returncode}")
            time.sleep(0.1)

    def rate(self) -> float:
        """Steps per second in a window of time."""
        time.sleep(SETTLING_SECONDS)
        start, before = time.perf_counter(), int(self.state[0])
        time.sleep(WINDOW_SECONDS)
        return (int(self.state[0]) - before) / (time.perf_counter() - start)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it trains without the callback, and no worker runs."""
        self.state[2] = 1
        stopped: dict[int, psutil.Process] = {}
        while new := {each.pid: each for each in self._workers() if each.pid not in stopped}:
            _signal(new, signal.SIGSTOP)  # which may have started others until then
            stopped |= new
        yield
        self.state[2] = 0
        _signal(stopped, signal.SIGCONT)

    def end(self) -> dict[str, int]:
        """What it printed at its end."""
        self.state[1] = 1
        found: dict[str, int] = json.loads(self.process.communicate()[0].splitlines()[-1])
        return found

    def _workers(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found


def _signal(processes: dict[int, psutil.Process], number: signal.Signals) -> None:
    for each in processes.values():
        try:
            each.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def measured(accelerator: str, millions: int, formats: int, rounds: int) -> tuple[str, ...]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        memory = Training(accelerator, millions, 0, Path(folder)).end()
        training = Training(accelerator, millions, formats, Path(folder))
        pairs = []
        for _ in range(rounds):
            with training.alone():
                plain = training.rate()
            pairs.append((plain, training.rate()))
        added = {key: value - memory[key] for key, value in training.end().items()}
    return (
        f"{millions} M",
        str(formats),
        *(f"{statistics.median(each):.3g}" for each in zip(*pairs, strict=True)),
        "{:.2f} ± {:.2f}".format(*ratio(pairs)),
        f"{added['lasting']:+d}",
        f"{added['resident'] / 1e6:+.0f}",
        f"{added['peak'] / 1e6:+.0f}",
    )


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The ratio of the sums of `pairs`, second by first, and its standard error by the jackknife."""

    def of(some: Sequence[tuple[float, float]]) -> float:
        plain, found = map(sum, zip(*some, strict=True))
        return found / plain

    without_one = [of([*pairs[:index], *pairs[index + 1 :]]) for index in range(len(pairs))]
    return of(pairs), (len(pairs) - 1) ** 0.5 * statistics.pstdev(without_one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 25], help="millions of parameters")
    parser.add_argument("--rounds", type=int, default=60, help="how often the two take turns")
    accelerator_option(parser)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        millions, formats, count = given.child
        child(given.accelerator, int(millions), int(formats), Path(count))
        return
    table = Table(*COLUMNS, title="training while exports run beside it")
    for millions in given.sizes:
        for formats in (1, 4, 12):
            table.add_row(*measured(given.accelerator, millions, formats, given.rounds))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
