"""TensorBoard: each measurement of each format as a scalar over the checkpoints of the run, the report as text.

https://www.tensorflow.org/tensorboard
"""

from __future__ import annotations

from typing import Any

from polyexport.publish import Sink
from polyexport.report.report import Report, figures, history, markdown


def tensorboard(writer: Any) -> Sink:
    """A sink into a `SummaryWriter` (the `experiment` of Lightning's `TensorBoardLogger`).

    Scalars are named `export/<format>/<measurement>`; their steps are those of the checkpoints.
    """

    def publish(report: Report) -> None:
        for each in history(report):
            step = each.checkpoint.global_step or 0
            for row in figures(each):
                for figure, value in row.items():
                    if isinstance(value, int | float):
                        writer.add_scalar(f"export/{row['format']}/{figure}", value, step)
            writer.add_text("export/report", markdown(each), step)
        writer.flush()

    return publish
