"""How fast the artifacts are in their runtimes, beside eager PyTorch: a Markdown row for each model, batch and threads.

    python tests/benchmarks/runtimes.py [--models mobilenet resnet vit bert lstm] [--formats onnx tflite …]
                                        [--batches 1 16] [--threads 1 2] [--into FOLDER] [--page FILE]

With `--into` exports are kept there, and those that are there already are only timed; without threads none is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyexport import Engine, Report, export
from polyexport.engine.bench import EAGER
from polyexport.measure.latency import QUIET, Latency

ABOUT = """\
Written by `tests/benchmarks/runtimes.py`. Weights are random. Each cell is the median of a call in milliseconds and its
speed over eager PyTorch, called in turn with it; `–` where there is no artifact that agrees, and in parentheses what
was measured while other programs had the processor."""
FORMATS = ("torchscript", "pt2", "onnx", "openvino", "executorch", "saved_model", "tflite", "tfjs", "paddle", "mnn")


def images(batch: int) -> dict[str, torch.Tensor]:
    """Pixels: (batch, 3, 224, 224)."""
    return {"pixel_values": torch.rand(batch, 3, 224, 224)}


def mobilenet() -> nn.Module:
    """MobileNetV2, 3.5 M parameters."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config())


def resnet() -> nn.Module:
    """ResNet-18, 11.7 M parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: Any = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def vit() -> nn.Module:
    """A vision transformer of 6 layers, 192 wide."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768)
    return ViTForImageClassification(config)


def bert() -> nn.Module:
    """A BERT of 4 layers, 256 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    return BertForSequenceClassification(config)


def tokens(batch: int) -> dict[str, torch.Tensor]:
    """Token ids: (batch, 128)."""
    return {"input_ids": torch.randint(1000, 30_000, (batch, 128))}


class Recurrent(nn.Module):
    """Two bidirectional layers of LSTM, 128 wide, over (batch, 64, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(frames)[0][:, -1])


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, torch.Tensor]]]] = {
    "mobilenet": (mobilenet, images),
    "resnet": (resnet, images),
    "vit": (vit, images),
    "bert": (bert, tokens),
    "lstm": (Recurrent, lambda batch: {"frames": torch.rand(batch, 64, 40)}),
}


def timed(report: Report, threads: int) -> Report:
    """The report with latencies on so many cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        with Engine() as engine:
            return engine.bench(report)
    finally:
        os.sched_setaffinity(0, cores)


def cell(latency: Latency | None, eager: Latency) -> str:
    """One latency as the table has it."""
    if latency is None:
        return "–"
    text = f"{latency.p50_ms:.3g} ({eager.p50_ms / latency.p50_ms:.2f}×)"
    return text if latency.waited <= QUIET else f"({text})"


def row(model: str, batch: int, threads: int, report: Report, formats: list[str]) -> str:
    """One row of the table; formats that are not in the report are `–`."""
    eager = report.baseline
    assert eager is not None, f"{EAGER} was not timed"
    found = {outcome.format: outcome.latency for outcome in report.outcomes if outcome.publishable}
    cells = (cell(found.get(name), eager) for name in formats)
    return f"| {' | '.join([model, str(batch), str(threads), f'{eager.p50_ms:.3g}', *cells])} |"


def exported(model: str, batch: int, formats: list[str], folder: Path) -> Report:
    """The export of a model, which may be there already."""
    if (folder / "report.json").exists():
        return Report.load(folder)
    build, inputs = MODELS[model]
    torch.manual_seed(0)
    return export(build().eval(), inputs(batch), formats, folder, bench=False)


def rows(given: Any, folder: Path) -> Iterator[str]:
    """The table, line by line."""
    head = ["model", "batch", "threads", "eager ms", *given.formats]
    yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
    for model in given.models:
        for batch in given.batches:
            report = exported(model, batch, given.formats, folder / f"{model}-{batch}")
            for threads in given.threads:
                yield row(model, batch, threads, timed(report, threads), given.formats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--into", type=Path, help="folder that keeps the exports")
    parser.add_argument("--page", type=Path, help="the page to write")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(given, given.into or Path(folder)):
            print(line, flush=True)
            lines.append(line)
    if given.page:
        given.page.write_text("\n".join(["# Runtimes\n", f"{ABOUT}\n", *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
