"""Offers a session each new best checkpoint, with what forward answered in the validation that chose it."""

from __future__ import annotations

import os

from lightning.pytorch import Trainer

from lightning_export.best import Best, best_of
from lightning_export.trainer import checkpoint
from polyexport.capture.answer import Answer
from polyexport.engine.session import Session


class Offers:
    """What was offered already, so that a checkpoint is exported once, also where `fit` is called again.

    Args:
        monitor: Which `ModelCheckpoint` to follow, by what it monitors; None for the only one, or the first.

    Attributes:
        offered: The checkpoint that was offered last; None to have it offered again.
    """

    def __init__(self, monitor: str | None) -> None:
        self.offered: Best | None = None
        self._monitor = monitor
        self._met: Best | None = None
        self._answer: Answer | None = None

    def meet(self, trainer: Trainer, session: Session) -> Best | None:
        """The best checkpoint; a new one keeps what forward answered in the validation that chose it.

        When it is offered, training may have gone on, and later validations have had answers of other weights.
        """
        best = best_of(trainer, self._monitor)
        if best is not None and not best.is_same(self._met):
            self._met, self._answer = best, session.answer
        return best

    def offer(self, trainer: Trainer, session: Session, *, wait: bool = False) -> bool:
        """Offer the best checkpoint if it is a new one; with `wait` though an export before it has to give way.

        Returns:
            False where there is none on disk.
        """
        if session.closed or not session.captured or trainer.sanity_checking:
            return False
        if (best := self.meet(trainer, session)) is None:
            return False
        if best.is_same(self.offered) or not (wait or session.is_free()):  # then it comes with the next hook
            return True
        if "://" not in best.path and not os.path.exists(best.path):
            return False  # AsyncCheckpointIO is still writing it: the next hook comes, at the latest when fit ends
        self.offered = best
        session.record(self._answer)
        session.offer(trainer.lightning_module, best.path, best.name, checkpoint(trainer, best))
        return True

    def offer_last(self, trainer: Trainer, session: Session) -> None:
        """When `fit` ends, whatever comes before it: the best checkpoint, or where there is none the weights."""
        if not self.offer(trainer, session, wait=True) and not session.pending:
            session.offer_weights(trainer.lightning_module, checkpoint(trainer))
