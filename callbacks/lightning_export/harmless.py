"""Errors and warnings that must not stop training."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from polyexport import BadRequest, errors
from polyexport.errors import WarningsAllowed, line

P = ParamSpec("P")


def warn(message: str) -> None:
    """Warn on rank zero; never raises, even where warnings are errors."""
    errors.warn(f"ExportCallback: {message}", _warn)


@rank_zero_only
def _warn(message: str) -> None:
    """Warn at the line of the trainer that led here; its module is this one, for filters.

    Lightning shows warnings at lines of its own without the code there, which would say nothing to a user.
    """
    frame: FrameType = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    registry = globals().setdefault("__warningregistry__", {})  # so that a repeated warning is shown once
    at = (frame.f_code.co_filename, frame.f_lineno)
    warnings.warn_explicit(message, UserWarning, *at, module=__name__, registry=registry)


_BETWEEN = ("lightning_export", "polyexport", "lightning_utilities", "contextlib")
"""The packages between a hook of the trainer and a warning."""


def harmless(
    hook: Callable[Concatenate[Any, P], object],
) -> Callable[Concatenate[Any, P], None]:
    """Wrap a hook so that an error becomes a warning, a warning is never an error, and training goes on."""

    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with WarningsAllowed():
                hook(self, *args, **kwargs)
        except SIGTERMException:  # of a validation of our own
            raise
        except (Exception, SystemExit) as error:  # an error of this library must not stop training
            is_mistake = isinstance(error, BadRequest) and _has_nothing_to_lose(*args)
            if is_mistake or errors.is_of_a_signal(error):
                raise
            warn(f"{hook.__name__} failed, training goes on: {line(error)}")

    functools.update_wrapper(guarded, hook)
    return guarded


def _has_nothing_to_lose(trainer: Any = None, *rest: Any) -> bool:
    """Whether training has not begun, so that a mistake in the arguments may be raised."""
    return trainer is not None and bool(trainer.sanity_checking or trainer.global_step == 0)
