"""What servers save: the CPU formats of the digits CNN with servers and without, side by side in one run.

    python tests/benchmarks/servers.py [--formats onnx tflite …] [--repeat 2]

Three times are taken of each: until the first best is proven, until a second one of the same run is, and until all are
timed. With servers these are ready before, as after a training that took longer than their imports; how long that took,
and what memory they hold, stands below the table. Toolchains are installed first.
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
from polyexport.capture.flatten import as_call
from polyexport.capture.snapshot import WEIGHTS, save_call, save_module
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


def run(formats: tuple[Format, ...], *, servers: bool) -> tuple[Mapping[str, float], str]:
    """Seconds of each of `TIMES`, and what being ready cost."""
    os.environ[SWITCH] = str(int(servers))
    with tempfile.TemporaryDirectory() as folder, Engine() as engine:
        start = time.perf_counter()
        if servers:
            engine.warm(formats).join()
        ready = f"{time.perf_counter() - start:.1f} s until {len(engine.servers)} servers were ready; they hold "
        ready += f"{sum(each.held_bytes for each in engine.servers) / 1e9:.2f} GB"
        found = []
        for name in ("first", "second"):
            start = time.perf_counter()
            report = engine.submit(request(Path(folder), name, formats)).result()
            found.append(time.perf_counter() - start)
            assert all(each.publishable for each in report.outcomes), report.outcomes
        start = time.perf_counter()
        engine.bench(report)
        return dict(zip(TIMES, (*found, time.perf_counter() - start), strict=True)), ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", help="by default those of the digits example that run here")
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    formats = tuple(FORMATS[name] for name in given.formats) if given.formats else of_the_digits()
    for chain in {chain for chains in plan.toolchains(formats).values() for chain in chains}:
        chain.interpreter(print)
    pairs = []
    for _ in range(given.repeat):  # in turn, so that both see the machine as busy as it is
        without, _nothing = run(formats, servers=False)
        with_servers, ready = run(formats, servers=True)
        pairs.append((without, with_servers))
    table = Table("", "without servers s", "with servers s", "ratio", title=", ".join(each.name for each in formats))
    for name in TIMES:
        off, on = (statistics.median(pair[index][name] for pair in pairs) for index in (0, 1))
        table.add_row(name, f"{off:.1f}", f"{on:.1f}", f"{on / off:.2f}")
    Console().print(table)
    Console().print(ready)


if __name__ == "__main__":
    main()
