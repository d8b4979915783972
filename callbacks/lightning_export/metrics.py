"""The user's own validation metrics for each runtime: `validation_step` as it is, `forward` answered by an artifact.

Requirements:
* A copy of the module with the exported weights is validated by a trainer of its own, on the CPU, after fit: module,
  random state and loggers stay as they are.
* PyTorch and every runtime see the same batches; a shuffling loader draws the same order for each.
* What cannot be validated has no metrics, and a note says why.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_export.trainer import validates
from polyexport import Report, Runner
from polyexport.capture.flatten import flat, named_tensors, to_arrays
from polyexport.capture.snapshot import WEIGHTS, Select, selected
from polyexport.capture.unwrap import is_data
from polyexport.engine.session import Session
from polyexport.errors import line
from polyexport.report import files
from polyexport.report.outcome import Note

_OF_THE_BATCH = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def measured(
    report: Report,
    trainer: Any,
    pl_module: Any,
    session: Session,
    *,
    batches: int,
) -> Report:
    """The report with what `validation_step` logs on the first `batches` batches, for PyTorch and for each artifact."""
    if trainer.world_size > 1 or not validates(trainer, pl_module):
        why = "there is no validation" if trainer.world_size == 1 else "several processes trained together"
        return _noted(report, f"no metrics: {why}")
    rank_zero_info(f"ExportCallback: validating {report.folder.name} in each runtime")
    select = session.options.select
    try:
        validate = functools.partial(_validated, trainer, _copied(pl_module, report, trainer), select, batches)
        report = replace(report, metrics=validate(None))
    except Exception as error:  # the user's own code, on another device and without the rest of the run
        return _noted(report, f"no metrics: {line(error, 200)}")
    for outcome in report.outcomes:
        if not outcome.publishable:
            continue
        try:
            with session.runner(report, outcome.format) as run:
                found = replace(outcome, metrics=validate(run))
        except Exception as error:  # such as a last batch that is smaller than an artifact of static shapes takes
            report = _noted(report, f"no metrics of {outcome.format}: {line(error, 200)}")
            continue
        outcomes = tuple(found if each is outcome else each for each in report.outcomes)
        report = replace(report, outcomes=outcomes)
    files.save(report)
    return report


def _copied(pl_module: Any, report: Report, trainer: Any) -> Any:
    """The module with the weights that were exported, and the data module's say on batches."""
    held = (value for part in pl_module.modules() for value in vars(part).values())
    shared = {id(value): value for value in held if is_data(value)}
    module = copy.deepcopy(pl_module, shared).cpu().float()
    module._metric_attributes = None  # Lightning finds a metric's name by its identity, which a copy changes
    weights = torch.load(report.folder / "source" / WEIGHTS, map_location="cpu", weights_only=True)
    module.load_state_dict(weights, strict=pl_module.strict_loading)
    data = trainer.datamodule
    for hook in _OF_THE_BATCH if data is not None else ():
        if getattr(type(data), hook) is not getattr(_base(data), hook):
            setattr(module, hook, getattr(data, hook))
    return module


def _base(data: Any) -> Any:
    return next(each for each in type(data).__mro__ if each.__name__ == "LightningDataModule")


def _validated(trainer: Any, module: Any, select: Select, batches: int, run: Runner | None) -> Mapping[str, float]:
    part = selected(module, select)
    before = part.__dict__.get("forward")
    if run is not None:
        part.__dict__["forward"] = _through(part, run)
    try:
        with tempfile.TemporaryDirectory() as folder, isolate_rng(), _quiet():
            own = type(trainer)(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=batches,
                inference_mode=False,
                default_root_dir=folder,
            )
            found = own.validate(module, dataloaders=trainer.val_dataloaders, verbose=False)
    finally:
        part.__dict__.pop("forward", None)
        if before is not None:
            part.__dict__["forward"] = before
    return {name: float(value) for each in found for name, value in each.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that every new trainer logs about the machine; warnings are shown."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _through(part: Any, run: Runner) -> Any:
    """A `forward` that returns what PyTorch's does, with the runtime's numbers in it."""
    original = part.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wrapped = flat(part, args, kwargs)
        answer = copy.deepcopy(original(*args, **kwargs))  # it may be a view of a weight or of the batch
        named, _ = named_tensors(answer, taken=dict.fromkeys(wrapped.input_names))
        made = run(to_arrays(wrapped.input_names, wrapped.example))
        for name, tensor in named.items():
            tensor.copy_(torch.from_numpy(made[name]))
        return answer

    return forward


def _noted(report: Report, note: str) -> Report:
    report = replace(report, notes=(*report.notes, Note("metrics", note)))
    files.save(report)
    return report
