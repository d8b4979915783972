"""When memory runs out, a worker is killed and not training, and the report says why.

Linux kills the process with the most memory, which may be the one that trains
(https://docs.kernel.org/filesystems/proc.html, `oom_score_adj`). Elsewhere nothing here has an effect.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def set_oom_score(process: int) -> None:
    """Have the kernel kill this process, and those that it starts, before any other one."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/oom_score_adj").write_text("1000", encoding="utf-8")


def free_bytes() -> int:
    """Free memory in bytes: the least of the machine's and of every cgroup's limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, and version 1's `memory.limit_in_bytes`.
    """
    free = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            free += [left for each in (group, *group.parents) if (left := _left_in(each)) is not None]
    return max(0, min(free, default=0))


_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def _left_in(group: Path) -> int | None:
    for limit, usage in _LIMITS:
        found = [*_lines(group / limit), *_lines(group / usage)]
        if len(found) == 2 and found[0] != "max":
            return int(found[0]) - int(found[1])
    return None


def _lines(file: str | Path) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not on this system
        return []


def oom_kill_count() -> int:
    """How many processes this machine has killed because memory ran out, in containers too; 0 if unknown."""
    return sum(int(line.split()[1]) for line in _lines("/proc/vmstat") if line.startswith("oom_kill "))
