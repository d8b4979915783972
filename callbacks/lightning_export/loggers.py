"""The sinks of Lightning's loggers. Nothing is published to a logger that is not here, such as `CSVLogger`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_export.best import bases
from polyexport.publish import Sink
from polyexport.publish.folder import copy_to
from polyexport.publish.mlflow import mlflow
from polyexport.publish.tensorboard import tensorboard
from polyexport.publish.wandb import Wandb


def _wandb(logger: Any, options: Wandb | None = None) -> Sink:
    """A sink into the logger's run, which knows under which name the logger logs checkpoints, if it does."""
    options, run = options or Wandb(), logger.experiment
    name = (logger._checkpoint_name or f"model-{run.id}") if logger._log_model else None
    return options.replaced(run=run, source=options.source or name)


SINKS: Mapping[str, Callable[[Any], Sink]] = {
    "MLFlowLogger": lambda logger: mlflow(logger.experiment, logger.run_id),
    "TensorBoardLogger": lambda logger: tensorboard(logger.experiment),
    "WandbLogger": _wandb,
}
"""Sinks by the name of the logger's class, which is the same in both Lightning namespaces."""


def sinks(
    publish: Literal["auto"] | Sequence[Sink], loggers: Sequence[Any], into: str | Path | None = None
) -> Iterator[Sink]:
    """The sinks that `publish` asks for, and one for `into` if that is a URL.

    A `Wandb` without a run gets the run of the trainer's `WandbLogger`.
    """
    if into is not None and "://" in str(into):
        yield copy_to(str(into))
    if publish == "auto":
        for logger in loggers:
            yield from (make(logger) for name, make in SINKS.items() if name in bases(logger))
        return
    for sink in publish:
        if isinstance(sink, Wandb) and sink.run is None:
            yield next((_wandb(logger, sink) for logger in loggers if "WandbLogger" in bases(logger)), sink)
        else:
            yield sink
