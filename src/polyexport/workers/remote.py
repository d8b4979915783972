"""Jobs on other machines, run by the user's executor: dask's, Ray's, submitit's, or any other with `submit`.

Requirements:
* An executor is any object with `submit(function, *arguments)`, which returns something with `done()` and `result()`.
* The files that a job reads travel with it, and those that it wrote travel back, as bytes through the executor, or
  through a folder that both sides can reach, by fsspec URL. The export's own folder need not be reachable.
* The toolchain is installed where the job runs. A job that is lost with its worker is tried once more.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from polyexport.capture.snapshot import module_files
from polyexport.capture.weights import SHARDS
from polyexport.errors import line
from polyexport.workers.job import Job, Prepare, files_named_by, reproduce
from polyexport.workers.process import JobResult, Workers, environment
from polyexport.workers.toolchain import Toolchain

Archive = bytes | str
"""A zip archive, or the URL of one."""

_TRIES = 2
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An executor, and the fsspec URL of a folder that both sides can reach; None if files travel as bytes."""

    executor: Any
    staging: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What travels besides the files.

    Attributes:
        job: The job's file, and `log` its log, relative to the export's folder.
        final: The job's file once the export is complete.
        chain: The toolchain that it runs in.
        timeout: Timeout in seconds.
        threads: Number of threads that it may use.
        gpu: Whether it needs a GPU.
    """

    job: str
    log: str
    final: str
    chain: Toolchain
    timeout: float
    threads: int
    gpu: bool


def run(elsewhere: Elsewhere, root: Path, job: Job, task: Task, cancelled: Callable[[], bool]) -> JobResult:
    """Run a job by the executor."""
    why = ""
    for _ in range(_TRIES):
        try:
            with _archive(_pack(root, _read_by(root, job, task), elsewhere.staging)) as archive:
                future = elsewhere.executor.submit(work, archive, task, elsewhere.staging)
                while not future.done():
                    if cancelled():
                        future.cancel()
                        return JobResult(error="cancelled", kind="cancelled")
                    time.sleep(_LOOK_SECONDS)
                ended: JobResult
                ended, made = future.result()
            with _archive(made):
                _unpack(made, root, log=task.log)
            return ended
        except Exception as lost:  # each executor has its own exceptions for a lost worker
            why = line(lost)
    return JobResult(error=f"lost {_TRIES} times by the executor: {why}", kind="crashed")


def work(archive: Archive, task: Task, staging: str | None) -> tuple[JobResult, Archive]:
    """Run a job on the executor's machine: in a new folder, in a worker process like any other."""
    with tempfile.TemporaryDirectory(prefix="polyexport-") as folder:
        root = Path(folder)
        _unpack(archive, root)
        before = _files(root)
        try:
            command = task.chain.command()
        except Exception as error:  # see Dispatcher.run
            return JobResult(error=str(error), kind="missing"), _pack(root, (), staging)
        around = environment(threads=task.threads, gpu=task.gpu, host=task.chain.in_host)
        workers = Workers()
        ended = workers.run(command, root / task.job, root / task.log, timeout=task.timeout, environment=around)
        ended = replace(ended, command=reproduce(command, Path(task.final)))
        if not _is_there(archive):  # the sender has given up, and would not remove the answer
            return ended, b""
        made = [root / name for name, state in _files(root).items() if before.get(name) != state]
        return ended, _pack(root, made, staging)


def _read_by(root: Path, job: Job, task: Task) -> list[Path]:
    """The files that a job reads: its own, batches, and the artifact's folder, or the module's files."""
    source = root / job.source
    named = [task.job, *files_named_by(job)]
    found: Iterable[Path]
    if isinstance(job, Prepare):
        found = [*source.iterdir(), *(source / SHARDS).rglob("*")]
    elif source.name == "source":
        found = module_files(source)
    else:
        found = (source if source.is_dir() else source.parent).rglob("*")
    return [*(root / name for name in named), *(file for file in found if file.is_file())]


def _files(root: Path) -> Mapping[str, tuple[int, int]]:
    """Size and modification time of every file, by path."""
    found = [(file, file.stat()) for file in root.rglob("*") if file.is_file()]
    return {file.relative_to(root).as_posix(): (about.st_size, about.st_mtime_ns) for file, about in found}


def _pack(root: Path, files: Iterable[Path], staging: str | None) -> Archive:
    """An archive of files in `root`; one that travels by URL is never in memory as a whole."""
    if staging is None:
        buffer = io.BytesIO()
        _zip(root, files, buffer)
        return buffer.getvalue()
    import fsspec

    url = f"{staging.rstrip('/')}/{secrets.token_hex(8)}.zip"
    with fsspec.open(url, "wb", auto_mkdir=True) as file:
        _zip(root, files, file)
    return url


def _zip(root: Path, files: Iterable[Path], stream: BinaryIO) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        for file in dict.fromkeys(files):
            archive.write(file, file.relative_to(root))


def _is_there(archive: Archive) -> bool:
    if isinstance(archive, bytes):
        return True
    import fsspec

    system, path = fsspec.url_to_fs(archive)
    system.invalidate_cache()
    return bool(system.exists(path))


@contextlib.contextmanager
def _archive(archive: Archive) -> Iterator[Archive]:
    """An archive; one that travels by URL is removed when the context exits."""
    try:
        yield archive
    finally:
        if isinstance(archive, str):
            import fsspec

            system, path = fsspec.url_to_fs(archive)
            system.rm(path)


def _unpack(archive: Archive, root: Path, *, log: str = "") -> None:
    """Write an archive's files into `root`; `log` is appended to."""
    if isinstance(archive, bytes):
        _unzip(io.BytesIO(archive), root, log)
        return
    import fsspec

    with fsspec.open(archive, "rb") as file:
        _unzip(file, root, log)


def _unzip(stream: BinaryIO, root: Path, log: str) -> None:
    with zipfile.ZipFile(stream) as archive:
        for name in archive.namelist():
            if not (root / name).resolve().is_relative_to(root.resolve()):
                raise ValueError(f"an archive has the file {name!r}, which is outside of the export")
            if name == log:
                (root / log).parent.mkdir(parents=True, exist_ok=True)
                with (root / log).open("ab") as file:
                    file.write(archive.read(name))
            else:
                (root / name).unlink(missing_ok=True)  # it may be a hard link to the user's checkpoint
                archive.extract(name, root)
