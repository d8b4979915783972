"""Folders of exports: making, locking, finishing and finding them.

A folder that is not complete is locked by the process that fills it, for the life of the process: the kernel releases
the lock of a killed one. An incomplete folder that is not locked is a leftover.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from polyexport.errors import BadRequest

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so leftovers are not recognized
    fcntl = None  # type: ignore[assignment]

BEST = "best"
EXPORTS = "exports"
"""Name of the folder of exports in a run's folder."""

DESCRIPTION = "polyexport.json"
"""File next to an artifact that describes it (see `polyexport.load`); not a part of the artifact."""

UNFINISHED, CAPTURE = ".unfinished-", ".capture-"  # prefixes of the engine's hidden folders
REQUEST = Path("source", "request.json")
"""File of an export that stores the request."""

_FILES = {
    *("report.json", "report.md", "report.html", "manifest.json", "validation_batch.npz", "source", "logs"),
    *("bom.json", "model.sig", "wandb_links.json", ".lock"),
}
"""What an export has besides its formats' folders; the second line is from publishing and from locking."""

_LEFT_BY_PROGRAMS = (".tmp", ".DS_Store")

_LOCK, _ELSEWHERE = ".lock", "source/elsewhere.txt"
_ATTEMPTS = 100
_LONGEST_NAME = 255  # of a file name, in bytes
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD of fcntl.h, and a flag of renameat2


def check_name(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder whose name the locale cannot write, as with LC_ALL=C where Python's UTF-8 mode is off.

    Raises:
        BadRequest: always then.
    """
    try:
        os.fsencode(folder)
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"the folder {os.fspath(folder)!r} has characters that {error.encoding}, the encoding of this locale, "
            "lacks; set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or give another folder"
        ) from None


def unfinished(parent: Path) -> Path:
    """Make a locked folder in `parent` for a new export; see `discard`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = locked(parent, UNFINISHED)
    (folder / "source").mkdir()
    return folder


def locked(parent: Path, prefix: str) -> Path:
    """Make a folder in `parent`, locked until it is discarded or this process ends."""
    name = secrets.token_hex(4)
    made = parent / f".new-{name}"
    made.mkdir(parents=True)
    take(made)
    folder = made.rename(parent / f"{prefix}{name}")
    if made in _locks:
        _locks[folder] = _locks.pop(made)
    return folder


_locks: dict[Path, int] = {}  # file descriptors of the folders that this process has locked


def take(folder: Path) -> bool:
    """Lock a folder for this process; False if another process has the lock, or where there are no locks."""
    if fcntl is None:
        return False
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return False
    _locks[folder] = lock
    return True


def let_go(folder: Path) -> None:
    """Unlock a folder, without removing it."""
    with contextlib.suppress(KeyError):
        os.close(_locks.pop(folder))


def _close_locks() -> None:
    for folder in tuple(_locks):
        let_go(folder)


if hasattr(os, "register_at_fork"):  # a child that outlives this process must not keep its locks
    os.register_at_fork(after_in_child=_close_locks)


def discard(folder: Path) -> None:
    """Remove an incomplete folder, and the link to its weights if that is elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        elsewhere = Path((folder / _ELSEWHERE).read_text(encoding="utf-8"))
        if elsewhere.name.endswith(f".{folder.name}"):  # else it is no link of ours; the folder may be anybody's
            shutil.rmtree(elsewhere, ignore_errors=True)
            elsewhere.unlink(missing_ok=True)  # a file; if it was a folder, it is removed by now
    shutil.rmtree(folder, ignore_errors=True)
    let_go(folder)


def lies_elsewhere(folder: Path, weights: Path) -> None:
    """Record, before it is made, that a link to the weights of an export is outside of its folder."""
    (folder / _ELSEWHERE).write_text(str(weights), encoding="utf-8")


def clear(parent: Path, remove: Callable[[Path], object] = discard) -> Path | None:
    """Remove what dead processes left in `parent`, by `remove`.

    Returns:
        The leftover that stays: the newest request, if no later one is complete; else None.
    """
    there = (each for prefix in (UNFINISHED, CAPTURE) for each in parent.glob(f"{prefix}*"))
    taken = [each for each in there if not each.is_symlink() and take(each)]
    left = max(filter(_asked, taken), key=_asked, default=None)
    if left is not None and _asked(left) <= max(map(_asked, finished(parent)), default=0):
        left = None
    for folder in taken:
        if folder == left:
            let_go(folder)
        else:
            remove(folder)
    return left


def _asked(folder: Path) -> int:
    """When an export was requested, in nanoseconds; 0 if unknown."""
    try:
        return (folder / REQUEST).stat().st_mtime_ns
    except OSError:
        return 0


def link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def take_place(work: Path, final: Path) -> None:
    """Rename a complete folder; it replaces an earlier one of that name, even if several runs do so at once.

    A concurrent reader finds one of the two, if the system can swap two names.

    Raises:
        OSError: the folder cannot be written.
    """
    (work / _LOCK).unlink(missing_ok=True)
    (work / _ELSEWHERE).unlink(missing_ok=True)
    for attempt in range(_ATTEMPTS):
        try:
            work.rename(final)
            let_go(work)
            return
        except OSError as error:
            if attempt == _ATTEMPTS - 1 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
        if _swap(work, final):
            discard(work)
            return
        stale = unfinished(final.parent)
        with contextlib.suppress(FileNotFoundError):  # another run has just moved it away
            final.rename(stale / "old")
        discard(stale)


def is_export(folder: Path) -> bool:
    """Whether a folder has a report of polyexport, of any version; other tools write a `report.json` too."""
    try:
        found = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"version", "checkpoint", "outcomes"} <= found.keys()


def may_become_export(folder: Path) -> bool:
    """Whether an export may replace this folder: it is missing, empty, or an export without files of the user's.

    One that cannot be written is another user's, or is protected.
    """
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    if not can_write(folder):
        return False
    if is_export(folder):
        return not foreign(folder)
    return next(folder.iterdir(), None) is None


def can_write(folder: Path) -> bool:
    """Whether this process may list a folder and change what is in it."""
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=effective)


def foreign(folder: Path) -> list[str]:
    """Names of files and folders in an export that are not the export's."""
    outcomes = json.loads((folder / "report.json").read_bytes())["outcomes"]
    listed = outcomes if isinstance(outcomes, list) else []
    formats = {str(each.get("format")) for each in listed if isinstance(each, dict)}
    return sorted(
        name for name in os.listdir(folder) if name not in _FILES | formats and not name.endswith(_LEFT_BY_PROGRAMS)
    )


def short_name(name: str) -> str:
    """`name`, or if it is too long for a folder, its beginning and a hash of the whole."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST_NAME - _ROOM:
        return name
    begin = raw[: _LONGEST_NAME - 2 * _ROOM].decode(errors="ignore")
    return f"{begin}-{hashlib.sha256(raw).hexdigest()[: _ROOM - 1]}"


_ROOM = 8
"""Bytes that are left for a number behind the name."""


def free_name(parent: Path, name: str) -> str:
    """`name`, or if it is taken in `parent`, with the first free number appended."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in names if may_become_export(parent / each))


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False if that is not possible (https://man7.org/linux/man-pages/man2/rename.2.html)."""
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
            with contextlib.suppress(FileNotFoundError):  # another run may have just removed it
                written[report.parent] = report.stat().st_mtime_ns
    return sorted(written, key=written.__getitem__)


def followed(path: Path) -> Path:
    """`path`, in which a `best` that is a file is resolved like the link that it replaces."""
    for pointer in (path, *path.parents):
        if pointer.name == BEST and pointer.is_file():
            with pointer.open("rb") as file:
                named = file.read(_LONGEST_NAME + 1).decode(errors="replace").strip()
            if named in ("", ".", "..") or "\0" in named or len(named) > _LONGEST_NAME or "/" in named:
                break  # it is no name of a folder next to it
            return pointer.parent / named / path.relative_to(pointer)
    return path


def may_point_best(best: Path) -> bool:
    """Whether `best` may be replaced: it is missing, names an export next to it, or is a dangling link."""
    if not os.path.lexists(best):
        return True
    if best.is_symlink():
        named = Path(os.readlink(best))
        return named.name == str(named) and (is_export(best) or not best.exists())
    return best.is_file() and best.stat().st_size <= _LONGEST_NAME and is_export(followed(best))


def inside(folder: Path, path: str) -> Path:
    """The absolute path of a file that a record names relative to `folder`.

    Raises:
        BadRequest: it is outside of `folder`, by its name or by a link on the way; records may come from anybody.
    """
    found = folder / path
    if not _leads_into(found, folder):
        raise BadRequest(f"{path!r} is outside of the export {folder}")
    return found


def check_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it: what is written to the link's name would change files there.

    Raises:
        BadRequest: there is such a link.
    """
    for each in _links(folder):
        inside(folder, each)


def check_artifact_links(folder: Path) -> None:
    """Refuse a format's folder with a link to a file that is neither in it nor in the export around it.

    In the cache of Hugging Face's hub every file is a link into `blobs`, next to `snapshots`
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).

    Raises:
        BadRequest: there is such a link; the folder may come from anybody, and name any file of this user's.
    """
    own = folder.parent if is_export(folder.parent) else folder
    allowed = [own, *(each.parent / "blobs" for each in folder.resolve().parents if each.name == "snapshots")]
    links = [folder] if folder.is_symlink() and own != folder else [folder / each for each in _links(folder)]
    for each in links:
        if not any(_leads_into(each, place) for place in allowed):
            raise BadRequest(
                f"{each} is a link that leads out of {own}; if you trust who made it, copy the folder with what its "
                "links name, as `cp -rL` does, and use the copy"
            )


def _links(folder: Path) -> Iterator[str]:
    """The links in a folder, relative to it."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _leads_into(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no name of a file
        return False


def point_best(folder: Path) -> None:
    """Make `best` next to `folder` point to it: a link, or where links do not work, a file with the folder's name.

    Check `may_point_best` first.

    Raises:
        OSError: the folder cannot be written, or `best` is another user's.
    """
    best = folder.parent / BEST
    temporary = folder.parent / f".{BEST}-{secrets.token_hex(4)}"
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
    except OSError:
        temporary.write_text(folder.name, encoding="utf-8")
    try:
        temporary.replace(best)
    except OSError:  # it is another user's
        temporary.unlink()
        raise
