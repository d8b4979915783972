"""The engine: takes requests, and builds them one after another in the background into finished folders.

Requirements:
* `submit` returns at once. One request is built at a time; a newer one replaces one that still waits.
* A folder appears under its name only when it is complete; `best` points to the newest complete one.
* An earlier export of the same checkpoint with the same request, validation batch and outputs of PyTorch is reused if
  every format agreed, or was skipped for hardware that is still missing. Otherwise the export is repeated, since what
  failed or was missing may work now.
* Nothing is left running after `close`. The newest export that it interrupts stays, for `resume`.
* At most two checkpoints are kept for exports at any time: the one that is exported, and the newest that waits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyexport.capture.code import import_path
from polyexport.capture.weights import SHARDS, WEIGHTS
from polyexport.engine import plan
from polyexport.engine.bench import bench, sweep
from polyexport.engine.dispatch import PREPARE, PREPARE_LOG, Dispatcher, Limits, prepared_with, verifies, with_libraries
from polyexport.engine.earlier import beside_what_is_there, finished_before, prune
from polyexport.engine.explain import explained, layers
from polyexport.engine.labels import with_labels
from polyexport.engine.options import check_limits
from polyexport.engine.request import Request, declare, write
from polyexport.engine.rerun import Runnable, mends, remade, runnables, runner, settled, signature, verify
from polyexport.engine.results import describe, describe_artifact, not_rebuilt, reported
from polyexport.engine.routes import Build
from polyexport.engine.without_steps import parts
from polyexport.errors import BadRequest, ToolMissing, line
from polyexport.format import Format
from polyexport.formats import known
from polyexport.load import described
from polyexport.measure.latency import Latency
from polyexport.measure.layers import Layer
from polyexport.measure.reference import Reference
from polyexport.report.files import save
from polyexport.report.folders import (
    BEST,
    check_links,
    clear,
    discard,
    let_go,
    lies_elsewhere,
    may_point_best,
    point_best,
    take_place,
)
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report
from polyexport.report.tables import sentence
from polyexport.serialization import decode
from polyexport.spec import Runner
from polyexport.versions import git_commit
from polyexport.workers import toolchain
from polyexport.workers.job import Prepare
from polyexport.workers.process import JobResult, Workers, environment
from polyexport.workers.remote import Elsewhere
from polyexport.workers.servers import Server
from polyexport.workers.toolchain import Toolchain


class Engine:
    """Builds exports in worker processes.

    Args:
        workers: How many jobs run side by side; by default half the cores, at least two.
        timeout: Seconds that one conversion or verification may take, without those in which it has no processor.
        background: Whether training runs at the same time, until `hurry` is called: workers then have the lowest
            priority.
        executor: Runs the jobs on other machines: anything with `submit(function, *arguments)` that returns a future.
            Latency is measured on this machine.
        staging: An fsspec URL that this machine and the executor's can reach, through which files travel; without one
            they travel through the executor.
        libraries: Python modules that jobs import to rebuild the user's module, for the servers to import early; see
            `polyexport.capture.code.libraries`.
        tell: Called with one line about each format when it is finished, from threads of the engine: it must be quick
            and thread-safe, as a deque's `append` or `print` are.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        timeout: float = 600.0,
        background: bool = False,
        executor: Any = None,
        staging: str | None = None,
        libraries: tuple[str, ...] = (),
        tell: Callable[[str], object] | None = None,
    ) -> None:
        check_limits(workers, timeout, executor, staging)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = workers if workers is not None else max(2, cores // 2)
        self._elsewhere = None if executor is None else Elsewhere(executor, staging)
        self._cores = cores
        self._limits = Limits(timeout=timeout, threads=max(1, cores // count))
        self._workers = Workers(background=background)
        self._slots = ThreadPoolExecutor(count, thread_name_prefix="polyexport-slot")
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="polyexport-queue")
        self._waiting: tuple[Future[Report], Request] | None = None
        self._lock = threading.Lock()
        self._doing: dict[str, str] = {}
        # shared servers would be one more for each module
        self._libraries = libraries if self._workers.own_servers else ()
        self._tell = tell
        self._unfinished: list[Path] = []  # the newest last
        # deleting the last link to a large checkpoint, or pickling, may take longer than training may wait
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="polyexport-aside")
        self._removal: Future[None] | None = None

    def submit(self, request: Request) -> Future[Report]:
        """Queue a request; a waiting one is cancelled and its folder removed."""
        self.supersede()
        try:
            if request.held and "://" not in request.held:
                lies_elsewhere(request.work, Path(request.held))
            write(request)
        except OSError:
            discard(request.work)
            raise
        with self._lock:
            self._unfinished.append(request.work)
            self._aside.submit(declare, request)
            future = self._queue.submit(self._export, request)
            self._waiting = (future, request)
        return future

    def warm(self, formats: Iterable[Format], *, timed: bool = True) -> threading.Thread:
        """Start the servers for the jobs of these formats, one after another, in the background.

        A toolchain that is not installed yet is left out. Each export does the same; call this where the formats are
        known earlier. Returns the thread that does it, to be joined if needed.

        Args:
            formats: What will be exported.
            timed: Whether artifacts will be timed, for which some toolchains have a server with fewer imports.
        """
        thread = threading.Thread(target=self._warm, args=(tuple(formats), timed), name="polyexport-warm", daemon=True)
        thread.start()
        return thread

    def install(self, chain: Toolchain, say: Callable[[str], None], *, patience: float) -> None:
        """Install a toolchain that is missing; `close` interrupts it. See `Toolchain.interpreter` for the arguments."""
        chain.interpreter(say, self._workers, patience=patience)

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers that are ready now."""
        return self._workers.servers

    def _warm(self, formats: tuple[Format, ...], timed: bool) -> None:
        if self._elsewhere is not None:
            return
        chains = dict.fromkeys(chain for chains in plan.toolchains(formats).values() for chain in chains)
        for chain in (toolchain.HOST, *chains):
            if not chain.ready or self._workers.closed:
                continue
            around = environment(threads=self._limits.threads, gpu=False, host=chain.in_host)
            with contextlib.suppress(ToolMissing, OSError):  # the job that needs it reports it
                converts, runs = (with_libraries(chain, self._libraries, converts=each) for each in (True, False))
                self._workers.warm(chain.command(self._workers), converts, around)
                if runs != converts and (timed or not verifies(chain)):
                    self._workers.warm(chain.command(self._workers), runs, around)

    def supersede(self) -> bool:
        """Drop the request that waits, since a newer one is coming; returns whether every dropped one has been removed.

        Removal happens in the background. A caller that takes a new checkpoint only once this returns True keeps at
        most two.
        """
        with self._lock:
            if self._waiting is not None and self._waiting[0].cancel():
                self._removal = self._aside.submit(self._remove, self._waiting[1].work)
            self._waiting = None
            return self._removal is None or self._removal.done()

    def leftover(self, parent: Path) -> Path | None:
        """Remove what killed runs left in `parent`, in the background.

        Returns:
            The one export among it that can be resumed, which stays; None if there is none.
        """
        return clear(parent, lambda folder: self._aside.submit(discard, folder))

    def hurry(self) -> None:
        """Training is over: raise the workers to normal priority."""
        self._workers.hurry()

    @property
    def doing(self) -> Mapping[str, str]:
        """What is being done right now: a few words for each format name."""
        return dict(self._doing)

    def close(self) -> Path | None:
        """End every worker; keep only the newest unfinished folder, and return it. Can be called twice."""
        self._queue.shutdown(wait=False, cancel_futures=True)  # no queued request starts when the current one is ended
        self._workers.end_all()
        self._queue.shutdown(wait=True)
        self._slots.shutdown(wait=True, cancel_futures=True)
        self._aside.shutdown(wait=True)
        for folder in self._unfinished[:-1]:
            self._remove(folder)
        for folder in self._unfinished:
            let_go(folder)
        return next(iter(self._unfinished), None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- one request --------------------------------------------------------------------------------------------------

    def _export(self, request: Request) -> Report:
        self.warm(request.formats, timed=False)
        request = beside_what_is_there(request)
        limits = replace(self._limits, spare=request.spare)
        dispatcher = self._dispatcher(request.work, request.final, limits, self._elsewhere)
        return self._exported(request, replace(dispatcher, sys_path=request.sys_path))

    def _exported(self, request: Request, dispatcher: Dispatcher) -> Report:
        start = time.perf_counter()
        ended = self._prepared(request, dispatcher)
        if not ended.ok:
            return self._finish(request, not_rebuilt(request, ended), start)
        reference = decode(Reference, ended.value)
        # the shards are joined by now, here or on another machine
        shutil.rmtree(request.work / "source" / SHARDS, ignore_errors=True)
        if (earlier := finished_before(request, reference)) is not None:
            return self._in_place_of(request, earlier)
        reference = with_labels(request, reference)
        watch = functools.partial(self._watch, of=f"{request.name} ")
        build = Build(dispatcher, request.formats, reference, watch, parts(request, reference, dispatcher))
        report = reported(request, reference, build.outcomes(), build.notes)
        describe(request, report, reference, build.references)
        there = replace(report, folder=request.work)
        report = explained(there, _by_name(request.formats), dispatcher, self._watch)
        return self._finish(request, report, start)

    def _prepared(self, request: Request, dispatcher: Dispatcher) -> JobResult:
        """Run PyTorch on the request's weights; the result's value is a `Reference`."""
        self._watch("model", "running PyTorch")
        # a resumed request may have the weights already
        if request.held and not (request.work / "source" / WEIGHTS).exists():
            _fetch(request.held, request.work / "source")
        commit = git_commit() if request.commit is None else request.commit
        job = Prepare(dynamic=request.dynamic, git_commit=commit, sha256=request.checkpoint.sha256)
        ended = dispatcher.run(job, toolchain.HOST, PREPARE, PREPARE_LOG)
        self._watch("model", None)
        return ended

    def _in_place_of(self, request: Request, earlier: Report) -> Report:
        """Return an earlier export instead of making a new one."""
        self._remove(request.work)
        if earlier.folder == request.final.resolve():
            self._point(request)
        return earlier

    def _finish(self, request: Request, report: Report, start: float) -> Report:
        """Write the report, rename the folder, point `best` to it, and remove exports beyond `keep`."""
        if self._workers.closed:
            raise InterruptedError("the engine was closed")
        report = replace(report, seconds=time.perf_counter() - start, folder=request.work)
        save(report)
        # an export of an earlier checkpoint may have this name: the newer one replaces it
        take_place(request.work, request.final)
        self._unfinished.remove(request.work)
        if report.model is not None:  # else the previous export is still the best one
            self._point(request)
            prune(replace(report, folder=request.final), request.keep)
            if request.best:
                clear(request.final.parent)  # this export supersedes what interrupted runs left
        return replace(report, folder=request.final)

    def _point(self, request: Request) -> None:
        if request.best and may_point_best(request.final.parent / BEST):
            try:
                point_best(request.final)
            except OSError as error:  # it may be another user's; the export is complete
                if self._tell is not None:
                    self._tell(f"{request.name} is exported, but {BEST} cannot point to it: {line(error)}")

    def _watch(self, name: str, doing: str | Outcome | None, *, of: str = "") -> None:
        if isinstance(doing, str):
            self._doing[name] = doing
            return
        self._doing.pop(name, None)
        if doing is not None and self._tell is not None:
            self._tell(of + sentence(doing))

    def _remove(self, folder: Path) -> None:
        with contextlib.suppress(ValueError):  # `export` removes its folders itself, so it may not be listed
            self._unfinished.remove(folder)
        discard(folder)

    def bench(self, report: Report, formats: Iterable[Format] = ()) -> Report:
        """Time every artifact that runs, and eager PyTorch, on all cores; saves the report.

        Call it when the machine is idle: all workers run at normal priority.

        Args:
            report: A finished export.
            formats: The user's own `Format` values in it.
        """
        return bench(report, _by_name(formats), self._quiet(report), self._watch)

    def sweep(
        self, report: Report, formats: Iterable[Format] = (), *, trust: bool = True, most: int = 4096
    ) -> list[tuple[str, Latency]]:
        """Time every artifact that takes any batch at growing batch sizes; see `polyexport.engine.bench.sweep`.

        `trust`, here and below, is whether the export's files may be unpickled, which can run any code.
        """
        return sweep(report, _by_name(formats), self._quiet(report, trust=trust), self._watch, most=most)

    def verify(self, report: Report, formats: Iterable[Format] = (), *, trust: bool = True) -> Report:
        """Verify every artifact again; see `polyexport.engine.rerun.verify`."""
        return verify(report, _by_name(formats), self._quiet(report, trust=trust), self._watch)

    def layers(
        self, report: Report, name: str, formats: Iterable[Format] = (), *, trust: bool = True
    ) -> tuple[Layer, ...]:
        """The error of each layer of the module in the artifact, and of the outputs, which come last.

        Raises:
            BadRequest: the report has no artifact of that name that runs, or its format has no `intermediates`.
            CannotRun: PyTorch or the artifact does not run.
        """
        return layers(report, self._runnable(report, name, formats), self._quiet(report, trust=trust))

    def explained(self, report: Report, formats: Iterable[Format] = ()) -> Report:
        """The report with the layers of each artifact that disagrees; saved if there are any."""
        found = explained(report, _by_name(formats), self._quiet(report), self._watch)
        if found is not report:
            save(found)
        return found

    def mends(self, report: Report, name: str, formats: Iterable[Format] = ()) -> bool:
        """Whether an artifact can be made again with some of its layers in float; see `remade`."""
        return mends(report, self._runnable(report, name, formats))

    def remade(self, report: Report, name: str, share: float, formats: Iterable[Format] = ()) -> Outcome:
        """One artifact made and verified once more with that share of its layers in float, beside the other.

        Raises:
            CannotRun: it cannot be made.
        """
        self._watch(name, f"converting with {share:.1%} of its layers in float")
        try:
            return remade(report, self._runnable(report, name, formats), share, self._quiet(report))
        finally:
            self._watch(name, None)

    def settled(self, report: Report, outcome: Outcome, formats: Iterable[Format] = ()) -> Outcome:
        """Give an artifact that was made again the place of the one before."""
        found = settled(report, outcome, _by_name(formats)[outcome.format])
        describe_artifact(report.folder, found, report.checkpoint, signature(report, found.format))
        return found

    def _runnable(self, report: Report, name: str, formats: Iterable[Format]) -> Runnable:
        found = {each.name: each for each in runnables(report, _by_name(formats))}
        if name not in found:
            raise BadRequest(
                f"{report.folder} has no artifact {name!r} that runs; those that do: {', '.join(found) or 'none'}"
            )
        return found[name]

    def runner(
        self, report: Report, name: str, formats: Iterable[Format] = (), *, trust: bool = True
    ) -> AbstractContextManager[Runner]:
        """One artifact as a function, in a process of its own toolchain; see `polyexport.engine.rerun.runner`.

        Raises:
            BadRequest: the report has no artifact of that name that runs.
        """
        return runner(report, self._runnable(report, name, formats), self._quiet(report, trust=trust))

    @contextlib.contextmanager
    def opened(self, path: Path, *, trust: bool = True) -> Iterator[Runner]:
        """`runner` for an artifact without its export: a format's folder that was copied elsewhere, or the file in it.

        Raises:
            BadRequest: there is no artifact at `path`.
        """
        folder, about, each = described(path)
        with tempfile.TemporaryDirectory() as root:  # for the job's files and its log
            for name in ("source", "logs"):
                Path(root, name).mkdir()
            report = Report(about.checkpoint, None, (), folder=Path(root))
            tools = toolchain.find(each.runtime or each.routes[0].toolchain)
            alone = Runnable(str((folder / each.artifact).resolve()), each, tools, about.runner_spec)
            with runner(report, alone, self._quiet(report, trust=trust)) as run:
                yield run

    def _quiet(self, report: Report, *, trust: bool = True) -> Dispatcher:
        """A dispatcher for a finished export, whose jobs may use the whole machine."""
        self.hurry()
        if not trust:
            check_links(report.folder)
        whole = replace(self._limits, threads=self._cores)
        dispatcher = self._dispatcher(report.folder, report.folder, whole)
        if trust:  # without it nothing is unpickled, so nothing of it is imported
            trained = prepared_with(report.folder)
            further = tuple(entry for entry in trained if entry not in dispatcher.sys_path)
            dispatcher = replace(dispatcher, sys_path=(*dispatcher.sys_path, *further))
        return replace(dispatcher, trusted=trust)

    def _dispatcher(self, root: Path, final: Path, limits: Limits, elsewhere: Elsewhere | None = None) -> Dispatcher:
        path, libraries = import_path(), self._libraries
        return Dispatcher(root, final, self._workers, self._slots, limits, path, elsewhere, libraries=libraries)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _by_name(formats: Iterable[Format]) -> dict[str, Format]:
    """The built-in formats and the caller's own, by name."""
    return {each.name: each for each in (*known().values(), *formats)}


def _fetch(held: str, source: Path) -> None:
    """Move or copy the weights into `source`: a file, or a folder of shards."""
    import fsspec

    system, path = fsspec.url_to_fs(held)
    folder = system.isdir(path)
    target = source / (SHARDS if folder else WEIGHTS)
    if "://" in held:
        system.get(path, str(target), recursive=folder)
    else:
        shutil.move(held, target)
