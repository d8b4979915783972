"""The session of one `fit`: how it begins, and what happens to its exports at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_export.harmless import warn
from lightning_export.loggers import sinks
from lightning_export.metrics import measured
from lightning_export.trainer import KEPT_BY_LIGHTNING, attached, shards
from polyexport import ExportFailed, Report
from polyexport.capture.code import libraries
from polyexport.engine.options import Options
from polyexport.engine.session import Session
from polyexport.errors import line
from polyexport.publish import Sink
from polyexport.report import console


def begin(
    trainer: Trainer,
    pl_module: LightningModule,
    options: Options,
    into: Callable[[], Path],
    *,
    reports: list[Report],
    folders: list[Path],
) -> Session:
    """A new session for this trainer."""
    return Session(
        options,
        into,
        reports=reports,
        folders=folders,
        sharded=shards(trainer),
        attributes=attached,
        ignored=KEPT_BY_LIGHTNING,
        libraries=libraries(pl_module),
        say=lambda line: rank_zero_info(f"ExportCallback: {line}"),
        warn=warn,
    )


def end(
    trainer: Trainer,
    pl_module: LightningModule,
    session: Session,
    reports: list[Report],
    metric_batches: int,
    publish: Literal["auto"] | Sequence[Sink],
    into: str | Path | None,
) -> None:
    """Wait for all exports, have the last one's metrics measured, publish it and show it."""
    session.finish()
    if not reports:
        return
    if batches := metric_batches or (trainer.limit_val_batches if session.options.budget else 0):
        try:
            reports[-1] = measured(reports[-1], trainer, pl_module, session, batches=batches)
        except Exception as error:  # what there is has to be published, such as on a full disk
            warn(f"{reports[-1].folder.name} has no metrics: {line(error)}")
    session.publish(reports[-1], sinks(publish, trainer.loggers, into))
    console.show(reports[-1])


def fail(trainer: Trainer, complaint: str) -> None:
    """Make `fit` raise, after all else that a trainer does at its end.

    Raises:
        ExportFailed: always.
    """
    for logger in trainer.loggers:  # the trainer would do so right after the callbacks' teardown
        logger.finalize("success")
    raise ExportFailed(complaint)
