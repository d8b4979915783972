"""Weights & Biases: tables and plots of what was measured.

A table is logged whole each time: W&B shows only the first state of one that grows. Nothing is logged with `step=`:
Lightning's logger has its own steps, and W&B drops what comes late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyexport.report.report import Report, figures
from polyexport.report.tables import Figure
from polyexport.serialization import encode

_SUMMARY = ("state", "bytes", "max_abs_error", "batch", "p50_ms", "p95_ms", "batch_1_p50_ms", "speedup")
_BARS = ("p50_ms", "batch_1_p50_ms", "bytes")
_LINES = ("p50_ms", "max_abs_error")


def log_figures(run: Any, reports: Sequence[Report]) -> None:
    """Log the newest report's figures as the run's summary, and tables and plots of all."""
    import wandb as sdk

    report = reports[-1]
    newest = figures(report)
    for row in newest:
        for key in _SUMMARY:
            name = f"export/{row['format']}/{key}"
            if row[key] is not None or run.summary.get(name) is not None:  # of an earlier export, not of this one
                run.summary[name] = row[key]
    run.summary["export/notes"] = "\n".join(map(str, report.notes))
    best = report.best()
    run.summary["export/best_format"] = best.format if best else None

    latency = [_about(each) | row for each in reports for row in figures(each)]
    parity = [_about(each) | row for each in reports for row in _parity(each)]
    step = report.checkpoint.global_step or 0
    logged: dict[str, Any] = {"trainer/global_step": step, "export/latency": _table(latency)}
    if parity:
        logged["export/parity"] = _table(parity)
    for key in _BARS:
        bars = [{"format": row["format"], key: row[key]} for row in newest if row[key] is not None]
        if bars:
            batch = f" at batch {report.baseline.batch}" if key == "p50_ms" and report.baseline else ""
            logged[f"export/{key}"] = sdk.plot.bar(_table(bars), "format", key, title=f"{key}{batch}, step {step}")
    for key in _LINES:
        lines: dict[str, list[tuple[Figure, Figure]]] = {}
        for row in latency:
            if row[key] is not None and row["global_step"] is not None:
                lines.setdefault(str(row["format"]), []).append((row["global_step"], row[key]))
        if lines:
            xs, ys = ([[point[axis] for point in line] for line in lines.values()] for axis in (0, 1))
            batch = f" at batch {report.baseline.batch}" if key == "p50_ms" and report.baseline else ""
            title = f"{key}{batch} over checkpoints"
            logged[f"export/{key}_by_step"] = sdk.plot.line_series(xs, ys, list(lines), title, "global_step")
    run.log(logged)


def _about(report: Report) -> dict[str, Figure]:
    checkpoint = report.checkpoint
    name = Path(checkpoint.path).name
    score: float | None = encode(checkpoint.score)
    return {"checkpoint": name, "global_step": checkpoint.global_step, "score": score}


def _parity(report: Report) -> Iterator[dict[str, Figure]]:
    """One row per format and output."""
    for outcome in report.outcomes:
        for output, parity in outcome.parity.outputs.items() if outcome.parity else ():
            about = {
                "format": outcome.format,
                "precision": outcome.precision,
                "state": outcome.shown_state,
                "output": output,
            }
            yield about | encode(parity)


def _table(rows: Sequence[Mapping[str, Figure]]) -> Any:
    import wandb as sdk

    # None if it is not a number, since a W&B column has one type
    return sdk.Table(columns=list(rows[0]), data=[list(encode(row).values()) for row in rows])
