"""The servers of an engine: their life, their memory limit, and their children as processes.

A server (see `polyexport.workers.server`) is kept for each set of imports. It only saves time: if there is none, for
whatever reason, a job's process is spawned.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from polyexport.workers import oom
from polyexport.workers.priority import processor_seconds
from polyexport.workers.server import Order, send

SWITCH = "POLYEXPORT_SERVERS"
"""The environment variable that turns servers off: 0."""

_SHARE = 0.25
"""Share of the memory that is free without servers which all servers together may use."""

_STANDS_STILL_SECONDS, _STARTS_WITHIN_SECONDS = 30.0, 300.0
"""A server is waited for until it has been idle for so long, or was started so long ago."""

_LOOK_SECONDS = 1.0

_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1"}
"""Modules that would start threads when they are imported."""


class Child:
    """A job's process that a server forked, with the interface of `subprocess.Popen`.

    Attributes:
        pid: The id of the process and of its process group.
        stdin: Its standard input.
        stdout: Its standard output, if that is a pipe.
        returncode: Its exit code, or the negative number of the signal that ended it; None while it runs.
        lost: Whether its server ended before it.
    """

    def __init__(self, told: IO[bytes], stdin: IO[bytes], stdout: IO[bytes] | None) -> None:
        self.stdin, self.stdout = stdin, stdout
        self.returncode: int | None = None
        self.lost = False
        self._told, self._lines = told, bytearray()
        self._lock = threading.Lock()
        pid = self._line(None)
        if pid is None:
            raise OSError("its server has ended")
        self.pid = pid

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        with self._lock:
            if self.returncode is None:
                code = self._line(timeout)
                self.lost = code is None
                self.returncode = -signal.SIGKILL if code is None else code
                self._told.close()
            return self.returncode

    def kill(self) -> None:
        """Kill it, but not its children."""
        os.kill(self.pid, signal.SIGKILL)

    def _line(self, timeout: float | None) -> int | None:
        """The next number that the server sends about it; None if the server ended first."""
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._lines:
            if not _readable(self._told, None if end is None else end - time.monotonic()):
                raise subprocess.TimeoutExpired("a child of a server", timeout or 0.0)
            part = os.read(self._told.fileno(), 64)
            if not part:
                return None
            self._lines += part
        line, _, self._lines = self._lines.partition(b"\n")
        return int(line)


def _readable(file: IO[bytes] | socket.socket, seconds: float | None) -> bool:
    """Whether a read will not block, after waiting at most so many seconds; None for no limit."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1e3))


Process = subprocess.Popen[bytes] | Child

Start = Callable[[Sequence[str], int, Mapping[str, str]], AbstractContextManager[subprocess.Popen[bytes] | None]]
"""Starts a process with a command, standard input and environment; None after all were ended."""


@dataclass(slots=True)
class Server:
    """One server, as the engine sees it.

    Attributes:
        words: The command that starts it.
        why_not: Why it cannot fork; empty if it can, None before it is ready.
        held_bytes: Its memory in bytes.
        imported: What it has imported.
        users: How many jobs have or will get a child of it.
        used: When a job last requested it, on the monotonic clock.
    """

    words: tuple[str, ...]
    why_not: str | None = None
    held_bytes: int = 0
    imported: tuple[str, ...] = ()
    users: int = 0
    used: float = 0.0
    _connection: socket.socket | None = None
    _pid: int = 0
    _began: float = 0.0
    _heard: bytes = b""
    _opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, start: Start, environment: Mapping[str, str]) -> str:
        """Start it if needed, and wait until it is ready, as long as it makes progress; returns `why_not`."""
        with self._lock:
            if self.why_not is None and self._connection is None:
                self._begin(start, environment)
            connection = self._connection if self.why_not is None else None
        ready = connection is None or self._answers(connection)
        with self._lock:
            if self.why_not is None and not ready:
                self.why_not = "its server made no progress while it started"
                self._opened.close()
        self.hear()
        return self.why_not or ""

    def hear(self) -> None:
        """Read what it has sent by now: what it has imported, its memory, and whether it can fork."""
        with self._lock:
            if self._connection is None or self.why_not:
                return
            while not self.why_not and _readable(self._connection, 0):
                part = self._connection.recv(1 << 16)
                *lines, rest = (self._heard + part).split(b"\n")
                self._heard = rest
                if lines or not part:
                    self.why_not = self._told(lines[-1]) if lines else "its server ended"
            if self.why_not:
                self.held_bytes = 0
                self._opened.close()

    def _begin(self, start: Start, environment: Mapping[str, str]) -> None:
        ours, its = socket.socketpair()
        self._opened.callback(ours.close)
        with its:
            process = self._opened.enter_context(start(self.words, its.fileno(), {**environment, **_NO_THREADS}))
        if process is None:
            self.why_not = "all were ended"
            self._opened.close()
            return
        self._connection, self._pid, self._began = ours, process.pid, time.monotonic()

    def _answers(self, connection: socket.socket) -> bool:
        """Whether it answers; waiting is worth it, since a new process would have to import the same."""
        used, since = 0.0, time.monotonic()
        # the connection is closed: the server was ended meanwhile, and `why_not` says so
        with contextlib.suppress(ValueError):
            while self.why_not is None and not _readable(connection, min(_LOOK_SECONDS, _STANDS_STILL_SECONDS)):
                before, used, now = used, processor_seconds(self._pid), time.monotonic()
                since = now if used > before else since
                if now > min(since + _STANDS_STILL_SECONDS, self._began + _STARTS_WITHIN_SECONDS):
                    return False
        return True

    def _told(self, line: bytes) -> str:
        """Take over one line of it; returns why it cannot fork."""
        about = json.loads(line)
        if about["threads"]:
            return f"its server has other threads ({', '.join(about['threads'])}), so a fork is not safe"
        self.held_bytes, self.imported = about["bytes"], tuple(about["imported"])
        return ""

    def fork(self, job: Path, stdout: Any, stderr: IO[bytes], environment: Mapping[str, str]) -> Child:
        """Fork a child for a job.

        Raises:
            OSError: the server has ended.
        """
        with self._lock:
            if self._connection is None or self.why_not:
                raise OSError(self.why_not or "its server has ended")
            order = Order(str(job), working_folder(), environment)
            its_input, stdin = _pipe()
            answers, its_output = _pipe() if stdout == subprocess.PIPE else (None, stderr)
            told, tells = _pipe()
            try:
                streams = (its_input.fileno(), its_output.fileno(), stderr.fileno())
                with its_input, tells, contextlib.nullcontext() if answers is None else its_output:
                    send(self._connection, order, streams, tells.fileno())
                return Child(told, stdin, answers)
            except OSError:
                self.why_not, self.held_bytes = "its server has ended", 0
                for file in (stdin, told, *([answers] if answers else [])):
                    file.close()
                raise

    def end(self, why: str) -> None:
        """End it and its children, and fork no more; `why` becomes `why_not`."""
        with self._lock:
            self.why_not, self.held_bytes, self._connection = why, 0, None
            self._opened.close()


def working_folder() -> str:
    """The current folder; if it was removed, the root, since libraries such as MKL cannot be loaded without one."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.path.abspath(os.sep)


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    """The read end and the write end of a pipe."""
    read, write = os.pipe()
    return os.fdopen(read, "rb"), os.fdopen(write, "wb")


class Servers:
    """The servers of an engine, by import path, command and imports.

    Args:
        start: Starts a process; see `Start`.
        on: Whether servers are used; by default as the environment variable says.
    """

    def __init__(self, start: Start, *, on: bool | None = None) -> None:
        self._start = start
        self._on = os.environ.get(SWITCH) != "0" if on is None else on
        self._servers: dict[tuple[str, ...], Server] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lent(
        self, command: Sequence[str], imports: Sequence[str], environment: Mapping[str, str]
    ) -> Iterator[tuple[Server | None, str]]:
        """A server for one job, started now if needed, or None; and a line on how the job's process is made."""
        if why_not := self._cannot(imports):
            yield None, f"spawned, since {why_not}"
            return
        server = self._of(command, imports, environment)
        with self._lock:
            server.users, server.used = server.users + 1, time.monotonic()
        try:
            why_not = server.start(self._start, environment) or self._without_memory(server, users=1)
            if why_not:
                yield None, f"spawned, since {why_not}"
            else:
                yield server, f"forked by a server that has imported {', '.join(server.imported)}"
        finally:
            with self._lock:
                server.users -= 1

    def warm(self, command: Sequence[str], imports: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a server that will be needed, and wait until it is ready."""
        if not self._cannot(imports):
            server = self._of(command, imports, environment)
            if not server.start(self._start, environment):
                self._without_memory(server, users=0)

    @property
    def ready(self) -> tuple[Server, ...]:
        """The servers that can fork."""
        with self._lock:
            return tuple(each for each in self._servers.values() if each.held_bytes)

    def close(self) -> None:
        """End all servers."""
        with self._lock:
            servers = tuple(self._servers.values())
        for server in servers:
            server.end("all were ended")

    def _of(self, command: Sequence[str], imports: Sequence[str], environment: Mapping[str, str]) -> Server:
        """The server of a command and its imports, for the import path in the environment."""
        words = (*command, "--server", *imports)
        with self._lock:
            return self._servers.setdefault((environment.get("PYTHONPATH", ""), *words), Server(words))

    def _cannot(self, imports: Sequence[str]) -> str:
        if not self._on:
            return f"servers are off ({SWITCH}=0)"
        if sys.platform != "linux":
            return f"a fork is not safe on {sys.platform}"
        return "" if imports else "no imports are declared for it"

    def _without_memory(self, server: Server, *, users: int) -> str:
        """Why this server was ended, if all together exceed their limit: the least recently used is ended first.

        Servers with running jobs are not ended; `users` of `server` are jobs without a child yet.
        """
        with self._lock:
            for each in self._servers.values():
                each.hear()
            running = [each for each in reversed(self._servers.values()) if each.held_bytes]
            held = sum(each.held_bytes for each in running)
            most = int(_SHARE * (oom.free_bytes() + held))
            for each in sorted(running, key=lambda each: each.used):
                if held > most and each.users == (users if each is server else 0):
                    held -= each.held_bytes
                    each.end(f"servers may hold {most / 1e9:.2f} GB of memory here")
            return server.why_not or ""
