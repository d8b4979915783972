"""A training run's interface to the engine: take the inputs once, offer each new best checkpoint, finish, close.

A trainer (Lightning, Fabric, a loop of your own) gives a `Session` what forward receives, the path of each new best
checkpoint, and the end of training. Nothing here imports a trainer.

Requirements:
* `take` and `offer` leave the module and the random state as they are, and cost training next to nothing.
* At most two checkpoints are kept at any time: the one that is exported, and the newest that waits.
* An error in one export is passed to `warn`, and the others go on.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport import errors
from polyexport.capture import answer as answers
from polyexport.capture.calls import save_call
from polyexport.capture.changes import beside_weights, retake
from polyexport.capture.pickling import dump
from polyexport.capture.snapshot import ATTRIBUTES, STRUCTURE, UNAVAILABLE, save_module, save_surroundings
from polyexport.capture.weights import WEIGHTS
from polyexport.engine import plan
from polyexport.engine.engine import Engine
from polyexport.engine.judge import Metric, measured
from polyexport.engine.options import Options
from polyexport.engine.request import Request, interruption
from polyexport.engine.weights import bytes_for_training, check_room, hold, save_lacking
from polyexport.errors import BadRequest, ToolMissing, WarningsAllowed, is_of_a_signal, line
from polyexport.measure.budget import Mode, directed
from polyexport.publish import Sink
from polyexport.report.folders import BEST, CAPTURE, discard, link, locked, short_name, unfinished
from polyexport.report.outcome import Checkpoint, State
from polyexport.report.report import Report
from polyexport.serialization import writing
from polyexport.workers.provision import Busy
from polyexport.workers.toolchain import Toolchain

if TYPE_CHECKING:
    from torch import nn

_LOOK_SECONDS = 0.01
_PATIENCE_SECONDS = 60.0  # how long training waits for a toolchain that another process is installing
_CHEAP_SECONDS, _CHEAP_SHARE = 0.05, 0.05
"""The structure is pickled again at a new best if the last time took less processor time, or less of the time since."""


class Session:
    """The exports of one training run.

    Args:
        options: What to export, and how.
        folder: Where exports are written, or a function that returns it if it is not known yet; it is called by
            `clear`, and again when the first inputs come.
        reports: A list that gets the finished exports, the oldest first.
        folders: Folders of exports of a run that this one resumes; this run's folder is added.
        sharded: Whether this process has only a shard of the weights.
        attributes: Returns the attributes to set on a copy of the module in place of those that cannot be pickled.
        ignored: Names of attributes of the module that the trainer may change at any time.
        libraries: Python modules that its classes come from; see `Engine`.
        say: Called with a line for the user.
        warn: Called with a line about something that went wrong.

    Attributes:
        told: One line about each finished format, to be popped and shown by the caller.
        taken: How many batches of inputs were taken.
        reports: The finished exports, the oldest first, filled by `finish`.
        closed: Whether the session is closed.
        answer: What forward returned last, see `record`.
    """

    def __init__(
        self,
        options: Options,
        folder: str | Path | Callable[[], Path],
        *,
        reports: list[Report] | None = None,
        folders: list[Path] | None = None,
        sharded: bool = False,
        attributes: Callable[[Any], Mapping[str, Any]] = lambda root: {},
        ignored: Collection[str] = (),
        libraries: tuple[str, ...] = (),
        say: Callable[[str], None] = print,
        warn: Callable[[str], object] = errors.warn,
    ) -> None:
        self.options = options
        self.told: deque[str] = deque()
        self.taken = 0
        self._folder = folder
        self.reports = [] if reports is None else reports
        self._folders = [] if folders is None else folders
        self._sharded = sharded
        self._attributes = attributes
        self._ignored = ignored
        self._say, self._warn = say, warn
        self._engine = Engine(
            workers=options.workers,
            timeout=options.timeout,
            background=True,
            executor=options.executor,
            staging=options.staging,
            libraries=libraries,
            tell=self.told.append,
        )
        self._captured: Path | None = None
        self._wanted = options.batches
        self._exports: dict[Future[Report], str] = {}  # each with the name of its export
        self._notes: tuple[str, ...] = ()
        self.answer: answers.Answer | None = None
        self._beside = 0  # `beside_weights` of the structure in the folder
        self._marked: int | None = None  # the same of the newest best, until that is offered
        self._changes = False
        self._retaken, self._retaken_at = 0.0, 0.0  # processor time of the last time, and when that was
        self._lacks: int | None = None
        self._interrupted = ""
        self.closed = False

    # --- before training ----------------------------------------------------------------------------------------------

    def install(self, *, wait: bool = True) -> None:
        """Install missing toolchains in parallel, and report what will be skipped; `wait` for the end.

        A job whose toolchain is still being installed waits for it.
        """
        if self.options.executor is not None:
            return  # toolchains are installed where the jobs run
        for each in self.options.formats:
            if why := each.lacks():
                self._warn(f"{each.name} will be skipped: {why}")
        self._engine.warm(self.options.formats, timed=bool(self.options.bench))
        chains = {chain for chains in plan.toolchains(self.options.formats).values() for chain in chains}
        missing = [chain for chain in chains if not chain.ready]
        threads = [threading.Thread(target=self._make, args=(chain,), daemon=True) for chain in missing]
        for thread in threads:
            thread.start()
        for thread in threads if wait else ():
            thread.join()

    def _make(self, chain: Toolchain) -> None:
        """Install one toolchain, and start its servers."""
        try:
            self._engine.install(chain, self._say, patience=_PATIENCE_SECONDS)
        except Busy as error:
            self._say(f"{error}; training goes on, and the formats that need it wait")
        except ToolMissing as error:
            if not self.closed:
                self._warn(f"formats that need {chain.name} will be skipped: {error}")
        else:
            self._engine.warm(self.options.formats, timed=bool(self.options.bench))

    def clear(self) -> None:
        """Remove what killed runs left in the folder of exports, except one that can be resumed, which is reported."""
        if (left := self._engine.leftover(self.exports_folder())) is not None:
            self._say(interruption(left))

    def exports_folder(self) -> Path:
        """The folder where exports are written."""
        return self._folder() if callable(self._folder) else Path(self._folder).absolute()

    # --- what forward takes -------------------------------------------------------------------------------------------

    @property
    def captured(self) -> bool:
        """Whether the first inputs were taken, so that checkpoints can be offered."""
        return self._captured is not None

    @property
    def wants_more(self) -> bool:
        """Whether the inputs of another batch are needed."""
        return self.taken < self._wanted

    @WarningsAllowed()
    def take(self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take the inputs of forward, or of `preprocess`; with the first batch also the structure of `root`.

        Raises:
            BadRequest: the part of `root` to be exported does not exist.
            OSError: the folder cannot be written.
        """
        if self._captured is not None:
            save_call(args, kwargs, self._captured, self.taken)
            self.taken += 1
            return
        parent = self.exports_folder()
        parent.mkdir(parents=True, exist_ok=True)
        folder = locked(parent, CAPTURE)
        try:
            save_call(args, kwargs, folder)
            attributes, select = self._attributes(root), self.options.select
            with _random_state_stays():
                note = save_module(
                    root,
                    select,
                    args,
                    kwargs,
                    folder,
                    attributes,
                    sharded=self._sharded,
                    steps=self.options.processing,
                )
        except BaseException:
            discard(folder)
            raise
        self._captured, self.taken = folder, 1
        self._folders[:] = [*(each for each in self._folders if each != parent), parent]
        self._beside = beside_weights(root, self._ignored)
        if note:
            self.note(note)

    def skip(self) -> None:
        """Count a batch whose inputs could not be taken."""
        self.taken += 1

    def record(self, answer: answers.Answer | None) -> None:
        """Store what forward returned here, for workers to compare with the rebuilt module; None where unknown."""
        self.answer = answer

    def note(self, note: str, *, quiet: bool = False) -> None:
        """Add a note to each report from now on, and warn now unless `quiet`; repeated notes are ignored."""
        if note not in self._notes:
            self._notes += (note,)
            if not quiet:
                self._warn(note)

    # --- a new best ---------------------------------------------------------------------------------------------------

    def is_free(self) -> bool:
        """Whether another checkpoint can be taken at once; drops an export that waits."""
        return self._engine.supersede()

    @WarningsAllowed()
    def mark(self, root: nn.Module) -> None:
        """Take layers, attributes, buffers and globals as they are now, for the checkpoint that is offered next.

        Without it they are taken when that is offered, which may be some epochs after it was written.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._captured is None:
            return
        self._marked, beside = None, beside_weights(root, self._ignored)
        self._changes |= beside != self._beside
        attributes = self._attributes(root)
        if self._changes and self._is_cheap(beside):
            start = time.thread_time()
            if retake(root, self.options.select, self._captured, attributes):
                self._beside = beside
            self._retaken, self._retaken_at = time.thread_time() - start, time.monotonic()
        elif (self._captured / STRUCTURE).exists():
            save_surroundings(root, self._captured)
        if attributes:
            dump(attributes, self._captured / ATTRIBUTES)
        self._marked = beside

    @WarningsAllowed()
    def offer(
        self, root: nn.Module, path: str | Path, name: str, checkpoint: Checkpoint, *, last: bool = False
    ) -> None:
        """Export a checkpoint in the background; it replaces one that still waits.

        Args:
            root: The module that trains.
            path: The checkpoint, as PyTorch or Lightning writes it: a file, a folder of shards, or an fsspec URL. The
                weights are hard-linked, so it may be removed as soon as this returns.
            name: The name of the export's folder.
            checkpoint: Its record in the report.
            last: Whether training is over; before, room for its next checkpoints is left on the disk.

        Raises:
            OSError: the folder cannot be written, the disk has too little room, or the checkpoint is gone.
        """
        spare = 0 if last else bytes_for_training(str(path), self.exports_folder())
        check_room(root, len(plan.steps(self.options.formats)), self.exports_folder(), spare)
        while not self.is_free():
            time.sleep(_LOOK_SECONDS)
        with self._work(root) as work:
            held = hold(str(path), work / "source")
            try:
                self._keep_lacking(root, str(path), work / "source")
            except OSError:
                raise
            except Exception as error:  # the checkpoint may be of any kind; the worker reports what it lacks
                self._warn(f"could not find out which weights the checkpoint lacks: {line(error)}")
            # the name `best` is that of the link
            self._submit(work, f"{BEST}.ckpt" if name == BEST else name, checkpoint, held, spare)

    @WarningsAllowed()
    def offer_weights(self, root: nn.Module, checkpoint: Checkpoint) -> None:
        """Export the weights as they are now, where no checkpoint was written; `checkpoint` has epoch and step.

        Raises:
            OSError: the folder cannot be written.
        """
        import torch

        name = f"epoch={checkpoint.epoch}-step={checkpoint.global_step}"
        with self._work(root) as work:
            if self._sharded:
                reason = "no checkpoint was written, and this strategy shards the weights; add a ModelCheckpoint"
                (work / "source" / UNAVAILABLE).write_text(reason, encoding="utf-8")
            else:
                with writing(work / "source" / WEIGHTS) as file:
                    torch.save(root.state_dict(), file)
            self.note("there was no best checkpoint on disk, so these are the weights at the end of fit", quiet=True)
            self._submit(work, name, replace(checkpoint, path=f"{name} (weights at the end of fit)"), None, 0)

    def _keep_lacking(self, root: nn.Module, checkpoint: str, source: Path) -> None:
        """Take from the module what its checkpoints leave out, such as frozen weights; only the first is checked."""
        if self._lacks == 0 or self._captured is None or self._sharded:
            return
        lacking = save_lacking(root, checkpoint, self._captured, source)
        if lacking and self._lacks is None:
            why = f"the checkpoint has no {', '.join(lacking[:3])} ({len(lacking)} weights in all)"
            self.note(f"{why}: they were taken from the module in training", quiet=True)
        self._lacks = len(lacking)

    @contextlib.contextmanager
    def _work(self, root: nn.Module) -> Iterator[Path]:
        """A folder for one export, with hard links to what was captured of the module; removed if the export fails."""
        if self._captured is None:
            raise BadRequest("a checkpoint was offered before any inputs were taken; call take first")
        if self._marked is None:
            self.mark(root)
        work = unfinished(self._captured.parent)
        try:
            # hidden files are locks
            for file in (each for each in self._captured.iterdir() if not each.name.startswith(".")):
                link(file, work / "source" / file.name)
            if (recorded := self.answer) is not None:
                recorded = replace(recorded, changed=recorded.beside not in (None, self._marked))
            answers.write(recorded, work / "source")
            yield work
        except BaseException:
            discard(work)
            raise
        self._marked = None

    def _is_cheap(self, beside: int) -> bool:
        """Whether the structure may be pickled again; a note says so where it had to be, and may not."""
        is_cheap = self._retaken <= _CHEAP_SECONDS
        if is_cheap or beside == self._beside:
            return is_cheap
        if self._retaken <= _CHEAP_SHARE * (time.monotonic() - self._retaken_at):
            return True
        self.note(
            "training changes layers, attributes or buffers of the module; pickling it takes "
            f"{self._retaken:.2g} s, which was not spent on each best: some have them as they were before",
            quiet=True,
        )
        return False

    def _submit(self, work: Path, name: str, checkpoint: Checkpoint, held: str | None, spare: int) -> None:
        options = self.options
        request = Request(
            work,
            short_name(name),
            options.formats,
            options.dynamic,
            checkpoint,
            self._notes,
            held,
            keep=options.keep,
            former=tuple(self._folders),
            labels=options.labels,
            metadata=options.metadata,
            processing=options.processing.described,
            spare=spare,
        )
        self._exports[self._engine.submit(request)] = name

    # --- meanwhile ----------------------------------------------------------------------------------------------------

    @property
    def doing(self) -> Mapping[str, str]:
        """What is being done right now: a few words for each format name."""
        return self._engine.doing

    @property
    def pending(self) -> bool:
        """Whether an export of an offered checkpoint is still to be finished."""
        return bool(self._exports)

    def hurry(self) -> None:
        """Training pauses: the workers may use the whole machine."""
        self._engine.hurry()

    def wait(self) -> None:
        """Wait until every offered checkpoint is exported or superseded."""
        for future in self._exports:
            if not future.cancelled():
                future.exception()

    # --- the end ------------------------------------------------------------------------------------------------------

    @WarningsAllowed()
    def finish(self) -> list[Report]:
        """Wait for the exports with a progress display, then measure latency on the idle machine.

        Returns:
            `reports`.
        """
        from polyexport.report import console

        with ThreadPoolExecutor(1) as pool:
            try:
                console.wait(pool.submit(self._drain), lambda: self.doing, self.told)
            except BaseException:
                self.close()  # ends what the pool would wait for
                raise
        return self.reports

    def _drain(self) -> None:
        self.hurry()
        reports = self.reports
        for future, name in self._exports.items():
            try:
                reports.append(future.result())
            except (CancelledError, InterruptedError):
                continue  # replaced by a newer best; an interrupted export is reported by `close`
            except Exception as error:  # one export that cannot be written must not hide the others
                self._warn(f"the export of {name} could not be finished: {line(error)}")
        self._exports.clear()
        # of several with one name the last has the folder, and an older report would overwrite its own
        last = {report.folder: report for report in reports}
        reports[:] = [each for each in reports if each is last[each.folder]]
        reports[:] = [each for each in reports[:-1] if each.folder.exists()] + reports[-1:]  # see keep
        wanted = {True: reports[-1:], False: [], "all": reports}[self.options.bench]
        # an export that a resumed run found finished may have been timed already
        reports[:] = [self._timed(each) if each in wanted and each.baseline is None else each for each in reports]

    def _timed(self, report: Report) -> Report:
        try:
            return self._engine.bench(report, self.options.formats)
        except Exception as error:  # another run may have removed the folder; the report matters more than latency
            self._warn(f"{report.folder.name} is not timed: {line(error)}")
            return report

    @WarningsAllowed()
    def judge(self, report: Report, metric: Metric, modes: Mapping[str, Mode] | None = None) -> Report:
        """Measure the user's metric with PyTorch and each artifact, judge artifacts by the budget, and save the report.

        Args:
            report: A finished export.
            metric: Computes the metrics of a runner on the validation data, or of PyTorch when called with None.
            modes: Which way a metric is better, for budgets that do not say.

        Raises:
            BadRequest: it is unknown which way a metric with a budget is better.
        """
        limits = directed(self.options.budget, modes or {})
        judged = measured(report, metric, self._engine, self.options.formats, limits)
        return self._engine.explained(judged, self.options.formats)

    @WarningsAllowed()
    def publish(self, report: Report, sinks: Iterable[Sink]) -> None:
        """Give a report to each sink; if one fails, warn and go on with the others."""
        for sink in sinks:
            name = getattr(sink, "__qualname__", type(sink).__name__).split(".")[0]
            try:
                sink(report)
            except KeyboardInterrupt:
                self._warn(f"publishing to {name} was interrupted; the export is complete: {report.folder}")
                raise
            except (Exception, SystemExit) as error:
                if is_of_a_signal(error):
                    raise
                # a sink may talk to a service, which can fail in any way
                self._warn(f"publishing to {name} failed: {line(error)}")

    def close(self) -> str:
        """Stop all workers and remove unfinished files. Can be called twice.

        Returns:
            A line about an interrupted export, which stays to be resumed; empty where there is none.
        """
        if not self.closed:
            self.closed = True
            left = self._engine.close()
            if self._captured is not None:
                discard(self._captured)
            self._interrupted = interruption(left) if left is not None else ""
        return self._interrupted

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if why := self.close():
            self._warn(why)


def complaint(reports: Sequence[Report], states: Collection[State]) -> str:
    """An error message if the last export has a format in one of `states`; else empty."""
    failed = [outcome for report in reports[-1:] for outcome in report.outcomes if outcome.state in states]
    listed = "; ".join(f"{outcome.format} is {outcome.shown_state}: {outcome.reason}" for outcome in failed)
    return f"fit finished, but {listed} (see {reports[-1].folder / 'report.md'})" if failed else ""


@contextlib.contextmanager
def _random_state_stays() -> Iterator[None]:
    """Restore the random state afterwards, so that training draws the numbers that it would have drawn."""
    import numpy as np
    import torch

    here, numpys = random.getstate(), np.random.get_state()  # numpy's global state, which user code draws from
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # public, but untyped
    devices = range(torch.cuda.device_count()) if cuda else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(here)
        np.random.set_state(numpys)
