"""MLflow: measurements of each format as metrics over the checkpoints of the run, the best export's files as artifacts.

https://mlflow.org/docs/latest/ml/tracking
"""

from __future__ import annotations

import time
from typing import Any

from polyexport.publish import Sink
from polyexport.report.manifest import MANIFEST
from polyexport.report.report import Report, figures, history

_LONGEST_TAG = 5000  # characters that MLflow allows


def mlflow(client: Any, run_id: str) -> Sink:
    """A sink into an MLflow run (`experiment` and `run_id` of Lightning's `MLFlowLogger`).

    Metrics are named `export/<format>/<measurement>`, tags `export/<format>/state` and `export/notes`. Artifacts are in
    `export`: the report, and a folder for each format that agreed with PyTorch.
    """

    def publish(report: Report) -> None:
        from mlflow.entities import Metric, RunTag

        now = time.time_ns() // 1_000_000
        for each in history(report):
            metrics = [
                Metric(f"export/{row['format']}/{figure}", value, now, each.checkpoint.global_step or 0)
                for row in figures(each)
                for figure, value in row.items()
                if isinstance(value, int | float)
            ]
            tags = [RunTag(f"export/{outcome.format}/state", outcome.shown_state) for outcome in each.outcomes]
            tags.append(RunTag("export/notes", "\n".join(map(str, each.notes))[:_LONGEST_TAG]))
            client.log_batch(run_id, metrics=metrics, tags=tags)
        for name in ("report.json", "report.md", "report.html", MANIFEST):
            if (report.folder / name).exists():
                client.log_artifact(run_id, str(report.folder / name), "export")
        for outcome in report.publishable:
            client.log_artifacts(run_id, str(report.folder / outcome.format), f"export/{outcome.format}")

    return publish
