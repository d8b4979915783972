"""How long all formats take: the engine's workers, against the same steps one after another in one process.

    python tests/benchmarks/overlap.py [--models resnet vit] [--repeat 3]

The steps are the same functions with the same inputs. In one process the imports are paid once and nothing runs side by
side, but a crash would take all with it; the engine pays an import for every step, and runs steps beside each other.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import polyexport
import zoo
from polyexport import FORMATS
from polyexport.capture.flatten import as_call
from polyexport.measure.parity import compare
from polyexport.measure.reference import Reference
from polyexport.serialization import decode
from polyexport.spec import Batch, Runner

NAMES = ("torchscript", "pt2", "onnx", "openvino")


def in_workers(model: str, folder: Path) -> float:
    module, inputs = zoo.build(model)
    start = time.perf_counter()
    report = polyexport.export(module, inputs, NAMES, folder, bench=False)
    seconds = time.perf_counter() - start
    assert all(outcome.state == "verified" for outcome in report.outcomes), report.outcomes
    return seconds


def in_one_process(model: str, folder: Path) -> float:
    """Run this file again as the one process, so that its imports count as the workers' do."""
    command = [sys.executable, __file__, "--inside", model, str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def inside(model: str, folder: Path) -> None:
    import numpy as np
    import torch

    from polyexport.capture import snapshot
    from polyexport.capture.calls import save_call
    from polyexport.measure import reference
    from polyexport.serialization import encode

    source = folder / "source"
    source.mkdir(parents=True)
    module, inputs = zoo.build(model)
    snapshot.save_structure(module, None, source)
    save_call(*as_call(inputs), source)
    torch.save(module.state_dict(), source / "weights.pt")
    found = decode(Reference, encode(reference.make(folder, source, True)))
    places = {"module": source}
    for name in NAMES:
        each = FORMATS[name]
        places[name] = folder / name / each.artifact
        places[name].parent.mkdir()
        each.routes[0].convert(places[each.routes[0].upstream], places[name], found.spec)
        assert each.load is not None
        run = each.load(places[name], found.spec, threads=1)
        for batch in found.batches:
            agree(run, folder, batch, found, np)


def agree(run: Runner, folder: Path, batch: Batch, found: Reference, np: Any) -> None:
    with np.load(folder / batch.path) as arrays:
        answer = run({name: arrays[name] for name in found.spec.input_names})
        reference = {name: arrays[name] for name in found.spec.output_names}
    assert compare(answer, reference, FORMATS["onnx"].limits).passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet", "vit"], choices=[*zoo.GROUND, *zoo.FURTHER])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given.inside[0], Path(given.inside[1]))
        return
    table = Table("model", "workers s", "one process s", "ratio", title=f"{', '.join(NAMES)}: convert and verify")
    for model in given.models:
        folder = Path(tempfile.mkdtemp())
        pairs = [
            (in_workers(model, folder / f"workers{index}"), in_one_process(model, folder / f"one{index}"))
            for index in range(given.repeat)
        ]
        workers, one = (statistics.median(times) for times in zip(*pairs, strict=True))
        table.add_row(model, f"{workers:.1f}", f"{one:.1f}", f"{workers / one:.2f}")
        shutil.rmtree(folder)
    Console().print(table)


if __name__ == "__main__":
    main()
