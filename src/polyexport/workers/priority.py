"""Priorities: a worker uses only what training leaves of the machine, and waiting for that is not a timeout.

Requirements:
* A thread of training that wakes gets a processor at once. On Linux it would wait for up to a time slice of a nice
  worker that runs there, at each parallel operator of PyTorch. A worker of the policy SCHED_IDLE it preempts, and a
  processor that runs only such ones counts as free (sched(7)).
* Policy and niceness count within a session only, where the kernel groups processes by session (autogroup in sched(7)).
  So a worker leads a process group, and no session of its own.
* When training is over, workers that still run get normal priority, as far as the system allows it: only privileged
  users may raise a thread's. One that stays at the lowest has all that others leave.
* Time without a processor does not count toward a timeout.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_LOWEST = 19


def step_back(process: int) -> None:
    """Give a process the lowest priority, which its children inherit."""
    _nice(process, _LOWEST)
    _schedule(process, idle=True)


def restore_priority(group: int) -> None:
    """Give the processes of a group the priority of this process."""
    own = 0
    with contextlib.suppress(OSError, AttributeError):  # see _nice
        own = os.getpriority(os.PRIO_PROCESS, 0)
    for thread in _threads(group):
        _schedule(thread, idle=False)
        _nice(thread, own)


def waited_seconds(group: int) -> float:
    """How long the processes of a group waited for a processor: the maximum over their threads.

    0.0 if the system does not report it (https://docs.kernel.org/scheduler/sched-stats.html).
    """
    waited = 0.0
    for thread in _threads(group):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            waited = max(waited, _waited_seconds(Path(f"/proc/{thread}")))
    return waited


def processor_seconds(process: int) -> float:
    """Processor time of a process; 0.0 if the system does not report it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime of proc_pid_stat(5)
    except OSError:
        return 0.0


def first_waited_seconds() -> float:
    """`waited_seconds` of this process's main thread only, since other threads also wait for each other."""
    try:
        return _waited_seconds(Path(f"/proc/self/task/{os.getpid()}"))
    except (OSError, IndexError):
        return 0.0


def _waited_seconds(thread: Path) -> float:
    return int((thread / "schedstat").read_text(encoding="utf-8").split()[1]) / 1e9


def _nice(process: int, niceness: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not allowed, or Windows, which has no such call
        os.setpriority(os.PRIO_PROCESS, process, niceness)


def _schedule(thread: int, *, idle: bool) -> None:
    """Let a thread run only while no other wants its processor, or as usual again; the latter needs privileges."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, os.SCHED_IDLE if idle else os.SCHED_OTHER, os.sched_param(0))


def _threads(group: int) -> Iterator[int]:
    """The threads of a group's processes: on Linux each has a priority of its own."""
    for process in _of(group):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            yield from [int(each.name) for each in Path(f"/proc/{process}/task").iterdir()]


def _of(group: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            if os.getpgid(int(folder.name)) == group:
                yield int(folder.name)
