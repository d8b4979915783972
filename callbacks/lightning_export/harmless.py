"""Errors and warnings that must not stop training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from polyexport import BadRequest, errors
from polyexport.errors import WarningsAllowed, line

P = ParamSpec("P")


def warn(message: str) -> None:
    """Warn on rank zero; never raises, even where warnings are errors."""
    errors.warn(f"ExportCallback: {message}", functools.partial(rank_zero_warn, stacklevel=6))  # the caller of this one


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
