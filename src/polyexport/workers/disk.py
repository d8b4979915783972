"""Disk space of toolchains' environments, and their last use."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNUSED_DAYS = 30
"""After how many days without a job an environment counts as unused."""

_DAY_SECONDS = 86_400

_SIZE = ".bytes"
"""The file of an environment with its size when it was made."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment in the cache folder.

    Attributes:
        folder: Where it is.
        bytes: Its size when it was made; bytecode that jobs add since is not in it.
        used: The time of its last job, in seconds since the epoch.
    """

    folder: Path
    bytes: int
    used: float

    @property
    def is_unused(self) -> bool:
        """Whether it has had no job for `UNUSED_DAYS`."""
        return time.time() - self.used > UNUSED_DAYS * _DAY_SECONDS


def environments(cache: Path, marker: str) -> Iterator[Environment]:
    """The complete environments in a cache folder, by name; `marker` is the file that marks complete ones."""
    for file in sorted(cache.glob(f"*/{marker}")):
        with contextlib.suppress(FileNotFoundError):  # another process may have just removed it
            yield Environment(file.parent, _bytes(file.parent), file.stat().st_mtime)


def record_size(folder: Path) -> int:
    """Measure an environment, write its size into it, and return that: a hundred of them have a million files."""
    found = size_bytes(folder)
    with contextlib.suppress(OSError):
        (folder / _SIZE).write_text(f"{found}\n", encoding="utf-8")
    return found


def _bytes(folder: Path) -> int:
    """The recorded size of an environment; it is measured if there is no record."""
    try:
        return int((folder / _SIZE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return record_size(folder)


def size_bytes(folder: Path) -> int:
    """Size of the files of a folder; files that uv has linked from its cache count in full."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(inner, name)).st_size
    return total


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which may not exist yet."""
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.exists(each))
    return shutil.disk_usage(there).free


def is_full(folder: Path) -> bool:
    """Whether nothing can be written to a folder: its disk has no room, or no file can be made on it."""
    try:
        found = os.statvfs(folder)
    except (AttributeError, OSError):  # Windows has no such call
        return False
    return found.f_bavail * found.f_frsize < _LEAST_BYTES or (found.f_files > 0 and found.f_favail == 0)


_LEAST_BYTES = 65_536
"""With less free space, a disk counts as full: what failed may have wanted that much at once."""


def gigabytes(count: int) -> str:
    """A number of bytes in gigabytes, with one digit."""
    return f"{count / 1e9:.2g} GB"


def use(marker: Path) -> None:
    """Record that an environment is used now; if it cannot be written to, its time is unchanged."""
    with contextlib.suppress(OSError):
        os.utime(marker)
