"""Folders of exports: a new one, the finished ones, which is the best, which are too old."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from pathlib import Path

from polyexport.errors import BadRequest

BEST = "best"
DESCRIPTION = "polyexport.json"
"""File beside an artifact that says what it is (see `polyexport.load`); no part of the artifact."""

UNFINISHED = ".unfinished-"  # how names of folders begin that nobody but the engine may see
_ATTEMPTS = 100
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD of fcntl.h, and a flag of renameat2


def unfinished(parent: Path) -> Path:
    """A new folder in `parent` for an export that is not complete yet.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = parent / f"{UNFINISHED}{secrets.token_hex(4)}"
    (folder / "source").mkdir(parents=True)
    return folder


def link(source: str | Path, target: str | Path) -> None:
    """Have a file under a second name, where it costs nothing: a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def take_place(work: Path, final: Path) -> None:
    """Give a complete folder its name; an earlier one under that name goes, also where several runs do so at once.

    Whoever reads meanwhile finds one of them, where the system can swap two names.

    Raises:
        OSError: the folder cannot be written.
    """
    for attempt in range(_ATTEMPTS):
        try:
            work.rename(final)
            return
        except OSError as error:
            if attempt == _ATTEMPTS - 1 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
        if _swap(work, final):
            shutil.rmtree(work, ignore_errors=True)
            return
        stale = unfinished(final.parent)
        with contextlib.suppress(FileNotFoundError):  # the other run has just moved it away
            final.rename(stale / "old")
        shutil.rmtree(stale, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that cannot be done (https://man7.org/linux/man-pages/man2/rename.2.html)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # only Linux has it
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE) == 0)


def finished(parent: Path) -> list[Path]:
    """The complete exports in `parent`, the oldest first."""
    written: dict[Path, int] = {}
    for report in parent.glob("*/report.json"):
        if not (report.parent.is_symlink() or report.parent.name.startswith(UNFINISHED)):
            with contextlib.suppress(FileNotFoundError):  # another run has just removed it
                written[report.parent] = report.stat().st_mtime_ns
    return sorted(written, key=written.__getitem__)


def followed(path: Path) -> Path:
    """`path`, where a `best` on the way to it that is a file is taken as the link that it stands for."""
    for place in (path, *path.parents):
        if place.name == BEST and place.is_file():
            return place.parent / place.read_text(encoding="utf-8").strip() / path.relative_to(place)
    return path


def inside(folder: Path, path: str) -> Path:
    """`path`, relative to `folder`, where a record says that a file is.

    Raises:
        BadRequest: it lies elsewhere, by its name or by a link on the way: the record is somebody's who may not say so.
    """
    found = folder / path
    if not found.resolve().is_relative_to(folder.resolve()):
        raise BadRequest(f"{path!r} lies outside of the export {folder}")
    return found


def point_best(folder: Path) -> None:
    """Let `best` beside `folder` point to it: a link, or where links do not work, a file with the folder's name."""
    best = folder.parent / BEST
    temporary = folder.parent / f".{BEST}-{secrets.token_hex(4)}"
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
    except OSError:
        temporary.write_text(folder.name, encoding="utf-8")
    temporary.replace(best)
