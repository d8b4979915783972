"""Weights & Biases: one artifact per format that agreed with PyTorch, a latency table, summary keys.

https://docs.wandb.ai/guides/artifacts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyexport.records import encode
from polyexport.report import Outcome, Report
from polyexport.sinks import Sink

UPLOAD_SECONDS = 120
"""How long one upload is waited for, so that a failed one is told."""


def wandb(run: Any) -> Sink:
    """A sink into a W&B run (the `experiment` of Lightning's `WandbLogger`), online or offline.

    Artifacts are called `model-<run id>-<format>`, of type `model`, with the aliases `latest` and `best`.
    """

    def publish(report: Report) -> None:
        import wandb as sdk

        sent = [_log_artifact(sdk, run, report, outcome) for outcome in report.outcomes if outcome.publishable]
        rows = [_row(report, outcome) for outcome in report.outcomes]
        columns: list[str | int] = list(_row(report, report.outcomes[0]))
        table = sdk.Table(columns=columns, data=[list(row.values()) for row in rows])
        # never `step=`: Lightning's logger counts its own, and W&B drops what comes late
        run.log({"export/latency": table, "trainer/global_step": report.checkpoint.global_step or 0})
        for row in rows:
            for key in ("state", "bytes", "max_abs_error", "p50_ms", "p95_ms", "speedup"):
                if row[key] is not None:
                    run.summary[f"export/{row['format']}/{key}"] = row[key]
        if not (run.offline or run.disabled):
            for artifact in sent:
                artifact.wait(timeout=UPLOAD_SECONDS)

    return publish


def _log_artifact(sdk: Any, run: Any, report: Report, outcome: Outcome) -> Any:
    assert outcome.artifact is not None, "only what was made is published"
    place = report.folder / outcome.format
    artifact = sdk.Artifact(f"model-{run.id}-{outcome.format}", type="model", metadata=_metadata(report, outcome))
    for file in sorted(path for path in place.rglob("*") if path.is_file()):
        artifact.add_file(str(file), name=Path(file).relative_to(place).as_posix(), skip_cache=True)
    return run.log_artifact(artifact, aliases=["latest", "best"])


def _metadata(report: Report, outcome: Outcome) -> dict[str, Any]:
    """What W&B shows beside the files; nested, since W&B takes 100 top-level keys, and free of infinities."""
    latency = encode(outcome.latency)
    if latency is not None:
        del latency["samples_ms"]  # they stand in report.json; here they would bury the rest
    metadata: dict[str, Any] = encode(
        {
            "format": outcome.format,
            "precision": outcome.precision,
            "state": outcome.state,
            "reason": outcome.reason,
            "route": outcome.route,
            "sha256": outcome.artifact.sha256 if outcome.artifact else None,
            "checkpoint_sha256": report.checkpoint.sha256,
            "original_filename": Path(report.checkpoint.path).name,
            "epoch": report.checkpoint.epoch,
            "global_step": report.checkpoint.global_step,
            "monitor": report.checkpoint.monitor,
            "score": report.checkpoint.score,
            "inputs": outcome.inputs,
            "outputs": outcome.outputs,
            "parity": outcome.parity,
            "toolchain": outcome.toolchain,
            "environment": report.environment,
        }
    )
    return metadata | {"latency": latency}


def _row(report: Report, outcome: Outcome) -> dict[str, Any]:
    """One row of the table; numbers or None, since a column of W&B has one type."""
    parity, latency = outcome.parity, outcome.latency
    row: dict[str, Any] = encode(
        {
            "checkpoint": Path(report.checkpoint.path).name,
            "global_step": report.checkpoint.global_step,
            "format": outcome.format,
            "precision": outcome.precision,
            "state": outcome.state,
            "reason": outcome.reason,
            "route": outcome.route,
            "bytes": outcome.artifact.bytes if outcome.artifact else None,
            "max_abs_error": parity.max_abs_error if parity else None,
            "noise_floor": parity.noise_floor if parity else None,
            "p50_ms": latency.p50_ms if latency else None,
            "p90_ms": latency.p90_ms if latency else None,
            "p95_ms": latency.p95_ms if latency else None,
            "p99_ms": latency.p99_ms if latency else None,
            "throughput_per_second": latency.throughput_per_second if latency else None,
            "speedup": latency.speedup if latency else None,
        }
    )
    return row
