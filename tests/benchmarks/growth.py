"""How cost grows: with the parameters of a model, with the formats asked for, and with the new bests of a run.

    python tests/benchmarks/growth.py [--sizes 1 25 100 1000] [--counts 1 4 8 16] [--bests 1 10 50 200] [--page PAGE]

Every run is a training in a process of its own. A size is exported in four formats, a number of formats at 1 M
parameters, and bests in one format at 1 M. With `--page`, the tables and a picture beside it are written.

Memory is sampled ten times a second: of the training process, of the largest worker, and of all workers together,
where a page that two of them share counts once. Bytes written are those of all processes, and their ratio to the size
of the weights.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from training import Timed, fit, in_process

from polyexport.report.tables import markdown, size

FORMATS = (
    "onnx",
    "torchscript",
    "pt2",
    "openvino",
    "coreml",
    "executorch",
    "saved_model",
    "tflite",
    "graphdef",
    "tfjs",
    "paddle",
    "mnn",
    "ncnn",
    "onnx-fp16",
    "openvino-fp16",
    "onnx-w8",
)
"""The first so many are exported."""

LARGE, SMALL = 4, 1
"""Formats of each size, and of each number of bests."""

MEASURED = """ on 2 cores without a GPU, of perceptrons with four layers whose every epoch is a new best.
Seconds are those from the last training step until `fit` returned, toolchains' imports included; nothing was timed.
Bytes written are those of all processes, Lightning's checkpoints included, and their ratio to the size of the weights.
Memory is the peak: of the training process, of the largest worker, and of all workers together."""
"""How, at the top of the page."""

PICTURE = "![Seconds and memory over parameters, seconds over formats](growth.svg)"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one training took, in seconds and bytes.

    Attributes:
        after: From the last step until `fit` returned.
        stalls: In the callback's hooks of the training thread, in all.
        exports: How many bests came out, in every format.
        written: By all processes.
        training: Peak memory of the training process.
        largest: Peak memory of the largest worker.
        together: Peak memory of all workers.
        kept: In the folder of the exports when training has ended.
    """

    after: float
    stalls: float
    exports: int
    written: int
    training: int
    largest: int
    together: int
    kept: int


class Watch(threading.Thread):
    """Looks at the memory of this process and of those that it started, until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.training = self.largest = self.together = 0
        self._ended = threading.Event()

    def run(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(0.1):
            workers = [use for each in this.children(recursive=True) if (use := shared(each))]
            self.training = max(self.training, this.memory_info().rss)
            self.largest = max(self.largest, *workers, 0)
            self.together = max(self.together, sum(workers))

    def stop(self) -> None:
        self._ended.set()
        self.join()


def shared(process: psutil.Process) -> int:
    """The memory of a process in bytes, its share only of what others have too; 0 if it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


class Whole(Timed):
    """Notes when the last step was made, and looks at the folder when all is done."""

    last = 0.0
    kept = 0

    def on_train_batch_end(self, *rest: Any) -> None:
        self.last = time.perf_counter()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_end(trainer, pl_module)
        found = [file.lstat() for file in Path(trainer.default_root_dir).rglob("*")]
        self.kept = sum({each.st_ino: each.st_size for each in found}.values())


def child(millions: str, formats: str, bests: str) -> dict[str, Any]:
    """One training; what it cost."""
    export = Whole(FORMATS[: int(formats)], bench=False)
    watch = Watch()
    watch.start()
    fit(float(millions), [export], max_epochs=int(bests))
    after = time.perf_counter() - export.last
    watch.stop()
    exports = sum(all(outcome.publishable for outcome in report.outcomes) for report in export.reports)
    written = psutil.Process().io_counters().write_chars  # which has what children wrote that have ended
    stalls = sum(export.stalls_ms) / 1e3
    return asdict(Cost(after, stalls, exports, written, watch.training, watch.largest, watch.together, export.kept))


def cost(millions: float, formats: int, bests: int = 1) -> Cost:
    """What such a training took, in a process of its own."""
    return Cost(**in_process(__file__, millions, formats, bests))


def row(first: Mapping[str, str], of: Cost, millions: float) -> dict[str, str]:
    """The cells that each table has."""
    return {
        **first,
        "after the last step": f"{of.after:.1f} s",
        "written": size(of.written),
        "of the weights": f"{of.written / (millions * 4e6):.1f}×",
        "training process": size(of.training),
        "largest worker": size(of.largest),
        "all workers": size(of.together),
    }


def tables(sizes: Mapping[float, Cost], counts: Mapping[int, Cost], bests: Mapping[int, Cost]) -> Iterator[str]:
    """The page without its picture."""
    yield from (f"## Parameters, in {LARGE} formats", "")
    yield from markdown([row({"parameters": f"{millions:g} M"}, of, millions) for millions, of in sizes.items()])
    yield from ("", f"{', '.join(FORMATS[:LARGE])}.", "", "## Formats, of 1 M parameters", "")
    yield from markdown([row({"formats": str(count)}, of, 1) for count, of in counts.items()])
    yield from ("", "## New bests in one run, of 1 M parameters in ONNX", "")
    rows = [
        {
            "new bests": str(count),
            "exported": str(of.exports),
            "in the training thread": f"{of.stalls:.2f} s",
            "each": f"{of.stalls / count * 1e3:.1f} ms",
            "after the last step": f"{of.after:.1f} s",
            "written": size(of.written),
            "on disk": size(of.kept),
        }
        for count, of in bests.items()
    ]
    yield from markdown(rows)
    yield from ("", "A best that comes while another waits takes its place; the last one always comes out.")


def draw(sizes: Mapping[float, Cost], counts: Mapping[int, Cost], file: Path) -> None:
    """Seconds and memory over parameters, seconds over formats."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    across = list(sizes)
    left.loglog(across, [each.after for each in sizes.values()], marker="o")
    left.set(xlabel="million parameters", ylabel="s after the last step")
    for name, label in (("training", "training process"), ("largest", "largest worker"), ("together", "all workers")):
        middle.loglog(across, [getattr(each, name) / 1e9 for each in sizes.values()], marker="o", label=label)
    middle.set(xlabel="million parameters", ylabel="peak memory in GB")
    middle.legend()
    right.plot(list(counts), [each.after for each in counts.values()], marker="o")
    right.set(xlabel="formats", ylabel="s after the last step", ylim=(0, None))
    figure.savefig(file)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 25, 100, 1000], help="millions of parameters")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 8, 16], help="numbers of formats")
    parser.add_argument("--bests", nargs="+", type=int, default=[1, 10, 50, 200], help="numbers of new bests")
    parser.add_argument("--page", type=Path, help="the page to write")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(*given.child)))
        return
    counts = {count: cost(1, count) for count in given.counts}
    bests = {count: cost(1, SMALL, count) for count in given.bests}
    sizes = {millions: cost(millions, LARGE) for millions in given.sizes}
    text = "\n".join(tables(sizes, counts, bests))
    print(text)
    if given.page:
        page = (f"# How cost grows\n\nWritten by `tests/benchmarks/growth.py`{MEASURED}", PICTURE, text)
        given.page.write_text("\n\n".join(page) + "\n", encoding="utf-8")
        draw(sizes, counts, given.page.with_suffix(".svg"))


if __name__ == "__main__":
    main()
