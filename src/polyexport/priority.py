"""Beside training: a worker takes what training leaves of the machine, and is not blamed for having to wait.

Requirements:
* Niceness alone is not enough: where the kernel groups processes by session (autogroup in sched(7)), it counts within
  the session only, and a worker has one of its own. There the session has a niceness too.
* When training is over, workers that still run are like any other process, as far as the system allows it: a session's
  niceness may be taken back by anyone, a process's by the privileged only.
* Time in which others had the processor is no sign of a hang.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_LOWEST = 19


def step_back(process: int) -> None:
    """Give a process that has just begun its session the lowest priority; those that it starts inherit it."""
    _set(process, niceness=_LOWEST, of_session=_LOWEST)


def come_forward(session: int) -> None:
    """Give the processes of a session the priority that this process has."""
    own, of_session = 0, 0
    with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):  # see _set
        own = os.getpriority(os.PRIO_PROCESS, 0)
        of_session = int(Path("/proc/self/autogroup").read_text().split()[-1])
    for process in _of(session):
        _set(process, niceness=own, of_session=of_session)


def waited_seconds(session: int) -> float:
    """How long the processes of a session were ready to run while others ran: the greatest of all their threads.

    0.0 where the system does not tell (https://docs.kernel.org/scheduler/sched-stats.html).
    """
    waited = 0.0
    for process in _of(session):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            for thread in Path(f"/proc/{process}/task").iterdir():
                waited = max(waited, int((thread / "schedstat").read_text().split()[1]) / 1e9)
    return waited


def _set(process: int, *, niceness: int, of_session: int) -> None:
    with contextlib.suppress(OSError):  # no such file but on Linux
        Path(f"/proc/{process}/autogroup").write_text(str(of_session))
    with contextlib.suppress(OSError, AttributeError):  # not allowed, or Windows, which has no such call
        os.setpriority(os.PRIO_PROCESS, process, niceness)


def _of(session: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getsid(int(folder.name)) == session:
                yield int(folder.name)
