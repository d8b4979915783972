"""The user's own validation metrics for each runtime: `validation_step` with an artifact in place of `forward`.

Requirements:
* A copy of the module with the exported weights is validated by a trainer of its own, on the CPU, after fit: module,
  random state and loggers stay as they are.
* PyTorch and every runtime get the same batches; a shuffling loader draws the same order for each.
* If validation fails, there are no metrics, and a note says why.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_export.harmless import warn
from lightning_export.trainer import modes, validates
from polyexport import BadRequest, Budget, Report, Runner
from polyexport.capture.flatten import flat, named_tensors, to_arrays
from polyexport.capture.selection import Select, selected
from polyexport.capture.unwrap import is_data
from polyexport.capture.weights import WEIGHTS
from polyexport.engine import judge
from polyexport.engine.session import Session
from polyexport.errors import line
from polyexport.measure.budget import unknown

_OF_THE_BATCH = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def measured(
    report: Report,
    trainer: Any,
    pl_module: Any,
    session: Session,
    *,
    batches: int | float,
) -> Report:
    """The report with what `validation_step` logs, for PyTorch and for each artifact, judged by the budget.

    `batches` is as a trainer's `limit_val_batches`: a number of batches, or a share of them.
    """
    budget = session.options.budget
    if trainer.world_size > 1 or not validates(trainer, pl_module):
        why = "there is no validation" if trainer.world_size == 1 else "several processes trained together"
        return judge.unmeasured(report, why, budget)
    rank_zero_info(f"ExportCallback: validating {report.folder.name} in each runtime")
    select = session.options.select
    try:
        module = _copied(pl_module, report, trainer)
    except Exception as error:  # the user's own module may hold anything
        return judge.unmeasured(report, line(error, 200), budget)
    return session.judge(report, functools.partial(_validated, trainer, module, select, batches), modes(trainer))


def warn_of_unlogged(trainer: Any, budget: Mapping[str, Budget]) -> None:
    """After the first validation, warn of a budget for a metric that was not logged.

    Raises:
        BadRequest: in the sanity check, when nothing is lost yet.
    """
    why = unknown(budget, {name: None for name in trainer.callback_metrics})
    if why and trainer.sanity_checking and trainer.world_size == 1:
        raise BadRequest(why)
    if why:
        warn(why)


def _copied(pl_module: Any, report: Report, trainer: Any) -> Any:
    """A copy of the module with the exported weights, and with the data module's hooks for batches."""
    held = (value for part in pl_module.modules() for value in vars(part).values())
    shared = {id(value): value for value in held if is_data(value)}
    module = copy.deepcopy(pl_module, shared).cpu().float()
    module._metric_attributes = None  # Lightning caches a metric's name by identity, which a copy changes
    weights = torch.load(report.folder / "source" / WEIGHTS, map_location="cpu", weights_only=True)
    module.load_state_dict(weights, strict=pl_module.strict_loading)
    data = trainer.datamodule
    for hook in _OF_THE_BATCH if data is not None else ():
        if getattr(type(data), hook) is not getattr(_base(data), hook):
            setattr(module, hook, getattr(data, hook))
    return module


def _base(data: Any) -> Any:
    return next(each for each in type(data).__mro__ if each.__name__ == "LightningDataModule")


def _validated(
    trainer: Any, module: Any, select: Select, batches: int | float, run: Runner | None
) -> Mapping[str, float]:
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
    """Suppress the lines that every new trainer logs about the machine, but not warnings."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _through(part: Any, run: Runner) -> Any:
    """A `forward` that returns the structure that PyTorch's returns, with the runtime's values."""
    original = part.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wrapped = flat(part, args, kwargs)
        answer = copy.deepcopy(original(*args, **kwargs))  # the output may be a view of a weight or of the batch
        named, _ = named_tensors(answer, taken=dict.fromkeys(wrapped.input_names))
        made = run(to_arrays(wrapped.input_names, wrapped.example))
        for name, tensor in named.items():
            values = torch.from_numpy(made[name])
            tensor.copy_(torch.view_as_complex(values.contiguous()) if tensor.is_complex() else values)
        return answer

    return forward
