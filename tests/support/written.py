"""Finished exports on disk with chosen figures, written without running the engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from polyexport.engine.bench import EAGER, _recorded
from polyexport.measure.latency import Latency, summarize
from polyexport.measure.parity import OutputParity, Parity
from polyexport.report.files import save
from polyexport.report.outcome import Artifact, Checkpoint, Outcome, State
from polyexport.report.report import Report


def outcome(folder: Path, name: str, state: State, error: float, p50_ms: float | None) -> Outcome:
    file = folder / name / "model.json"
    file.parent.mkdir(parents=True)
    file.write_text(f"{name} at {folder.name}")
    output = OutputParity(error, 1.0, 0.0, 1.0, 99.0, 1.0, noise_floor=1e-7)
    latency = None if p50_ms is None else Latency(p50_ms, 2, 2, None, 500, 1, 1, "cpu", 0.1, 5, 1000, (p50_ms,), 2.0)
    artifact = Artifact(f"{name}/model.json", file.stat().st_size, "0")
    return Outcome(
        name,
        "float32",
        state,
        artifact=artifact,
        parity=Parity(state != "mismatch", "", {"y": output}),
        latency=latency,
    )


def export(folder: Path, *, step: int, p50_ms: float = 0.5, score: float = 2.0) -> Report:
    """An export in `folder` with a verified, a wrong, a degraded (and faster) and a skipped format."""
    outcomes = (
        outcome(folder, "good", "verified", 1e-6, p50_ms),
        outcome(folder, "wrong", "mismatch", math.inf, None),
        outcome(folder, "static", "degraded", 1e-6, p50_ms - 0.1),
        Outcome("lost", "float32", "skipped", "a tool is missing"),
    )
    at: dict[str, Any] = {"epoch": 0, "global_step": step, "monitor": "val_loss", "score": score}
    checkpoint = Checkpoint(f"/run/checkpoints/{folder.name}.ckpt", sha256="abc", **at)
    report = Report(checkpoint, None, outcomes, baseline=outcomes[0].latency, folder=folder.resolve())
    save(report)
    return report


def busy(report: Report) -> Report:
    """The same, timed on a busy machine."""
    costs = {"threads": 1, "device": "cpu", "load_seconds": 0, "first_ms": 9, "peak_memory_bytes": 1, "waited": 0.6}
    spent = summarize([9.0] * 10, batch=4, one_row_ms=[2.0], **costs)
    return _recorded(report, dict.fromkeys((EAGER, "good", "static"), spent), {})


def run(exports: Path) -> list[Report]:
    """Two exports of one run, and one of another run in the same folder, which must not be counted with them."""
    stranger = export(exports / "stranger", step=2)
    moved = stranger.checkpoint.path.replace("/run/", "/other/")
    save(Report(Checkpoint(moved, global_step=2), None, stranger.outcomes, folder=stranger.folder))
    first = export(exports / "epoch=0-step=4", step=4, p50_ms=0.7, score=3.0)
    return [first, export(exports / "epoch=1-step=8", step=8)]
