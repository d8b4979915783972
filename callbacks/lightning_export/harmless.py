"""A decorator for hooks whose errors must not stop training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch.utilities import rank_zero_warn

from polyexport import BadRequest
from polyexport.errors import line

P = ParamSpec("P")


def harmless(
    hook: Callable[Concatenate[Any, P], object],
) -> Callable[Concatenate[Any, P], None]:
    """Wrap a hook so that an error becomes a warning, and training goes on."""

    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except BadRequest:
            raise  # a mistake in the arguments, found in the sanity check at the latest, when nothing is lost
        except (Exception, SystemExit) as error:  # an error of this library must not stop training
            rank_zero_warn(f"ExportCallback: {hook.__name__} failed, training goes on: {line(error)}")

    functools.update_wrapper(guarded, hook)
    return guarded
