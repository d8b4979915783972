"""What a worker refuses: to import the training script, and to unpickle what it is told not to trust."""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from typing import Any

from polyexport.errors import CannotRun

_refusals: list[CannotRun] = []


class NotAgain:
    """An import finder that refuses the training script: importing it, under any name, would train again."""

    def __init__(self, script: str) -> None:
        self._script = script

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing, so that other finders are asked.

        Raises:
            ModuleNotFoundError: the name would import the script.
        """
        found = PathFinder.find_spec(name, path, target)
        if found is not None and found.origin and os.path.realpath(found.origin) == self._script:
            raise ModuleNotFoundError(
                f"{name} is the training script {self._script}, which is not imported, since that would train again",
                name=name,
            )


def refuse_pickles(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (see `sys.addaudithook`) that refuses to unpickle more than plain data from now on."""
    if event == "pickle.find_class":
        _refusals.append(
            CannotRun(
                f"it holds a pickle of {'.'.join(map(str, arguments))}, which may run any code; "
                "if you trust who made the export, give --trust"
            )
        )
        raise _refusals[-1]


def cause(error: BaseException) -> BaseException:
    """The cause of an error: the refused pickle, if there was one, since runtimes report that in their own words."""
    return _refusals[0] if _refusals else error
