"""When there is a new best checkpoint, and which one.

A plain callback runs before `ModelCheckpoint` in every hook, so it sees the best path of the time before. Hence a tail:
a private callback behind all checkpoint callbacks, which asks after each hook in which one may have been written.
It is a `Checkpoint` of the same namespace as the trainer's (`lightning.pytorch` or `pytorch_lightning`), since only
those are kept at the end of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


@dataclass(frozen=True, slots=True)
class Best:
    """A checkpoint that `ModelCheckpoint` holds to be the best.

    Attributes:
        path: Where it lies.
        folder: The folder of checkpoints.
        monitor: The metric; None where nothing is monitored.
        score: Its value; where nothing is monitored, what changes with each checkpoint.
    """

    path: str
    folder: str
    monitor: str | None
    score: Any

    @property
    def name(self) -> str:
        """What it is called below the folder of checkpoints.

        That is more than the file's name where a metric is: `epoch=1-val/loss=0.5.ckpt` lies in a folder of its own.
        """
        path = Path(self.path)
        inside = path.relative_to(self.folder) if path.is_relative_to(self.folder) else Path(path.name)
        return "-".join(inside.with_suffix("").parts)

    def is_same(self, other: Best | None) -> bool:
        """Whether nothing was written in between; by identity of the score, since comparing would wait for a GPU."""
        return other is not None and self.path == other.path and self.score is other.score


def bases(value: object) -> set[str]:
    """Names of a value's classes: both Lightning namespaces have the same ones, but they are different classes."""
    return {each.__name__ for each in type(value).__mro__}


def checkpointer(callbacks: Iterable[Any], monitor: str | None) -> Any | None:
    """The `ModelCheckpoint` to follow: the one with this monitor, else the first with any, else the first."""
    found = [each for each in callbacks if "ModelCheckpoint" in bases(each)]
    if monitor is not None:
        return next((each for each in found if each.monitor == monitor), None)
    return next((each for each in found if each.monitor is not None), found[0] if found else None)


def best_of(trainer: Any, monitor: str | None) -> Best | None:
    """What the `ModelCheckpoint` to follow holds to be the best now; None before it wrote any."""
    model_checkpoint = checkpointer(trainer.callbacks, monitor)
    path = getattr(model_checkpoint, "best_model_path", "")
    if model_checkpoint is None or not path:
        return None
    # without a monitor the newest is the best, and one under the same name differs in nothing but its step
    score = model_checkpoint.best_model_score if model_checkpoint.monitor else model_checkpoint._last_global_step_saved
    return Best(str(path), str(model_checkpoint.dirpath), model_checkpoint.monitor, score)


def follow(
    trainer: Any, monitor: str | None, tail: Callback | None, look: Callable[[Any, Any], None]
) -> Callback | None:
    """Have `look(trainer, module)` called after each hook of the `ModelCheckpoint` to follow.

    Returns:
        The callback that does so, `tail` where there is one already; None where there is no `ModelCheckpoint`.
    """
    model_checkpoint = checkpointer(trainer.callbacks, monitor)
    if model_checkpoint is None:
        return None
    tail = tail or _tail(model_checkpoint, look)
    # a new list: others may hold the old
    trainer.callbacks = [*(each for each in trainer.callbacks if each is not tail), tail]
    return tail


def take_out(trainer: Any, tail: Callback | None) -> None:
    """Follow no more: a second checkpoint callback would have `test(ckpt_path="best")` warn."""
    if tail is not None:
        trainer.callbacks = [each for each in trainer.callbacks if each is not tail]


def _tail(model_checkpoint: Any, look: Callable[[Any, Any], None]) -> Callback:
    base: Any = next(each for each in type(model_checkpoint).__mro__ if each.__name__ == "Checkpoint")

    class Tail(base):  # type: ignore[misc]  # which of the two namespaces it comes from is known at run time only
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
            look(trainer, pl_module)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            look(trainer, pl_module)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            look(trainer, pl_module)

    made: Callback = Tail()
    return made
