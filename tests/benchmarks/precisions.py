"""What lower precisions cost and bring: three models that are trained here, in every precision of every format.

    python tests/benchmarks/precisions.py [--models cnn vit mobilenet] [--formats onnx onnx-int8 …]
                                          [--into FOLDER] [--page docs/precisions.md]

Trained on scikit-learn's handwritten digits, which takes a minute for each on two cores, and exported with a budget of
1 % accuracy on images that training has not seen. Each table has a row a format: its state, its size, the median of a
call with one image, and by how much its accuracy differs from PyTorch's; size and time beside those of the same runtime
in float32, from the same rounds. Formats for NPUs are not timed here: they are run by simulators, or before they are
compiled. With `--into`, weights and exports that lie there already are taken as they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import digits

from polyexport import FORMATS, Budget, Format, Outcome, Report, Runner, export
from polyexport.measure.latency import QUIET
from polyexport.report.tables import change, markdown, milliseconds, size
from polyexport.spec import Precision

ROWS = 36
"""Images in a batch."""
BATCHES = 10
"""Of the validation set."""
CALIBRATION = 8
"""Batches that number ranges are taken from, as many as the callback takes."""
BUDGET = Budget(0.01, mode="max")
SEED = 1
LOW: tuple[Precision, ...] = ("float16", "int8", "w8", "w4")


@dataclass(frozen=True, slots=True)
class Data:
    """Images (n, 1, size, size) from 0 to 1, and which digit each is (n)."""

    images: torch.Tensor
    labels: torch.Tensor


def data(side: int) -> tuple[Data, Data]:
    """What to train on, and what to measure on; images are scaled up to `side` pixels a side."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    if side != images.shape[-1]:
        images = functional.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    kept, held_out = order[: -ROWS * BATCHES], order[-ROWS * BATCHES :]
    return Data(images[kept], labels[kept]), Data(images[held_out], labels[held_out])


# --- models -----------------------------------------------------------------------------------------------------------


def vit() -> nn.Module:
    """A vision transformer of 4 layers, 64 wide, on 16 patches of 4x4 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: Any = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    images: Any = {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**sizes, **images))


def mobilenet() -> nn.Module:
    """MobileNetV2 of half the width, on 32x32 pixels."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    images: Any = {"image_size": 32, "num_channels": 1, "num_labels": 10}
    made = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.5, **images))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # transformers has TensorFlow's 0.997, which PyTorch counts from the other end
    return made


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the side of its images in pixels, how long it is trained, and how fast."""

    build: Callable[[], nn.Module]
    side: int
    epochs: int
    rate: float


CASES: Mapping[str, Case] = {
    "cnn": Case(digits.Digits, side=8, epochs=12, rate=1e-2),
    "vit": Case(vit, side=16, epochs=30, rate=1e-3),
    "mobilenet": Case(mobilenet, side=32, epochs=12, rate=3e-3),
}


def trained(case: Case, seen: Data, weights: Path) -> nn.Module:
    """The model with these weights; where there are none, it is trained first.

    By shuffled batches of 64, with a learning rate that falls to zero.
    """
    torch.manual_seed(SEED)
    module = case.build()
    if not weights.exists():
        fit(module.train(), case, seen)
        torch.save(module.state_dict(), weights)
    module.load_state_dict(torch.load(weights))
    return module.eval()


def fit(module: nn.Module, case: Case, seen: Data) -> None:
    torch.set_num_threads(1)  # these are small, and threads of a busy machine wait for each other
    steps = case.epochs * (len(seen.labels) // 64)
    optimizer = torch.optim.AdamW(module.parameters(), lr=case.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, case.rate, total_steps=steps)
    for _ in range(case.epochs):
        order = torch.randperm(len(seen.labels))
        for chosen in order[: len(order) // 64 * 64].split(64):
            loss = functional.cross_entropy(module(seen.images[chosen])["logits"], seen.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(run: Runner, name: str, held_out: Data) -> float:
    """The share of images that are seen as what they are, in batches of `ROWS`."""
    answers = [run({name: images.numpy()})["logits"] for images in held_out.images.split(ROWS)]
    return float((np.concatenate(answers).argmax(-1) == held_out.labels.numpy()).mean())


def exported(case: Case, formats: Sequence[Format], into: Path) -> Report:
    """Train a model, and export it with its weights and with real batches."""
    seen, held_out = data(case.side)
    module = trained(case, seen, into.with_suffix(".pt"))
    name = "image" if isinstance(module, digits.Digits) else "pixel_values"
    batch, *further = held_out.images.split(ROWS)
    return export(
        module,
        batch,
        formats,
        into,
        calibration=further[: CALIBRATION - 1],
        metric=lambda run: {"accuracy": accuracy(run, name, held_out)},
        budget={"accuracy": BUDGET},
        progress=print,
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def in_float32(name: str) -> str:
    """The format of the same runtime in float32; empty where there is none."""
    base = name.rpartition("-")[0] or name
    return base if base in FORMATS and FORMATS[base].precision == "float32" else ""


def chosen() -> list[Format]:
    """The formats of lower precisions, and those in float32 beside them, as far as this machine can make them."""
    low = {name: each for name, each in FORMATS.items() if each.precision in LOW}
    able = {name: each for name, each in low.items() if not each.uses_gpu and not each.lacks()}
    return [FORMATS[name] for name in dict.fromkeys(part for low in able for part in (in_float32(low), low)) if name]


def p50_ms(outcome: Outcome | None) -> float | None:
    """The median of a call with one image; None where it was not timed."""
    if outcome is None or outcome.latency is None:
        return None
    return outcome.latency.p50_ms if outcome.latency.batch == 1 else outcome.latency.batch_1_p50_ms


def times(value: float | None, beside: float | None) -> str:
    return f"{value / beside:.2f}×" if value and beside else ""


def is_quiet(*outcomes: Outcome | None) -> bool:
    """Whether no other program had the processor while these were timed."""
    return all(each.latency.waited <= QUIET for each in outcomes if each and each.latency)


def bracketed(text: str, quiet: bool) -> str:
    return text if quiet or not text else f"({text})"


def row(outcome: Outcome, report: Report) -> dict[str, str]:
    """What the table says of a format."""
    beside = next((each for each in report.outcomes if each.format == in_float32(outcome.format)), None)
    count, whole = (each.artifact.bytes if each and each.artifact else None for each in (outcome, beside))
    mine, ours = (each.metrics.get("accuracy") if each.metrics else None for each in (outcome, report))
    return {
        "format": outcome.format,
        "state": outcome.shown_state,
        "size": size(count),
        "of float32's": times(count, whole),
        "p50 ms": bracketed(milliseconds(p50_ms(outcome)), is_quiet(outcome)),
        "of float32's time": bracketed(times(p50_ms(outcome), p50_ms(beside)), is_quiet(outcome, beside)),
        "accuracy": change(mine, ours) if mine is not None else "",
    }


def slower(report: Report) -> Iterator[str]:
    """The precisions in eight bits that are not faster than float32, and why, as far as is known."""
    made = {outcome.format: outcome for outcome in report.outcomes}
    for name in (each for each in made if FORMATS[each].precision in ("int8", "w8")):
        whole = made.get(in_float32(name))
        mine, beside = p50_ms(made[name]), p50_ms(whole)
        if mine and beside and mine >= beside and is_quiet(made[name], whole):
            why = FORMATS[name].slow_because
            yield f"`{name}` takes {mine / beside:.2f} of float32's time{f': {why}' if why else ''}"


def section(name: str, report: Report) -> Iterator[str]:
    """The lines about one model."""
    model, baseline = report.model, report.baseline
    assert model is not None, f"{name} was not rebuilt"
    assert baseline is not None, f"{name} was not timed"
    kind = (CASES[name].build.__doc__ or "").splitlines()[0].rstrip(".")
    score = report.metrics["accuracy"]
    yield from (f"## {kind}", "")
    yield f"{model.parameters:,} parameters. PyTorch's accuracy is {score:.4f} on {ROWS * BATCHES} images that training"
    yield f"has not seen; each counts for {1 / (ROWS * BATCHES):.4f}. Latency on {baseline.threads} threads; in"
    yield "brackets what was measured while other programs had the processor."
    yield from ("", *markdown([row(outcome, report) for outcome in report.outcomes]), "")
    if said := list(slower(report)):
        yield from ("Not faster than float32 on this processor:", "", *(f"* {line}" for line in said), "")
    reasons = [outcome for outcome in report.outcomes if outcome.reason]
    yield from (f"* {each.format}: {each.state}: {' '.join(each.reason.split())}" for each in reasons)
    if reasons:
        yield ""


ABOUT = """\
Written by `tests/benchmarks/precisions.py`, which trains each model.

What is made for NPUs (`rknn`, `imx500`, `ethosu`) is run by a simulator, or on the CPU before it is
compiled, and not timed. `edgetpu`, which is compiled from `tflite-int8-nhwc`, needs Coral's compiler, and TensorRT an
NVIDIA GPU: they are not in the tables where there is none."""


def page(reports: Mapping[str, Report]) -> str:
    """The whole page."""
    head = ["# Precisions, measured", "", *ABOUT.splitlines()]
    lines = [*head, "", *(line for name, report in reports.items() for line in section(name, report))]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--formats", nargs="+", help="by default all that have lower precisions, and these")
    parser.add_argument("--into", type=Path, help="folder that keeps the exports")
    parser.add_argument("--page", type=Path, help="the page to write")
    given = parser.parse_args()
    formats = [FORMATS[name] for name in given.formats] if given.formats else chosen()
    with tempfile.TemporaryDirectory() as folder:
        into = given.into or Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        reports = {
            name: Report.load(into / name)
            if (into / name / "report.json").exists()
            else exported(CASES[name], formats, into / name)
            for name in given.models
        }
        text = page(reports)
    print(text)
    if given.page:
        given.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
