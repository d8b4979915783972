"""The exceptions of polyexport.

```
PolyexportError
├── UnknownFormat      an unknown format name
├── BadRequest         an argument, a module or an input that cannot be used
├── ToolMissing        a program, package or device is missing here         -> state `skipped`
├── CannotRun          made, but nothing here can run it                    -> state `unverified`
├── NothingToDo        a route that would make the same as another one      -> the next route
├── NotSigned          an export that differs from what was signed
└── ExportFailed       raised after `fit`, only where `fail_on` asks for it
```

A converter's own exceptions are not wrapped: they become the `reason` of an outcome.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, cast


def line(error: BaseException, most: int | None = None) -> str:
    """An exception as one line, its type and its message, cut to `most` characters.

    A key, an index or a word is no message: then the statement that raised it follows. An error in TorchScript has its
    cause behind tracebacks.
    """
    said = str(error)
    if (traced := said.rfind(_TORCHSCRIPT)) >= 0 and (cause := _CAUSE.search(said, traced)):
        said = cause[1]
    said = redacted(" ".join(said.split()))[:most]
    text = f"{type(error).__name__}: {said}".rstrip(": ")
    return text if " " in said and not isinstance(error, LookupError) else f"{text}{_raised_at(error)}"


def redacted(text: str) -> str:
    """`text` without passwords in URLs and without the values of environment variables that are secret by their name.

    A user's own code may put them into a message, and reports are shared.
    """
    for value in secrets():
        text = text.replace(value, "***")
    return _PASSWORD.sub("://***@", text)


def secrets() -> list[str]:
    """The values of environment variables like `WANDB_API_KEY`, except paths of files with secrets and short ones."""
    found = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    return sorted((value for value in found if not os.path.exists(value)), key=len, reverse=True)


_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)PAT$|(^|_)(KEY|AUTH)$|API_?KEY", re.IGNORECASE)

_PASSWORD = re.compile(r"://[^\s/:@]*:[^\s/@]+@")

_SHORTEST = 8
"""Characters; a shorter value may be a part of any word."""


def _raised_at(error: BaseException) -> str:
    steps = traceback.extract_tb(error.__traceback__)
    while isinstance(error, SystemExit) and len(steps) > 1 and steps[-1].name == "exit":
        steps.pop()  # a library's own `sys.exit`; wandb's stays in its place for as long as the process lives
    if not steps:
        return ""
    last = steps[-1]
    statement = f" at `{' '.join(last.line.split())[:_LONGEST]}`" if last.line else ""
    return f"{statement} ({os.path.basename(last.filename)}:{last.lineno}, in {last.name})"


_LONGEST = 100
"""Characters of a statement."""

_TORCHSCRIPT = "Traceback of TorchScript"

_CAUSE = re.compile(r"^[\w.]*(?:Error|Exception): (.+)", re.MULTILINE | re.DOTALL)


TOLERANT = True
"""Whether warnings are kept from being raised; the tests set it to False, so that an unexpected one fails them."""


def warn(message: str, by: Callable[[str], object] = warnings.warn) -> None:
    """Warn, by a function that does; where warnings are errors (`python -W error`), log the message instead."""
    try:
        by(message)
    except Exception:
        if not TOLERANT:
            raise
        logging.getLogger("polyexport").warning(message)


def is_of_a_signal(error: BaseException) -> bool:
    """Whether the program's own handler of a signal raised it, as in `signal.signal(SIGTERM, lambda *_: sys.exit())`.

    Such a handler runs wherever the program is, in the functions of this library too, and what it raises is meant for
    the program.
    """
    handlers = [signal.getsignal(each) for each in signal.valid_signals()]
    own = [getattr(each, "__func__", each) for each in handlers if callable(each)]
    codes = {getattr(each, "__code__", getattr(type(each).__call__, "__code__", None)) for each in own} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


Filter = tuple[Any, ...]
"""An entry of `warnings.filters`: action, message, category, module, line number."""


def add_filters(*new: Filter) -> None:
    """Put filters of warnings before all others; other than by `catch_warnings`, changes by the user's code stay."""
    cast(list[Filter], warnings.filters)[:0] = new


def remove_filters(*old: Filter) -> None:
    """Remove filters that were added; equal ones of the user's stay."""
    found = cast(list[Filter], warnings.filters)
    found[:] = [each for each in found if not any(each is other for other in old)]


class WarningsAllowed(contextlib.ContextDecorator):
    """In this context a warning is shown where the user's filters would raise it (`python -W error`).

    Libraries that are called here warn of what their next version changes, which must not end a training. Filters
    belong to the process: of contexts in several threads, the last one to exit restores them.
    """

    _lock = threading.Lock()
    _depth = 0
    _added: tuple[Filter, ...] = ()

    def __enter__(self) -> None:
        kind = WarningsAllowed
        with kind._lock:
            kind._depth += 1
            if kind._depth == 1 and TOLERANT and any(each[0] == "error" for each in warnings.filters):
                kind._added = tuple(
                    ("default" if each[0] == "error" else each[0], *each[1:]) for each in warnings.filters
                )
                add_filters(*kind._added)

    def __exit__(self, *error: object) -> None:
        kind = WarningsAllowed
        with kind._lock:
            kind._depth -= 1
            if not kind._depth:
                remove_filters(*kind._added)
                kind._added = ()


def ended(code: int) -> str:
    """How a program with this exit code ended: `killed by SIGSEGV`."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class PolyexportError(Exception):
    """Base of every error that polyexport raises on purpose."""


class UnknownFormat(PolyexportError, ValueError):
    """A name that is neither a format nor an alias."""


class BadRequest(PolyexportError, ValueError):
    """An argument, module or input that cannot be used; the message says what to give instead."""


class ToolMissing(PolyexportError, RuntimeError):
    """A tool is not on this machine; the message says where to get it."""


class CannotRun(PolyexportError, RuntimeError):
    """An artifact exists, but nothing on this machine can run it; the message says why."""


class NothingToDo(PolyexportError, RuntimeError):
    """A route would make the same as another one; it is left out of the format's reason."""


class NotSigned(PolyexportError, RuntimeError):
    """An export differs from what was signed; the message says what differs."""


class ExportFailed(PolyexportError, RuntimeError):
    """A format ended in a state that the caller listed in `fail_on`."""
