"""Beside training: a worker takes what training leaves of the machine, and is not blamed for having to wait.

Requirements:
* A worker in the background gets a processor only when nothing else wants it, also where the kernel groups processes by
  session: there niceness counts within the session only, and a worker has one of its own.
* Time in which others had the processor is no sign of a hang.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LOWEST = 19


def step_back() -> None:
    """Give this process and its children the lowest priority that the system knows; cannot be taken back."""
    with contextlib.suppress(OSError, AttributeError):  # no such call on Windows
        os.nice(_LOWEST)
    with contextlib.suppress(OSError):  # sched(7), the autogroup feature: a session's share, which nice leaves alone
        Path("/proc/self/autogroup").write_text(str(_LOWEST))
    with contextlib.suppress(OSError, AttributeError):  # Linux; its input and output become idle with it, ionice(1)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def waited_seconds(session: int) -> float:
    """How long the processes of a session were ready to run while others ran: the greatest of all their threads.

    0.0 where the system does not tell (https://docs.kernel.org/scheduler/sched-stats.html).
    """
    waited = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile
            if os.getsid(int(process.name)) == session:
                for thread in (process / "task").iterdir():
                    waited = max(waited, int((thread / "schedstat").read_text().split()[1]) / 1e9)
    return waited
