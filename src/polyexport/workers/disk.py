"""What environments of toolchains take on the disk, and when they were last used."""

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


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment in the cache folder. `used` is the time of its last job, in seconds since the epoch."""

    folder: Path
    bytes: int
    used: float

    @property
    def is_unused(self) -> bool:
        """Whether it has had no job for `UNUSED_DAYS`."""
        return time.time() - self.used > UNUSED_DAYS * _DAY_SECONDS


def environments(cache: Path, marker: str) -> Iterator[Environment]:
    """The complete environments in a cache folder, by name; `marker` is the file that says so."""
    for file in sorted(cache.glob(f"*/{marker}")):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            yield Environment(file.parent, size_bytes(file.parent), file.stat().st_mtime)


def size_bytes(folder: Path) -> int:
    """What the files of a folder take; a file that uv has linked from its cache counts in full."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(inner, name)).st_size
    return total


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder that may not exist yet."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def gigabytes(count: int) -> str:
    """A number of bytes for a reader who has little disk."""
    return f"{count / 1e9:.2g} GB"


def use(marker: Path) -> None:
    """Note that an environment has a job now; one that cannot be written keeps the time it has."""
    with contextlib.suppress(OSError):
        os.utime(marker)
