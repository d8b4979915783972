"""Worker processes: starting, watching and ending them, and describing how they ended.

Each worker leads a process group. Multiprocessing would run a user's script without a `__main__` guard again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

from polyexport.errors import ToolMissing, redacted, secrets
from polyexport.serialization import read_json
from polyexport.workers import disk, oom
from polyexport.workers.job import PARENT, TEMPORARY, result_path
from polyexport.workers.priority import restore_priority, step_back, waited_seconds
from polyexport.workers.servers import Child, Process, Server, Servers, working_folder

P = TypeVar("P", bound=Process)

_DISTRIBUTED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "NODE_RANK",
    "MASTER_",
    "TORCHELASTIC_",
    "PL_",
    "SLURM_",
)
# what the user set to look at his own program: converters warn, rely on asserts, and have to end at their end
_OF_THE_PROGRAM = ("PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONINSPECT")
# PYTHONDONTWRITEBYTECODE, set in many images, would make each worker compile all its imports
_OF_THE_HOST = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
# opt out of runtimes' telemetry; they read this when they are imported
_NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
_NO_FILES_AT_HOME = {"KERAS_HOME": os.devnull}  # else importing TensorFlow writes ~/.keras/keras.json
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended.

    `value` is its result. Without one, `error` is the reason in a line, and `kind` is `raised`, `missing` (a tool),
    `nothing to do`, `bad request`, `cannot run`, `crashed`, `timed out` or `cancelled`. `command` runs the job again in
    a shell; empty if no job was started.
    """

    value: Any = None
    error: str = ""
    kind: str = ""
    seconds: float = 0.0
    command: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return not self.error


_LOOK_SECONDS = 0.5

_shared: Servers | None = None


@contextlib.contextmanager
def shared_servers() -> Iterator[None]:
    """In this context all engines of this process share their servers, which end when it exits.

    Use it to export one module after another: each toolchain's imports are then paid for once.
    """
    global _shared
    owner = Workers()
    _shared = owner._servers
    try:
        yield
    finally:
        _shared = None
        owner.end_all()


class Workers:
    """The running worker processes, which can all be ended at once.

    Args:
        background: Whether training runs at the same time, so that they have the lowest priority.

    Attributes:
        own_servers: Whether no other engine uses their servers; see `shared_servers`.
    """

    def __init__(self, *, background: bool = False) -> None:
        self._background = background
        self._running: set[Process] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.own_servers = _shared is None
        self._servers = _shared or Servers(self._server)

    @property
    def closed(self) -> bool:
        """Whether `end_all` was called."""
        return self._closed

    def run(
        self,
        command: Sequence[str],
        job: Path,
        log: Path,
        *,
        timeout: float,
        environment: Mapping[str, str],
        imports: Sequence[str] = (),
        spare: int = 0,
    ) -> JobResult:
        """Run one job to its end; never raises for what the job does.

        With `imports` its process is forked by a server that has imported them, if possible. While training runs, it
        is killed when less than `spare` bytes of the disk are free.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        result_path(job).unlink(missing_ok=True)
        ran_out = oom.oom_kill_count()
        with (
            _without_secrets(log),
            log.open("ab") as stream,
            self._working(command, job, stream, stream, environment, imports) as process,
        ):
            if process is None:
                return JobResult(error="cancelled", kind="cancelled")
            if not _ends_within(process, timeout, lambda: self._takes_too_much(job, spare)):
                if why := self._takes_too_much(job, spare):
                    return JobResult(error=why, kind="crashed")
                return JobResult(
                    error=f"timed out after {timeout:g} s, which timeout=… extends", kind="timed out", seconds=timeout
                )
            if self._closed:
                return JobResult(error="cancelled", kind="cancelled")
        if isinstance(process, Child) and process.lost and not result_path(job).exists():
            with log.open("ab") as stream:
                stream.write(b"[its server ended before it did, so it is done again]\n")
            return self.run(command, job, log, timeout=timeout, environment=environment, spare=spare)
        return _read(result_path(job), process.wait(), ran_out)

    def _takes_too_much(self, job: Path, spare: int) -> str:
        """Why a job has to end, since training needs the rest of the disk; empty if it may go on."""
        if not (spare and self._background) or (free := disk.free_bytes(job.parent)) >= spare:
            return ""
        return (
            f"ended when {disk.gigabytes(free)} of the disk were free, since training's next checkpoints may need "
            f"{disk.gigabytes(spare)}"
        )

    @contextlib.contextmanager
    def conversation(
        self,
        command: Sequence[str],
        job: Path,
        log: Path,
        *,
        timeout: float,
        environment: Mapping[str, str],
        imports: Sequence[str] = (),
    ) -> Iterator[Conversation]:
        """Start a job that answers requests one by one; arguments as in `run`."""
        with (
            _without_secrets(log),
            log.open("ab") as stream,
            self._working(command, job, subprocess.PIPE, stream, environment, imports) as process,
        ):
            yield Conversation(process, timeout)

    def warm(self, command: Sequence[str], imports: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a server that jobs will need, and wait until it is ready."""
        self._servers.warm(command, imports, environment)

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers that are ready now."""
        return self._servers.ready

    def output(self, *command: str, environment: Mapping[str, str] = MappingProxyType({})) -> str:
        """Run a program to its end, with `environment` added to this process's, and return its output.

        Raises:
            ToolMissing: the program failed; the message is its output.
        """
        with (
            tempfile.TemporaryFile() as errors,
            self._spawned(command, subprocess.PIPE, errors, {**os.environ, **environment}) as process,
        ):
            if process is None or process.stdin is None or process.stdout is None:
                raise ToolMissing("cancelled")
            process.stdin.close()  # the program must not wait for input
            said = process.stdout.read().decode(errors="replace")
            if code := process.wait():
                errors.seek(0)
                words = " ".join((errors.read().decode(errors="replace") or said).split())
                raise ToolMissing(redacted(words) or f"{command[0]} ended with exit code {code}")
        return said

    def hurry(self) -> None:
        """Training is over: raise running and future workers to normal priority."""
        with self._lock:
            self._background = False
            running = tuple(self._running)
        for process in running:
            restore_priority(process.pid)

    def end_all(self) -> None:
        """Kill every running worker with its children, and refuse to start more."""
        with self._lock:
            self._closed = True
            running = tuple(self._running)
        for process in running:
            _kill(process)
        if self.own_servers:
            self._servers.close()

    @contextlib.contextmanager
    def _working(
        self,
        command: Sequence[str],
        job: Path,
        stdout: Any,
        stderr: IO[bytes],
        environment: Mapping[str, str],
        imports: Sequence[str],
    ) -> Iterator[Process | None]:
        """The process of a job, forked if there is a server for it; the log says which."""
        with self._servers.lent(command, imports, environment) as (server, how):

            def start(around: Mapping[str, str]) -> Process:
                stderr.write(f"[{how}]\n".encode())
                stderr.flush()
                if server is not None:
                    try:
                        return server.fork(job, stdout, stderr, around)
                    except OSError as error:
                        stderr.write(f"[spawned, since {error}]\n".encode())
                        stderr.flush()
                return _spawn([*command, str(job)], subprocess.PIPE, stdout, stderr, around)

            with self._started(start, environment) as process:
                yield process

    def _spawned(
        self, command: Sequence[str], stdout: Any, stderr: Any, environment: Mapping[str, str], stdin: int | None = None
    ) -> AbstractContextManager[subprocess.Popen[bytes] | None]:
        given = subprocess.PIPE if stdin is None else stdin
        return self._started(lambda around: _spawn(command, given, stdout, stderr, around), environment)

    def _server(
        self, words: Sequence[str], stdin: int, environment: Mapping[str, str]
    ) -> AbstractContextManager[subprocess.Popen[bytes] | None]:
        return self._spawned(words, subprocess.DEVNULL, subprocess.DEVNULL, environment, stdin)

    @contextlib.contextmanager
    def _started(self, start: Callable[[Mapping[str, str]], P], environment: Mapping[str, str]) -> Iterator[P | None]:
        """A process that leads a group, killed with its children when the context exits; None after `end_all`.

        It has its own folder for temporary files: converters leave gigabytes, and a killed one all of its files.
        """
        with tempfile.TemporaryDirectory(prefix="polyexport-", ignore_cleanup_errors=True) as temporary:
            with self._lock:
                process = None if self._closed else self._begin(start, environment, temporary)
            try:
                yield process
            finally:
                if process is not None:
                    self._end(process)

    def _begin(self, start: Callable[[Mapping[str, str]], P], environment: Mapping[str, str], temporary: str) -> P:
        process = start(
            dict(environment)
            | dict.fromkeys(("TMPDIR", "TEMP", "TMP", TEMPORARY), temporary)
            | {PARENT: str(os.getpid()), "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
        )
        oom.set_oom_score(process.pid)
        if self._background:
            step_back(process.pid)
        self._running.add(process)
        return process

    def _end(self, process: Process) -> None:
        _kill(process)
        for pipe in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()
        with self._lock:
            self._running.discard(process)


def _spawn(
    command: Sequence[str], stdin: int, stdout: Any, stderr: Any, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    folder, around = working_folder(), dict(environment)
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=around, cwd=folder, process_group=0)


class Conversation:
    """Requests one answer at a time from a worker; a worker that does not answer in time is killed."""

    def __init__(self, process: Process | None, timeout: float) -> None:
        self._process = process
        self._timeout = timeout

    def ask(self, line: str = "round") -> Any:
        """Request the next answer and return it; None if the worker died or took too long."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is read
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next answer without a request, such as the one of a ready worker; None if it died or took too long."""
        if self._process is None or self._process.stdout is None:
            return None
        watchdog = threading.Timer(self._timeout, _kill, [self._process])
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        return json.loads(line) if line else None


def environment(*, threads: int, gpu: bool, host: bool) -> dict[str, str]:
    """The environment of a worker: bounded threads, no GPU unless needed, no distributed run, no telemetry.

    `host` is whether it runs the training environment's interpreter; others must not get its import path.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*_DISTRIBUTED, *_OF_THE_PROGRAM))}
    if not host:
        kept = {name: value for name, value in kept.items() if name not in _OF_THE_HOST}
    if not gpu:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    kept |= dict.fromkeys(_THREADS, str(threads)) | _NO_TELEMETRY | _NO_FILES_AT_HOME
    return kept | {"PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def _without_secrets(log: Path) -> Iterator[None]:
    """Overwrite in a log, when the context exits, what `errors.secrets` finds in the environment: reports are shared.

    A log keeps its length, since another job may be appending to it.
    """
    try:
        yield
    finally:
        if secret := [value.encode(errors="surrogateescape") for value in secrets()]:
            with contextlib.suppress(OSError):
                _overwrite(log, secret)


def _overwrite(log: Path, secret: Sequence[bytes]) -> None:
    text = log.read_bytes()
    found = [(match.start(), len(value)) for value in secret for match in re.finditer(re.escape(value), text)]
    with log.open("r+b") as file:
        for start, length in found:
            file.seek(start)
            file.write(b"*" * length)


def _ends_within(process: Process, timeout: float, must_end: Callable[[], object]) -> bool:
    """Wait for the end of a process, unless it must end; time without a processor does not count."""
    start, left = time.monotonic(), timeout
    while left > 0 and not must_end():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(left, _LOOK_SECONDS))
            return True
        left = timeout + waited_seconds(process.pid) - (time.monotonic() - start)
    return False


def _read(result: Path, returncode: int, ran_out: int) -> JobResult:
    """The result of a job; `ran_out` is how often memory had run out before it."""
    if result.exists():
        found = read_json(result)
        return JobResult(found.get("value"), found.get("error", ""), found.get("error_kind", ""), found["seconds"])
    why = ", since the disk is full" if disk.is_full(result.parent) else ""
    if returncode < 0:
        name = _signal(-returncode)
        if name == "SIGKILL" and oom.oom_kill_count() > ran_out:
            why = ", since memory ran out"
        return JobResult(error=f"killed by {name}{why}", kind="crashed")
    return JobResult(error=f"ended with exit code {returncode} and no result{why}", kind="crashed")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill(process: Process) -> None:
    """Kill a worker and its children; if it has ended already, only its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
