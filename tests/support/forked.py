"""Training scripts in processes of their own, which do not pay for their imports.

They are forked from a process that has imported PyTorch, Lightning and us, and that has servers ready (see
`polyexport.workers.servers`), so that neither a script nor its workers spend ten seconds on imports.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import pytest

from polyexport.workers import process as workers

HERE = Path(__file__).parent


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # before Python 3.14 it gets no other import path
        forkserver.ensure_running()
    return context


def process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls a function, started."""
    made: BaseProcess = _context().Process(target=function, args=arguments)
    made.start()
    return made


def script(
    *words: str | Path, cwd: Path, environment: Mapping[str, str] | None = None, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `python *words` to its end. The first word is the script, or `-` for the text `typed`, its standard input."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("input", "output", "errors")]
        files[0].write_text(typed)
        ended = started(*words, cwd=cwd, environment=environment, files=files)
        ended.join()
        said = [file.read_text() for file in files[1:]]
    return subprocess.CompletedProcess([*map(str, words)], ended.exitcode or 0, *said)


def started(
    *words: str | Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    files: Sequence[Path],
    servers: Literal["shared", "own"] = "shared",
) -> BaseProcess:
    """A process that runs `python *words`, with files for its standard input, output and errors."""
    around = dict(os.environ if environment is None else environment)
    return process(_script, [*map(str, words)], str(cwd), around, [*map(str, files)], servers)


def _script(words: list[str], cwd: str, environment: Mapping[str, str], files: list[str], servers: str) -> None:
    """Become the process that runs a script, with an environment of its own and as the leader of a session."""
    os.setsid()
    if servers == "own":
        workers._shared = None
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, (file, how) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        os.dup2(os.open(file, how | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = main, words
    typed = words[0] == "-"
    source = Path(files[0] if typed else words[0]).read_text()
    if not typed:
        main.__file__ = words[0]
    own = "" if typed else str(Path(words[0]).absolute().parent)
    sys.path[:] = [own, *(entry for entry in sys.path if entry != str(HERE))]
    try:
        exec(compile(source, "<stdin>" if typed else words[0], "exec"), vars(main))
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves that out; W&B writes the end of a run there
