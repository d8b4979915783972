"""Jobs of one export folder: written into it as files, and run by workers in the toolchain that each needs."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from polyexport.capture.code import by_value, script
from polyexport.format import Format
from polyexport.formats import known
from polyexport.workers import toolchain
from polyexport.workers.job import Bench, Convert, FormatJob, Job, Prepare, Verify, read_job, reproduce, write_job
from polyexport.workers.process import Conversation, JobResult, Workers, environment
from polyexport.workers.remote import Elsewhere, Task, run
from polyexport.workers.server import LATER, split
from polyexport.workers.toolchain import Toolchain


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources that a worker may use; `spare` bytes of the disk have to stay free while training runs."""

    timeout: float
    threads: int
    spare: int = 0


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """Runs jobs for one export folder.

    Attributes:
        root: The export's folder.
        final: The folder's path once the export is complete.
        workers: The worker processes.
        slots: Runs as many jobs at once as there are slots.
        limits: The resources of each worker.
        sys_path: The training process's import path.
        elsewhere: Where jobs run; None for this machine.
        trusted: Whether files of the folder may be unpickled.
        libraries: Python modules that jobs import to rebuild the user's module; see `capture.code.libraries`.
    """

    root: Path
    final: Path
    workers: Workers
    slots: Executor
    limits: Limits
    sys_path: tuple[str, ...]
    elsewhere: Elsewhere | None = None
    trusted: bool = True
    libraries: tuple[str, ...] = ()

    def run(self, job: Job, chain: Toolchain, name: str, log: str, *, gpu: bool = False) -> JobResult:
        """Run a job when a slot is free."""
        if self.elsewhere is not None:
            return self._run_elsewhere(self.elsewhere, job, chain, name, log, gpu=gpu)
        try:
            command = chain.command(self.workers)
        except Exception as error:  # whatever the error, an environment that cannot be made is a missing tool
            return JobResult(error=str(error), kind="missing")
        path = self._write(job, chain, name)
        around = environment(threads=self.limits.threads, gpu=gpu, host=chain.in_host)
        again = reproduce(command, self.final / path.relative_to(self.root))
        done = self.slots.submit(
            self.workers.run,
            command,
            path,
            self.root / log,
            timeout=self.limits.timeout,
            environment=around,
            imports=imports(chain, job, self.libraries, gpu=gpu),
            spare=self.limits.spare,
        )
        return replace(done.result(), command=again)

    def _run_elsewhere(
        self, elsewhere: Elsewhere, job: Job, chain: Toolchain, name: str, log: str, *, gpu: bool
    ) -> JobResult:
        path = self._write(job, chain, name)
        relative = path.relative_to(self.root)
        final = str(self.final / relative)
        task = Task(relative.as_posix(), log, final, chain, self.limits.timeout, self.limits.threads, gpu)
        return self.slots.submit(run, elsewhere, self.root, job, task, lambda: self.workers.closed).result()

    @contextlib.contextmanager
    def converse(self, job: Job, chain: Toolchain, name: str, log: str, *, gpu: bool = False) -> Iterator[Conversation]:
        """Start a job that answers requests one by one, and yield the conversation with it."""
        path = self._write(job, chain, name)
        around = environment(threads=self.limits.threads, gpu=gpu, host=chain.in_host)
        with self.workers.conversation(
            chain.command(self.workers),
            path,
            self.root / log,
            timeout=self.limits.timeout,
            environment=around,
            imports=imports(chain, job, self.libraries, gpu=gpu),
        ) as talk:
            yield talk

    def declared(self, each: Format) -> str | None:
        """Path of a user's own `Format`, relative to the export's folder; None for a built-in one. See `declared`."""
        (self.root / "source").mkdir(exist_ok=True)
        path = declared(self.root, each)
        return path.relative_to(self.root).as_posix() if path else None

    def _write(self, job: Job, chain: Toolchain, name: str) -> Path:
        """Write a job's file."""
        path = self.root / "source" / "jobs" / f"{name}.json"
        own = self.sys_path if chain.in_host or chain.layered else ()
        write_job(path, replace(job, threads=self.limits.threads, sys_path=own, script=script()))
        return path


PREPARE, PREPARE_LOG = "prepare", "logs/model.log"
"""The name of an export's first job, which runs PyTorch, and its log file in the export."""


def prepared_with(root: Path) -> tuple[str, ...]:
    """The import path of the process that trained the module of the export at `root`; empty if it is not known."""
    try:
        return read_job(root / "source" / "jobs" / f"{PREPARE}.json").sys_path
    except (OSError, ValueError, KeyError, TypeError):  # it is no job's file, or another version's
        return ()


def imports(chain: Toolchain, job: Job, libraries: tuple[str, ...] = (), *, gpu: bool) -> tuple[str, ...]:
    """What a server may import before it forks for a job: nothing where that may initialize the GPU's driver.

    Nobody knows what a user's own format needs of its toolchain, so nothing is imported for one where the imports would
    be measured as its memory.
    """
    own = isinstance(job, FormatJob) and job.declared is not None
    if gpu or (own and isinstance(job, Bench)):
        return ()
    converts = isinstance(job, Prepare | Convert) or (isinstance(job, Verify) and verifies(chain))
    return with_libraries(chain, libraries, converts=own or converts)


def with_libraries(chain: Toolchain, libraries: tuple[str, ...], *, converts: bool) -> tuple[str, ...]:
    """What a toolchain's server imports: `libraries` too, if the user's module is rebuilt in its children."""
    found = chain.imports(converts=converts)
    rebuilds = chain is toolchain.HOST or found == toolchain.HOST.imports(converts=True)
    if not rebuilds:
        return found
    first, later = split(found)
    return (*first, *libraries, LATER, *later)


def verifies(chain: Toolchain) -> bool:
    """Whether the server for conversions has imported what a run needs, so that verifications are forked from it.

    It is there already, and has imported more of what they need. Their memory is not measured.
    """
    return {*chain.imports(converts=False)} <= {*chain.imports(converts=True)}


def declared(root: Path, each: Format) -> Path | None:
    """Write a user's own `Format`, pickled by value so that a worker need not import it; None for a built-in one."""
    if known().get(each.name) is each:
        return None
    path = declared_file(root, each.name)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(_by_value(each))
    return temporary.replace(path)


def declared_file(root: Path, name: str) -> Path:
    """Path of the pickle of a user's own `Format` in an export."""
    return root / "source" / "formats" / f"{name}.pkl"


def _by_value(each: Format) -> bytes:
    import cloudpickle

    functions = [
        each.lacks,
        each.could_use,
        *(route.convert for route in each.routes),
        *filter(None, [each.load, each.intermediates]),
    ]
    # toolchains are pickled by name: the module of their class imports more than an isolated toolchain has
    routes = tuple(replace(route, toolchain=toolchain.find(route.toolchain).name) for route in each.routes)
    with by_value() as take_along:
        for name in {function.__module__ for function in functions if not function.__module__.startswith("polyexport")}:
            take_along(name)
        pickled: bytes = cloudpickle.dumps(replace(each, routes=routes, runtime=None))
    return pickled
