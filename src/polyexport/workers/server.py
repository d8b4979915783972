"""A server, as it runs in a toolchain: imports what the toolchain's jobs need, then forks a child for each job.

    python -m polyexport.worker --server torch + torch.onnx

Requirements:
* Nothing is ever converted or run here, so a child is as fresh as a new process. What is imported here is named on the
  command line; a user's modules are imported in the child.
* A child has its own process group, standard streams, environment and temporary folder; it ends with this process, and
  this process ends with the one that started it.
* Only the thread that forks survives in a child: if an import starts another, the server starts again without that and
  those between it and `LATER`. It reports the threads that it has in spite of this, and the engine forks no more.
* The first jobs need not wait for all imports: those after `LATER` are done one by one, whenever no job waits.

Only the standard library is imported, as in `polyexport.worker`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyexport.workers.job import PARENT, TEMPORARY

LATER = "+"
"""Separates the imports that every job needs from those that are done while the first jobs run."""

later_bytes = 0
"""Memory that the imports after `LATER` have taken, for a child not to count it as that of what it measures."""

_FILES = 5  # the three standard streams, the pipe for the exit code, the order itself
_LOOK_SECONDS = 0.5
_END_SECONDS = 0.2  # in which a thread that has done its work ends
_ORDER_SECONDS = 0.05  # in which the engine orders a job that was only waiting for this server


@dataclass(frozen=True, slots=True)
class Order:
    """One job: its file, the working folder, and the whole environment of its process."""

    job: str
    folder: str
    environment: Mapping[str, str]


def send(connection: socket.socket, order: Order, streams: Sequence[int], told: int) -> None:
    """Request a child process, in one byte that files come with: two processes that share the connection mix nothing.

    Args:
        connection: The connection to the server.
        order: The job.
        streams: File descriptors of its standard input, output and error.
        told: The write end of a pipe that gets two lines: the child's process id, and then its exit code as in
            `subprocess.Popen`; it is closed without them if the server ends first, or cannot fork.
    """
    with os.fdopen(os.memfd_create("order"), "wb") as file:
        text = json.dumps([order.job, order.folder, dict(order.environment)], ensure_ascii=False)
        file.write(os.fsencode(text))  # paths and environment, which may be in the locale's encoding here
        file.flush()
        socket.send_fds(connection, [b"!"], [*streams, told, file.fileno()])


def _receive(connection: socket.socket) -> tuple[Order, list[int]] | None:
    """The next order and its four files; None if the connection is closed."""
    head, files, _, _ = socket.recv_fds(connection, 1, _FILES)
    if not head:
        return None
    with os.fdopen(files.pop(), "rb") as file:
        file.seek(0)
        return Order(*json.loads(os.fsdecode(file.read()))), files


def run(imports: Sequence[str], work: Callable[[Path], int]) -> int:
    """Run a server whose connection is standard input; `work` runs a job in a child and returns its exit code.

    Each line that it sends has what it has imported, the names of its other threads, and its memory in bytes: the first
    line before its first job, and a further one after each later import.
    """
    parent = int(os.environ.get(PARENT, 0)) or os.getppid()
    first, later = split(imports)
    gc.disable()  # imports make little garbage, and looking for it takes a fifth of their time
    with _ends_with(parent):
        before = _further_threads()
        for index, name in enumerate(first):
            _import(name)
            if index and _lasting_threads(before) != before:
                _start_again(imports, [*first[:index], LATER, *later])
    with socket.socket(fileno=os.dup(0)) as connection:
        _report(connection, first)
        return _serve(connection, parent, work, first, later)


def split(imports: Sequence[str]) -> tuple[list[str], list[str]]:
    """The imports before `LATER`, and those after it."""
    at = imports.index(LATER) if LATER in imports else len(imports)
    return list(imports[:at]), list(imports[at + 1 :])


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:  # a job that needs the module raises the same error, and reports it
        traceback.print_exc()


def _import_later(name: str) -> None:
    global later_bytes
    before = _resident_bytes()
    _import(name)
    later_bytes += _resident_bytes() - before


def _report(connection: socket.socket, imported: Sequence[str]) -> None:
    gc.freeze()  # so that a child's garbage collection does not copy the shared pages
    sys.stdout.flush()
    sys.stderr.flush()
    about = json.dumps({"imported": imported, "threads": _lasting_threads(), "bytes": _resident_bytes()})
    connection.sendall(about.encode() + b"\n")


def _start_again(imports: Sequence[str], kept: Sequence[str]) -> None:
    """Replace this process by a server that imports `kept` only: another import has started threads."""
    command = sys.orig_argv[: len(sys.orig_argv) - len(imports)]
    os.execv(sys.executable, [*command, *kept])


@contextlib.contextmanager
def _ends_with(parent: int) -> Iterator[None]:
    """End this process with its parent, watched by a thread that stops when the context exits."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            if os.getppid() != parent:
                _leave_nothing()
                os._exit(1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _leave_nothing() -> None:
    if folder := os.environ.get(TEMPORARY):
        shutil.rmtree(folder, ignore_errors=True)


def _serve(
    connection: socket.socket, parent: int, work: Callable[[Path], int], imported: list[str], later: list[str]
) -> int:
    children: dict[int, _Forked] = {}
    woken, wakes = os.pipe()
    for end in (woken, wakes):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: _reap(children))  # in the middle of an import too
    while os.getppid() == parent:
        ready, _, _ = select.select([connection.fileno(), woken], [], [], _ORDER_SECONDS if later else _LOOK_SECONDS)
        if woken in ready:
            os.read(woken, 4096)
        _reap(children)
        if connection.fileno() not in ready:
            if later and _lasting_threads():
                later.clear()  # no job is forked anymore that could use them
            elif later:
                imported.append(later.pop(0))
                _import_later(imported[-1])
                _report(connection, imported)
            continue
        received = _receive(connection)
        if received is None:
            break
        order, files = received
        if _lasting_threads():  # of a later import, which the engine has not heard of yet
            for file in files:
                os.close(file)
            continue
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for file in (connection.detach(), woken, wakes, *(child.told for child in children.values())):
                os.close(file)
            _become(order, files)
            return work(Path(order.job))
        children[pid] = _Forked(files.pop(), order.environment[TEMPORARY])
        for file in files:
            os.close(file)
    for pid, child in tuple(children.items()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(child.temporary, ignore_errors=True)
    _leave_nothing()
    return 0


@dataclass(frozen=True, slots=True)
class _Forked:
    """A running child: the pipe for its exit code, and its folder for temporary files."""

    told: int
    temporary: str


def _become(order: Order, files: Sequence[int]) -> None:
    """Make this forked process like a new one."""
    os.setpgid(0, 0)
    os.write(files[-1], f"{os.getpid()}\n".encode())
    for number, file in enumerate(files[:-1]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update({**order.environment, PARENT: str(os.getppid())})
    gc.enable()
    sys.argv[1:] = [order.job]
    tempfile.tempdir = None
    with contextlib.suppress(OSError):  # the working folder may be gone, as it may be for a new process
        os.chdir(order.folder)


def _reap(children: dict[int, _Forked]) -> None:
    """Report the exit code of every child that has ended; a call may interrupt another."""
    for pid in tuple(children):
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # the interrupted call has its exit code
            continue
        if found:
            told = children.pop(pid).told
            with contextlib.suppress(OSError):  # nobody waits for it anymore
                os.write(told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os.close(told)


def _lasting_threads(known: Sequence[str] = ()) -> list[str]:
    """The names of `_further_threads`, after a short wait for those that end, unless they are `known`.

    A thread that has been joined may be seen for a moment: Python does not wait for its end in the operating system.
    """
    end = time.monotonic() + _END_SECONDS
    while (names := _further_threads()) != list(known) and time.monotonic() < end:
        time.sleep(0.002)
    return names


def _further_threads() -> list[str]:
    """The names of this process's threads other than the main one."""
    own, names = str(os.getpid()), []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if thread.name != own:
                names.append((thread / "comm").read_text(encoding="utf-8", errors="replace").strip())
    return sorted(names)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * int(os.sysconf("SC_PAGE_SIZE"))
