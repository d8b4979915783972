"""When memory runs out, a worker goes and training stays, and the report says why.

Linux ends the process that holds the most, which beside a large conversion may well be the one that trains
(https://docs.kernel.org/filesystems/proc.html, `oom_score_adj`). Elsewhere nothing here has an effect.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def set_oom_score(process: int) -> None:
    """Have the kernel end this process, and those that it starts, before any other one."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")


def oom_kill_count() -> int:
    """How many processes this machine has ended because memory ran out, in containers too; 0 where it does not tell."""
    try:
        counters = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in counters if line.startswith("oom_kill "))
