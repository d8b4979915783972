"""When there is a new best checkpoint, and which one.

A plain callback runs before `ModelCheckpoint` in every hook, so it would see the previous best path. So a private
callback is added after all checkpoint callbacks, which looks after each hook in which one may have been written. It is
a `Checkpoint` of the same namespace as the trainer (`lightning.pytorch` or `pytorch_lightning`), since Lightning keeps
only those at the end of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint that `ModelCheckpoint` regards as the best.

    Attributes:
        path: Its path.
        folder: The folder of checkpoints.
        monitor: The metric; None where nothing is monitored.
        score: The metric's value; if nothing is monitored, an object that is new with each checkpoint.
    """

    path: str
    folder: str
    monitor: str | None
    score: Any

    @property
    def name(self) -> str:
        """Its path relative to the folder of checkpoints.

        A metric's name may add a folder to it: `epoch=1-val/loss=0.5.ckpt`.
        """
        path = Path(self.path)
        inside = path.relative_to(self.folder) if path.is_relative_to(self.folder) else Path(path.name)
        return "-".join(inside.with_suffix("").parts)

    def is_same(self, other: Best | None) -> bool:
        """Whether nothing was written in between; compares scores by identity, since their values may be on a GPU."""
        return other is not None and self.path == other.path and self.score is other.score


def bases(value: object) -> set[str]:
    """Names of a value's classes: both Lightning namespaces have classes of the same names."""
    return {each.__name__ for each in type(value).__mro__}


def checkpointer(callbacks: Iterable[Any], monitor: str | None) -> Any | None:
    """The `ModelCheckpoint` to follow: the one with this monitor, else the first with any, else the first."""
    found = [each for each in callbacks if "ModelCheckpoint" in bases(each)]
    if monitor is not None:
        return next((each for each in found if each.monitor == monitor), None)
    return next((each for each in found if each.monitor is not None), found[0] if found else None)


def best_of(trainer: Any, monitor: str | None) -> Best | None:
    """The present best checkpoint of the followed `ModelCheckpoint`; None before it has written one."""
    model_checkpoint = checkpointer(trainer.callbacks, monitor)
    path = getattr(model_checkpoint, "best_model_path", "")
    if model_checkpoint is None or not path:
        return None
    # without a monitor the newest is the best, and only the step tells two of the same name apart
    score = model_checkpoint.best_model_score if model_checkpoint.monitor else model_checkpoint._last_global_step_saved
    return Best(str(path), str(model_checkpoint.dirpath), model_checkpoint.monitor, score)


def follow(
    trainer: Any, monitor: str | None, tail: Callback | None, look: Callable[[Any, Any], None]
) -> Callback | None:
    """Call `look(trainer, module)` after each hook of the followed `ModelCheckpoint`.

    Returns:
        The callback that does so, or `tail` if there is one already; None if there is no `ModelCheckpoint`.
    """
    model_checkpoint = checkpointer(trainer.callbacks, monitor)
    if model_checkpoint is None:
        return None
    tail = tail or _tail(model_checkpoint, look)
    # a new list, since others may refer to the old one
    trainer.callbacks = [*(each for each in trainer.callbacks if each is not tail), tail]
    return tail


def take_out(trainer: Any, tail: Callback | None) -> None:
    """Remove the callback: `test(ckpt_path="best")` would warn of a second checkpoint callback."""
    if tail is not None:
        trainer.callbacks = [each for each in trainer.callbacks if each is not tail]


def _tail(model_checkpoint: Any, look: Callable[[Any, Any], None]) -> Callback:
    base: Any = next(each for each in type(model_checkpoint).__mro__ if each.__name__ == "Checkpoint")

    class Tail(base):  # type: ignore[misc]  # its namespace is known only at run time
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
            look(trainer, pl_module)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            look(trainer, pl_module)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            look(trainer, pl_module)

    made: Callback = Tail()
    return made
