"""What servers save: the CPU formats of the digits CNN with servers and without, side by side in one run.

    python tests/benchmarks/servers.py [--formats onnx tflite …] [--repeat 2]

Three times are taken of each: until the first best is proven, until a second one of the same run is, and until all are
timed. With servers these are ready before, as after a training that took longer than their imports; how long that took,
and what memory they hold, stands below the table, and both bests of a run whose servers start with the first one.
Toolchains are installed first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import digits

from polyexport import FORMATS, Engine, Format, Request
from polyexport.capture.calls import save_call
from polyexport.capture.flatten import as_call
from polyexport.capture.snapshot import save_module
from polyexport.capture.weights import WEIGHTS
from polyexport.engine import plan
from polyexport.formats import resolve
from polyexport.report.folders import unfinished
from polyexport.workers.servers import SWITCH

TIMES = ("first best proven", "second best proven", "all timed")


def of_the_digits() -> tuple[Format, ...]:
    """What the example exports, as far as this machine can."""
    known = resolve(digits.FORMATS)
    return tuple(each for each in known if not each.uses_gpu and not each.lacks())


def request(parent: Path, name: str, formats: tuple[Format, ...]) -> Request:
    """A new best of the network, captured as a training captures it."""
    net: nn.Module = digits.Digits()
    call = as_call(torch.rand(64, 1, 8, 8))
    work = unfinished(parent)
    save_call(*call, work / "source", 0)
    save_module(net, None, *call, work / "source")
    torch.save(net.state_dict(), work / "source" / WEIGHTS)
    return Request(work, name, formats)


def run(formats: tuple[Format, ...], *, servers: bool, ready: bool = True) -> tuple[Mapping[str, float], str]:
    """Seconds of each of `TIMES`, and what it cost to have the servers ready before."""
    os.environ[SWITCH] = str(int(servers))
    with tempfile.TemporaryDirectory() as folder, Engine() as engine:
        start = time.perf_counter()
        if servers and ready:
            engine.warm(formats).join()
        cost = f"{time.perf_counter() - start:.1f} s until {len(engine.servers)} servers were ready; they hold "
        cost += f"{sum(each.held_bytes for each in engine.servers) / 1e9:.2f} GB"
        found = []
        for name in ("first", "second"):
            start = time.perf_counter()
            report = engine.submit(request(Path(folder), name, formats)).result()
            found.append(time.perf_counter() - start)
            assert all(each.publishable for each in report.outcomes), report.outcomes
        start = time.perf_counter()
        engine.bench(report)
        return dict(zip(TIMES, (*found, time.perf_counter() - start), strict=True)), cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", help="by default those of the digits example that run here")
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    formats = tuple(FORMATS[name] for name in given.formats) if given.formats else of_the_digits()
    for chain in {chain for chains in plan.toolchains(formats).values() for chain in chains}:
        chain.interpreter(print)
    runs = []
    for _ in range(given.repeat):  # in turn, so that all see the machine as busy as it is
        without, _nothing = run(formats, servers=False)
        with_servers, cost = run(formats, servers=True)
        starting, _nothing = run(formats, servers=True, ready=False)
        runs.append((without, with_servers, starting))
    of_run = {name: [statistics.median(each[index][name] for each in runs) for index in range(3)] for name in TIMES}
    table = Table("", "without servers s", "with servers s", "ratio", title=", ".join(each.name for each in formats))
    for name, (off, on, _) in of_run.items():
        table.add_row(name, f"{off:.1f}", f"{on:.1f}", f"{on / off:.2f}")
    Console().print(table)
    Console().print(cost)
    first, second = (of_run[name][2] for name in TIMES[:2])
    Console().print(
        f"with servers that start with the first best, that took {first:.1f} s and the second {second:.1f} s: "
        f"{second / first:.2f}"
    )


if __name__ == "__main__":
    main()
