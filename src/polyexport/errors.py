"""The exceptions of polyexport.

```
PolyexportError
├── UnknownFormat      an unknown format name
├── BadRequest         an argument, a module or an input that cannot be used
├── ToolMissing        a program, package or device is missing here         -> state `skipped`
├── CannotRun          made, but nothing here can run it                    -> state `unverified`
├── NotSigned          an export that differs from what was signed
└── ExportFailed       raised after `fit`, only where `fail_on` asks for it
```

A converter's own exceptions are not wrapped: they become the `reason` of an outcome.
"""

from __future__ import annotations

import signal


def line(error: BaseException, most: int | None = None) -> str:
    """An exception as one line, its type and its message, cut to `most` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}".rstrip(": ")


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


class NotSigned(PolyexportError, RuntimeError):
    """An export differs from what was signed; the message says what differs."""


class ExportFailed(PolyexportError, RuntimeError):
    """A format ended in a state that the caller listed in `fail_on`."""
