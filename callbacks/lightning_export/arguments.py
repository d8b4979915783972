"""Checks of the arguments of `ExportCallback`, alone and against the trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_export.best import bases, checkpointer
from lightning_export.harmless import warn
from lightning_export.trainer import callbacks, example, modes, overrides, validates
from polyexport import BadRequest
from polyexport.capture.processing import resolved
from polyexport.capture.selection import Select, selected
from polyexport.engine.options import Options, check_whole
from polyexport.measure.budget import directed
from polyexport.publish.wandb import Wandb
from polyexport.report.folders import check_name
from polyexport.report.outcome import STATES


def check(
    *,
    into: str | Path | None,
    when: str,
    fail_on: Sequence[str],
    publish: Any,
    monitor: str | None,
    metric_batches: int,
    keep: int | None,
) -> None:
    """Refuse values that are impossible with any trainer."""
    if not isinstance(into, str | os.PathLike | None):
        raise BadRequest(f"into={into!r}; give a folder or a URL")
    if into is not None:
        check_name(into)
    if not isinstance(monitor, str | None):
        raise BadRequest(f"monitor={monitor!r}; give the name of a metric that a ModelCheckpoint monitors")
    if when not in ("improved", "fit_end"):
        raise BadRequest(f"when={when!r}; known: 'improved', 'fit_end'")
    are_listed = isinstance(fail_on, Iterable) and not isinstance(fail_on, str)
    if not are_listed or not all(state in STATES for state in fail_on):
        raise BadRequest(f"fail_on={fail_on!r}; give a list of states; known: {', '.join(STATES)}")
    are_sinks = isinstance(publish, Iterable) and all(callable(sink) for sink in publish)
    if publish != "auto" and not are_sinks:
        raise BadRequest(f"publish={publish!r}; give 'auto' or a list of functions that take the report")
    alerts = publish != "auto" and any(isinstance(sink, Wandb) and sink.alert for sink in publish)
    if alerts and (keep == 1 or when == "fit_end"):
        alone = "keep=1" if keep == 1 else "when='fit_end'"
        raise BadRequest(
            f"Wandb(alert=True) compares with the previous best, of which {alone} leaves no export on disk"
        )
    check_whole(metric_batches=metric_batches)
    if metric_batches < 0:
        raise BadRequest(f"metric_batches={metric_batches}; give 1 or more, or 0 for no metrics")


def check_inputs(inputs: Any, options: Options, metric_batches: int) -> None:
    """Refuse `inputs` that are not batches, and processing steps that other arguments do not work with."""
    if not (inputs is None or callable(inputs)) and (
        isinstance(inputs, str | Mapping | torch.Tensor) or not hasattr(inputs, "__iter__")
    ):
        raise BadRequest(
            f"inputs is a {type(inputs).__name__}; give a function of the batch, or several batches: a list "
            "of them, or a DataLoader"
        )
    steps = options.processing
    if inputs is None and not isinstance(steps.preprocess, torch.nn.Module | str | None):
        raise BadRequest(
            "preprocess is a function, whose calls cannot be captured: give inputs=<a function of the batch that "
            "returns raw inputs>, or inputs=<raw batches>, or make it a module that validation_step calls"
        )
    if steps.steps and (options.budget or metric_batches):
        asked = "budget" if options.budget else "metric_batches"
        raise BadRequest(
            f"{asked} runs validation_step with each artifact in the place of forward, and with "
            f"{' and '.join(steps.steps)} an artifact does more than forward: use two ExportCallbacks, or measure it "
            "with polyexport.export(metric=…)"
        )


def refuse(callback: Any, siblings: Sequence[Any], trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, when fit starts, an `ExportCallback` that cannot work in this trainer; warn if no metric is monitored."""
    twins = [each for each in siblings if each.into == callback.into and each is not callback]
    if callback.into is not None and twins:
        raise BadRequest(f"two ExportCallbacks write to {callback.into}; give each its own folder")
    if isinstance(callback.options.select, str) and not overrides(pl_module, "configure_model"):
        selected(pl_module, callback.options.select)
    steps = callback.options.processing
    if not overrides(pl_module, "configure_model"):
        resolved(steps, pl_module)
    if not validates(trainer, pl_module) and callback.inputs is None and steps.preprocess is not None:
        raise BadRequest(
            "there is no validation batch to capture raw inputs from; give inputs=<a function of the batch that "
            "returns them> (which then gets the first training batch), or inputs=<raw batches>"
        )
    if not validates(trainer, pl_module) and callback.inputs is None and example(pl_module) is None:
        raise BadRequest(
            "ExportCallback does not know what forward takes: there is no validation batch to capture it from; "
            "give the trainer validation data, set example_input_array on the module, or give "
            "inputs=<a function of the batch> (which then gets the first training batch)"
        )
    if callback.monitor is not None and checkpointer(callbacks(trainer), callback.monitor) is None:
        monitors = [each.monitor for each in callbacks(trainer) if "ModelCheckpoint" in bases(each)]
        raise BadRequest(f"monitor={callback.monitor!r}: no ModelCheckpoint monitors it; they monitor {monitors}")
    directed(callback.options.budget, modes(trainer))
    model_checkpoint = checkpointer(callbacks(trainer), callback.monitor)
    if model_checkpoint is not None and model_checkpoint.monitor is None:
        warn(
            "no ModelCheckpoint monitors a metric, so the newest checkpoint is taken as the best; "
            "give the trainer ModelCheckpoint(monitor=<a metric that you log>, mode='min' or 'max')"
        )


def described(select: Select) -> Any:
    """Which part of a module is exported, in words that are the same in every run."""
    if not callable(select):
        return select
    # a lambda has no name, but the attributes that it reads identify it; a partial has neither
    code = getattr(select, "__code__", None)
    return (getattr(select, "__qualname__", type(select).__qualname__), *(code.co_names if code else ()))
