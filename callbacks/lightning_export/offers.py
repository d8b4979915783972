"""Offers a session each new best checkpoint, with what forward returned in the validation that chose it."""

from __future__ import annotations

import contextlib
import os

from lightning.pytorch import Trainer

from lightning_export.best import Best, best_of
from lightning_export.harmless import warn
from lightning_export.trainer import checkpoint
from polyexport.capture.answer import Answer
from polyexport.engine.session import Session
from polyexport.engine.weights import is_written


class Offers:
    """Offers each best checkpoint once, even if `fit` is called again.

    One whose files cannot be written, as on a full disk, is offered again when fit ends.

    Args:
        monitor: The metric of the `ModelCheckpoint` to follow; None for the only one, or the first.

    Attributes:
        offered: The checkpoint that was offered last; set to None, it is offered again.
    """

    def __init__(self, monitor: str | None) -> None:
        self.offered: Best | None = None
        self._monitor = monitor
        self._met: Best | None = None
        self._answer: Answer | None = None
        self._failed: Best | None = None

    def meet(self, trainer: Trainer, session: Session) -> Best | None:
        """The best checkpoint; for a new one, the module's state and forward's outputs in its validation are kept.

        By the time that it is offered, training may have changed the one, and later validations recorded the others.
        """
        best = best_of(trainer, self._monitor)
        if best is not None and not best.is_same(self._met):
            self._met, self._answer = best, session.answer
            with contextlib.suppress(OSError):  # the offer tries it again, and reports it
                session.mark(trainer.lightning_module)
        return best

    def offer(self, trainer: Trainer, session: Session, *, wait: bool = False) -> bool:
        """Offer the best checkpoint if it is new; with `wait` even if it replaces an export that still waits.

        Returns:
            False if there is none on disk.
        """
        if session.closed or not session.captured or trainer.sanity_checking:
            return False
        if (best := self.meet(trainer, session)) is None:
            return False
        if best.is_same(self.offered) or (best.is_same(self._failed) and not wait):
            return True
        if not (wait or session.is_free()):  # else it is offered in the next hook
            return True
        if not is_written(best.path) and not (wait and os.path.exists(best.path)):
            # AsyncCheckpointIO is still writing it: try again in the next hook, at the latest when fit ends
            return False
        self.offered, self._failed = best, None
        session.record(self._answer)
        try:
            session.offer(trainer.lightning_module, best.path, best.name, checkpoint(trainer, best), last=wait)
        except OSError as error:
            self.offered, self._failed = None, best
            _warn(best.name, error, session, "" if wait else "; this is tried again when fit ends")
        return True

    def offer_last(self, trainer: Trainer, session: Session) -> None:
        """When `fit` ends, offer the best checkpoint even if another one waits, or without one the weights."""
        if self.offer(trainer, session, wait=True) or session.pending:
            return
        try:
            session.offer_weights(trainer.lightning_module, checkpoint(trainer))
        except OSError as error:
            _warn("the last state", error, session, "")


def _warn(what: str, error: OSError, session: Session, then: str) -> None:
    warn(
        f"{what} is not exported, since its files cannot be written to {session.exports_folder()}: "
        f"{error.strerror or error}{then}"
    )
