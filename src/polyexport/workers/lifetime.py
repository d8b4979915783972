"""How long a worker lives: until its job is done or its parent is gone, whatever signals arrive."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator

from polyexport.workers.job import PARENT, TEMPORARY


def outlive_signals() -> None:
    """Ignore signals that a scheduler sends to all processes of a job, since they are meant for the training.

    A worker ends with the process that started it, which also kills it where needed; and a conversion that a SIGTERM
    had ended would be reported as `failed`. One that reads the terminal would be stopped by SIGTTIN, since it is no
    foreground process; so it gets an error.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU"):
        if hasattr(signal, name):  # Windows has two of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def end_with_parent() -> Iterator[bytes]:
    """End this process and its children when its parent is gone: standard input closes, or it is orphaned.

    Another child of the parent may keep standard input open, so both are watched. Temporary files are removed, which
    the parent would have done; an incomplete export stays, to be resumed. Returns the lines that arrive until then.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # not sys.stdin, whose lock would be held when the interpreter exits
        with open(0, "rb", closefd=False) as stream:
            for each in stream:
                lines.put(each)
        _end()

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        _end()

    threading.Thread(target=listen, daemon=True).start()
    parent = int(os.environ.get(PARENT, 0))
    if parent and hasattr(os, "killpg"):  # on Windows a venv's Python has another parent
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    return iter(lines.get, b"")  # never ends by itself, since no line is empty


_WATCH_SECONDS = 0.5


def _end() -> None:
    """Remove temporary files, and end this process and its children."""
    if folder := os.environ.get(TEMPORARY):
        shutil.rmtree(folder, ignore_errors=True)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():  # else it was started by hand, in somebody else's group
        os.killpg(0, 9)
    os._exit(1)
