"""Reads what is needed from a Lightning trainer: its callbacks, whether it validates, the folder of its run.

`lightning.pytorch` and `pytorch_lightning` define the same classes separately, so classes are compared by name.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer

from lightning_export.best import Best, bases, checkpointer
from polyexport.capture.unwrap import LeftBehind
from polyexport.errors import is_of_a_signal, redacted
from polyexport.report.folders import EXPORTS
from polyexport.report.outcome import Checkpoint

C = TypeVar("C")


def callbacks(trainer: Trainer) -> list[Any]:
    """The callbacks of a trainer, in its order."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def siblings(trainer: Trainer, kind: type[C]) -> list[C]:
    """The callbacks of one class, or of a class made from it, in the trainer's order."""
    return [each for each in callbacks(trainer) if isinstance(each, kind)]


def checkpoint(trainer: Trainer, best: Best | None = None) -> Checkpoint:
    """The record of the best checkpoint; without one, of the present weights."""
    at = Checkpoint("", epoch=trainer.current_epoch, global_step=trainer.global_step)
    if best is None:
        return at
    score = None if best.monitor is None or best.score is None else float(best.score)
    return replace(at, path=redacted(best.path), monitor=best.monitor, score=score)


def say(trainer: Trainer, lines: deque[str]) -> None:
    """Print lines above the progress bar, and remove them; call it from the training thread only."""
    while lines:
        bar: Any = trainer.progress_bar_callback
        # a disabled bar, as with refresh_rate=0, would not print the line
        tell = bar.print if bar is not None and getattr(bar, "is_enabled", True) else print
        # standard output may be closed, or a pipe that nobody reads
        try:
            tell(lines.popleft())
        except (OSError, ValueError, SystemExit) as error:
            if is_of_a_signal(error):
                raise


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether the next epoch is the last, as far as the trainer knows."""
    most = trainer.max_epochs
    return most is not None and 0 <= most <= trainer.current_epoch + 1


def shards(trainer: Trainer) -> bool:
    """Whether each rank has only a shard of the weights; judged by the names of the strategy's classes."""
    return not bases(trainer.strategy).isdisjoint({"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"})


def modes(trainer: Trainer) -> dict[str, Any]:
    """The mode (`min` or `max`) of each metric that a callback of the trainer monitors."""
    watching = [each for each in callbacks(trainer) if isinstance(getattr(each, "monitor", None), str)]
    found = {each.monitor: getattr(each, "mode", None) for each in watching}
    return {name: mode for name, mode in found.items() if mode in ("min", "max")}


def example(pl_module: LightningModule) -> Any:
    """The module's `example_input_array`; None if it has none."""
    return getattr(pl_module, "example_input_array", None)


def validates(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether fit will run validation, as far as is known before the loaders exist."""
    has_data = trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
    return bool(overrides(pl_module, "validation_step") and has_data and trainer.limit_val_batches)


def overrides(pl_module: LightningModule, method: str) -> bool:
    """Whether a module overrides a method; Lightning's own `is_overridden` knows only one namespace."""
    base = next(each for each in type(pl_module).__mro__ if each.__name__ == "LightningModule")
    return getattr(type(pl_module), method) is not getattr(base, method)


def exports_folder(trainer: Trainer, into: str | Path | None, monitor: str | None, index: int) -> Path:
    """The folder for the exports of the trainer's `ExportCallback` number `index`.

    Nothing here may broadcast, since only rank zero calls it.
    """
    if into is not None and "://" not in str(into):
        return Path(into).expanduser().absolute()
    name = f"{EXPORTS}-{index + 1}" if index else EXPORTS  # a second callback's exports would have the same names
    directory = getattr(checkpointer(callbacks(trainer), monitor), "dirpath", None)
    if directory and "://" not in str(directory):
        run = Path(directory)
        return (run.parent if run.name == "checkpoints" else run).absolute() / name
    logger = trainer.logger
    if logger is not None and logger.save_dir:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return Path(logger.save_dir, str(logger.name), version, name).absolute()
    return Path(trainer.default_root_dir, name).absolute()


# --- what a module has of its trainer ---------------------------------------------------------------------------------

KEPT_BY_LIGHTNING = frozenset(vars(LightningModule()))
"""Attributes that Lightning itself sets on a module, some of them anew in each hook."""

_OF_THE_TRAINER = (
    "current_epoch",
    "global_step",
    "max_epochs",
    "max_steps",
    "precision",
    "fast_dev_run",
    "barebones",
    "testing",
    "predicting",
    "num_devices",
    "num_nodes",
    "world_size",
    "global_rank",
    "local_rank",
    "node_rank",
    "is_global_zero",
)
"""Attributes that `self.trainer` has in a worker. None may broadcast, since only one rank reads them."""


def attached(root: Any) -> dict[str, Any]:
    """For a forward that uses `self.trainer` or `self.log`: a trainer as it was in validation, and a no-op."""
    trainer = getattr(root, "_trainer", None)
    if trainer is None:
        return {}
    known = {name: getattr(trainer, name) for name in _OF_THE_TRAINER}
    validating = {"training": False, "sanity_checking": False, "validating": True, "evaluating": True}
    stands_in = LeftBehind("Trainer")
    vars(stands_in).update(known | validating | _WITHOUT)
    return {"_trainer": stands_in, **dict.fromkeys(("log", "log_dict", "print"), _no_op)}


_WITHOUT: dict[str, Any] = {"logger": None, "loggers": [], "callbacks": [], "progress_bar_callback": None}
"""Attributes of `self.trainer` that are empty in a worker; all others raise an error that says what to do."""


def _no_op(*args: Any, **kwargs: Any) -> None:
    """A no-op in place of `self.log` and `self.print`, which need more of the trainer than a worker has."""
