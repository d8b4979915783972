"""`ExportCallback`: the skin between a Lightning trainer and the engine."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_export import ranks
from lightning_export.answers import Recorder, write
from lightning_export.best import Best, bases, best_of, checkpointer, name_of, tail
from lightning_export.capture import Called, Spy, beside_weights, hold, is_compiled, retake, save, save_lacking
from lightning_export.loggers import sinks
from lightning_export.metrics import measured
from polyexport import BadRequest, Engine, ExportFailed, Format, Report, Request, ToolMissing
from polyexport.capture.answer import Answer
from polyexport.capture.flatten import taken_apart
from polyexport.capture.snapshot import UNAVAILABLE, WEIGHTS, as_call, save_call, selected
from polyexport.engine import plan
from polyexport.engine.engine import interruption
from polyexport.formats import resolve
from polyexport.publish import Sink
from polyexport.publish.folder import copy_to
from polyexport.report import console
from polyexport.report.folders import BEST, CAPTURE, discard, link, locked, unfinished
from polyexport.report.report import STATES, Checkpoint, State
from polyexport.workers.toolchain import Busy

P = ParamSpec("P")

_LOOK_SECONDS = 0.01
_PATIENCE_SECONDS = 60.0  # how long training waits for another process that installs what this one needs
_CHEAP_SECONDS = 0.05
"""The processor time that the structure may take to be taken anew at each best."""


def _harmless(
    hook: Callable[Concatenate[Any, P], None],
) -> Callable[Concatenate[Any, P], None]:
    """A hook that tells what went wrong and lets training go on."""

    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except BadRequest:
            raise  # a mistake in the arguments, found in the sanity check at the latest: nothing is lost yet
        except (Exception, SystemExit) as error:  # promise one: what goes wrong here is ours, and training goes on
            rank_zero_warn(f"ExportCallback: {hook.__name__} failed, training goes on: {type(error).__name__}: {error}")

    functools.update_wrapper(guarded, hook)
    return guarded


class ExportCallback(Callback):
    """Export each new best checkpoint to deployment formats, prove each artifact against PyTorch, time and publish it.

    Everything happens in worker processes from a copy of the checkpoint; training goes on undisturbed. When `fit` ends,
    what is still under way is finished, and the newest export, the best of the run, is timed and published.

    Args:
        formats: Names, aliases or `Format` values: `["onnx", "openvino"]`.
        into: Folder for the exports, or an fsspec URL that the best one is copied to when `fit` ends. By default
            `exports/` in the folder of the run.
        when: `"improved"` for each new best, `"fit_end"` for the last one only.
        module: What to export: None for the LightningModule's `forward`, a dotted attribute (`"model.backbone"`), or a
            function of the LightningModule that returns a module of it.
        inputs: None for what `forward` received from the first validation batch, else a function of that batch that
            returns a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic: True frees the batch axis and every axis whose size differs between the validation batches that were
            taken, False none; or input name -> {axis: name}.
        calibration_batches: How many validation batches int8 formats take their number ranges from. Two are taken in
            any case: an artifact has to answer the second one too.
        fail_on: States that make `fit` raise `ExportFailed` once everything is written.
        timeout: Seconds that one conversion or verification may take, without those in which training has the machine.
        workers: How many conversions run side by side; by default half the cores, at least two.
        publish: Where the best export goes when `fit` ends. `"auto"`: to the trainer's `WandbLogger`,
            `TensorBoardLogger` and `MLFlowLogger`, together with the figures of the exports before it. Or functions
            that take the report, such as `Wandb(registry="model")`.
        monitor: Which `ModelCheckpoint` to follow, by what it monitors, where there are several.
        keep: How many exports stay on disk; the newest always does. By default all.
        bench: Whether to time the artifacts when `fit` ends; `"all"` times those of every export, not of the best only.
        metric_batches: On how many validation batches your own `validation_step` is run with each artifact in place of
            `forward` when `fit` ends, so that the metrics that it logs stand beside PyTorch's; 0 for none.
        executor: Has the work done on other machines: anything with `submit(function, *arguments)` that returns a
            future, such as dask's `Client.get_executor()`. Timing stays on this one.
        staging: An fsspec URL that this machine and those reach, through which files travel; else they travel through
            the executor.

    Attributes:
        reports: The finished exports of this run, the oldest first; on rank zero, and not outside a spawned process.

    Raises:
        UnknownFormat: a format's name is none.
        BadRequest: an argument is impossible, or (when `fit` starts) nothing tells what `forward` takes.
    """

    def __init__(
        self,
        formats: Sequence[str | Format],
        *,
        into: str | Path | None = None,
        when: Literal["improved", "fit_end"] = "improved",
        module: str | Callable[[Any], Any] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        dynamic: bool | Mapping[str, Mapping[int, str]] = True,
        calibration_batches: int = 8,
        fail_on: Sequence[State] = (),
        timeout: float = 600.0,
        workers: int | None = None,
        publish: Literal["auto"] | Sequence[Sink] = "auto",
        monitor: str | None = None,
        keep: int | None = None,
        bench: bool | Literal["all"] = True,
        metric_batches: int = 0,
        executor: Any = None,
        staging: str | None = None,
    ) -> None:
        super().__init__()
        self.formats = resolve(formats)
        steps = plan.steps(self.formats)
        if calibration_batches < 1:
            raise BadRequest(f"calibration_batches={calibration_batches}; give 1 or more")
        if metric_batches < 0:
            raise BadRequest(f"metric_batches={metric_batches}; give 1 or more, or 0 for no metrics")
        self.metric_batches = metric_batches
        _check_arguments(when=when, fail_on=fail_on, timeout=timeout, workers=workers, publish=publish, keep=keep)
        if bench not in (True, False, "all"):
            raise BadRequest(f"bench={bench!r}; known: True, False, 'all'")
        self.into = into
        self.when = when
        self.module = module
        self.inputs = inputs
        self.dynamic = {name: dict(axes) for name, axes in dynamic.items()} if isinstance(dynamic, Mapping) else dynamic
        self.calibration_batches = calibration_batches
        self.fail_on = tuple(fail_on)
        self.timeout = timeout
        self.workers = workers
        self.publish: Any = publish if publish == "auto" else list(publish)  # Hydra gives containers of its own
        self.monitor = monitor
        self.keep = keep
        self.bench = bench
        self.executor = executor
        self.staging = staging
        self.reports: list[Report] = []
        self._wanted = max(2, calibration_batches if any(each.calibrated for each in steps.values()) else 2)
        self._folders: list[str] = []
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Forget what belongs to one fit."""
        self._engine: Engine | None = None
        self._futures: dict[Future[Report], str] = {}  # and the names of what they export
        self._told: deque[str] = deque()
        self._tail: Callback | None = None
        self._spy: Spy | None = None
        self._called: Called | None = None
        self._captured: Path | None = None
        self._taken = 0
        self._recorder: Recorder | None = None
        self._answer: Answer | None = None
        self._beside = 0
        self._retakes = True
        self._notes: tuple[str, ...] = ()
        self._lacks: int | None = None
        self._seen: Best | None = None
        self._active = False
        self._turn = ""
        self._complaint = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportCallback:
        """A callback with the same arguments, for another trainer; what it exports stands in `reports` of both."""
        made = copy.copy(self)
        made._start_afresh()
        made._folders = list(self._folders)
        return made

    @property
    @override
    def state_key(self) -> str:
        """Tells the callbacks of one trainer apart, by what they export; where to may differ when a run is resumed."""
        what: Any = self.module
        if callable(what):  # a lambda's name tells nothing, what it reads does; a partial has no name
            code = getattr(what, "__code__", None)
            what = (getattr(what, "__qualname__", type(what).__qualname__), *(code.co_names if code else ()))
        names = [each.name for each in self.formats]
        return self._generate_state_key(formats=names, module=what, when=self.when, monitor=self.monitor)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where exports of this run lie, so that a resumed one repeats none; what is finished, the folders tell."""
        return {"folders": list(self._folders)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folders = [str(folder) for folder in state_dict.get("folders", ())]

    # --- before training ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._active = stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if not self._active:
            return
        self._turn = ranks.turn()
        self._notes, self._complaint, self._lacks = (), "", None
        self.reports.clear()
        twins = [each for each in _siblings(trainer) if each.into == self.into and each is not self]
        if self.into is not None and twins:
            raise BadRequest(f"two ExportCallbacks write into {self.into}; give each a folder of its own")
        if isinstance(self.module, str) and not _overrides(pl_module, "configure_model"):
            selected(pl_module, self.module)
        if not _validates(trainer, pl_module) and self.inputs is None and _example(pl_module) is None:
            raise BadRequest(
                "ExportCallback does not know what forward takes: there is no validation batch to capture it from; "
                "give the trainer validation data, set example_input_array on the module, or give "
                "inputs=<a function of the batch> (it then gets the first training batch)"
            )
        model_checkpoint = checkpointer(_callbacks(trainer), self.monitor)
        if self.monitor is not None and model_checkpoint is None:
            monitors = [each.monitor for each in _callbacks(trainer) if "ModelCheckpoint" in bases(each)]
            raise BadRequest(f"monitor={self.monitor!r}: no ModelCheckpoint has it; they monitor {monitors}")
        if model_checkpoint is not None:
            if model_checkpoint.monitor is None:
                rank_zero_warn(
                    "ExportCallback: no ModelCheckpoint monitors a metric, so the newest checkpoint counts as best; "
                    "give the trainer ModelCheckpoint(monitor=<a metric that you log>, mode='min' or 'max')"
                )
            if self._tail is None:
                self._tail = tail(model_checkpoint, self._look)
            others = [each for each in _callbacks(trainer) if each is not self._tail]
            trainer.callbacks = [*others, self._tail]  # type: ignore[attr-defined]  # a new list: others may hold the old
        if trainer.is_global_zero:
            self._preflight(distributed=trainer.world_size > 1)
            self._clear(trainer)

    @_harmless
    def _preflight(self, *, distributed: bool) -> None:
        """Make the toolchains that are missing, or say before the first epoch what will be skipped.

        Other ranks would wait for this one, so a distributed run makes them in the background, when they are needed.
        """
        self._engine = Engine(
            workers=self.workers,
            timeout=self.timeout,
            background=True,
            executor=self.executor,
            staging=self.staging,
            tell=self._told.append,
        )
        if self.executor is not None:
            return  # toolchains are made where the jobs land
        for each in self.formats:
            if why := each.lacks():
                rank_zero_warn(f"ExportCallback: {each.name} will be skipped: {why}")
        missing = {chain for chains in plan.toolchains(self.formats).values() for chain in chains if not chain.ready}
        for chain in sorted(missing, key=lambda each: each.name):
            if distributed:
                rank_zero_info(f"ExportCallback: toolchain {chain.name} is installed when it is needed")
                continue
            try:
                chain.interpreter(lambda line: rank_zero_info(f"ExportCallback: {line}"), patience=_PATIENCE_SECONDS)
            except Busy as error:
                rank_zero_info(f"ExportCallback: {error}; training goes on, and what needs it waits")
            except ToolMissing as error:
                rank_zero_warn(f"ExportCallback: what needs {chain.name} will be skipped: {error}")
        self._engine.warm(self.formats)

    @_harmless
    def _clear(self, trainer: Trainer) -> None:
        """Remove what killed runs left where exports will lie, but for one that can be resumed."""
        if self._engine is not None and (left := self._engine.leftover(self._parent(trainer))) is not None:
            rank_zero_info(f"ExportCallback: {interruption(left)}")

    # --- what forward takes -------------------------------------------------------------------------------------------

    @override
    @_harmless
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._records(trainer, pl_module, batch_idx, dataloader_idx):
            self._recorder = Recorder(selected(pl_module, self.module), pl_module)
        if self._takes(trainer, batch_idx, dataloader_idx) and self.inputs is None:
            profiled = "AdvancedProfiler" in bases(getattr(trainer, "profiler", None))
            self._spy = Spy(selected(pl_module, self.module), pl_module, profiled=profiled)
            self._called = Called(pl_module) if self._capturing(trainer) else None

    @override
    @_harmless
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._answer, self._recorder = self._recorder.answer, None
        if not self._takes(trainer, batch_idx, dataloader_idx):
            return
        self._taken += 1
        call, trouble = None, ""
        if self._spy is not None:
            self._spy.remove()
            call, trouble, self._spy = self._spy.call, self._spy.trouble, None
        if self._called is not None:
            self._called.remove()
        if self._captured is None:
            if trouble:
                self._note(f"forward's arguments cannot be copied ({trouble}), so they are taken as forward left them")
            early = trainer.sanity_checking and not trouble
            self._capture(trainer, pl_module, self._call(pl_module, batch, call, early=early))
            return
        call = call if self.inputs is None else as_call(self.inputs(batch))
        if call is not None:
            save_call(*call, self._captured, batch_idx)

    @override
    @_harmless
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Without validation, `inputs` and `example_input_array` are asked at the first training batch."""
        if self._capturing(trainer) and not _validates(trainer, pl_module):
            self._capture(trainer, pl_module, self._call(pl_module, batch, None, early=False))

    def _records(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether forward's answer to this batch is recorded: the first of each validation but the sanity check.

        Not of a module that a strategy wraps, whose hooks see other calls, nor of compiled code, which has none.
        """
        first = self._active and batch_idx == dataloader_idx == 0 and not trainer.sanity_checking
        alone = trainer.world_size == 1 and trainer.strategy.model is pl_module
        return first and alone and not is_compiled(selected(pl_module, self.module), pl_module)

    def _takes(self, trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether this validation batch is one to keep: the first, or the next of those to calibrate with.

        The sanity check may be shorter than what is wanted; then the first validation goes on where it ended.
        """
        if self._capturing(trainer):
            return batch_idx == dataloader_idx == 0
        return self._captured is not None and dataloader_idx == 0 and batch_idx == self._taken < self._wanted

    def _capturing(self, trainer: Trainer) -> bool:
        return self._active and trainer.is_global_zero and self._captured is None

    def _call(
        self, pl_module: LightningModule, batch: Any, seen: tuple[Any, Any] | None, *, early: bool
    ) -> tuple[Any, Any] | None:
        """The arguments of forward, if a converter can take them."""
        try:
            call = self._arguments(pl_module, batch, seen)
            taken_apart(selected(pl_module, self.module).forward, *call)
        except BadRequest as error:
            if early:  # the sanity check: nothing is lost yet
                raise
            self._active = False
            rank_zero_warn(f"{error}. Nothing is exported.")
            return None
        return call

    def _arguments(self, pl_module: LightningModule, batch: Any, seen: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """From `inputs`, else as seen, else from `example_input_array`."""
        if self.inputs is not None:
            return as_call(self.inputs(batch))
        if seen is not None:
            return seen
        if self.module is None and _example(pl_module) is not None:
            return as_call(_example(pl_module))
        what = "forward" if self.module is None else f"forward of module={self.module!r}"
        called = ", ".join(repr(name) for name in self._called.outermost[:5]) if self._called is not None else ""
        part = "module=<the part that is called>" + (f" (called were {called})" if called else "")
        raise BadRequest(
            f"ExportCallback does not know what to feed: {what} was not called on the first validation batch; call it "
            f"in validation_step, set example_input_array on the module, give {part}, or give "
            "inputs=<a function of the batch>"
        )

    def _capture(self, trainer: Trainer, pl_module: LightningModule, call: tuple[Any, Any] | None) -> None:
        if call is None:
            return
        parent = _made(self._parent(trainer))
        self._folders = [*(each for each in self._folders if each != str(parent)), str(parent)]
        folder = locked(parent, CAPTURE)
        try:
            note = save(pl_module, self.module, *call, folder, sharded=_shards(trainer))
        except BaseException:
            self._active = False
            discard(folder)
            raise
        self._captured = folder
        self._beside = beside_weights(pl_module)
        if note:
            self._note(note)

    def _note(self, note: str) -> None:
        """Tell it now, and in each report."""
        self._notes += (note,)
        rank_zero_warn(f"ExportCallback: {note}")

    # --- a new best ---------------------------------------------------------------------------------------------------

    @_harmless
    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each hook in which a checkpoint may have been written; must cost next to nothing."""
        self._print(trainer)
        if self.when == "improved" and self._captured is not None and not trainer.sanity_checking:
            self._export_best(trainer)

    def _print(self, trainer: Trainer) -> None:
        """Say what the engine has told since, above the progress bar, which only the training thread may ask to."""
        if not self._told:
            return
        bar: Any = trainer.progress_bar_callback
        # a bar that is switched off, as by refresh_rate=0, would swallow the line
        tell = bar.print if bar is not None and getattr(bar, "is_enabled", True) else print
        while self._told:
            tell(self._told.popleft())

    def _export_best(self, trainer: Trainer, *, wait: bool = False) -> bool:
        """Hand over the best checkpoint if it is a new one; False where there is none on disk."""
        model_checkpoint = checkpointer(_callbacks(trainer), self.monitor)
        best = best_of(model_checkpoint) if model_checkpoint is not None else None
        if best is None:
            return False
        if best.is_same(self._seen):
            return True
        assert self._engine is not None, "rank zero has an engine from setup on"
        while not self._engine.supersede():  # at most two checkpoints are kept: this one comes with the next hook
            if not wait:
                return True
            time.sleep(_LOOK_SECONDS)
        if "://" not in best.path and not os.path.exists(best.path):
            return False  # AsyncCheckpointIO is still writing it: the next hook comes, at the latest when fit ends
        self._seen = best
        work = self._work(trainer)
        try:
            held = hold(best.path, work / "source")
            self._keep_lacking(trainer, best.path, work / "source")
        except BaseException:
            discard(work)
            raise
        score = None if best.monitor is None or best.score is None else float(best.score)
        name = name_of(best, model_checkpoint)
        name = f"{BEST}.ckpt" if name == BEST else name  # `best` is what points to the newest
        self._submit(trainer, work, name, Checkpoint(best.path, monitor=best.monitor, score=score), held)
        return True

    @_harmless
    def _keep_lacking(self, trainer: Trainer, checkpoint: str, source: Path) -> None:
        """Take from the module what its checkpoints leave out, frozen weights say; the first one tells for all."""
        if self._lacks == 0 or self._captured is None or _shards(trainer):
            return
        lacking = save_lacking(trainer.lightning_module, checkpoint, self._captured, source)
        if lacking and self._lacks is None:
            names = ", ".join(lacking[:3])
            why = f"the checkpoint has no {names} ({len(lacking)} weights in all)"
            self._notes += (f"{why}: they are those of the module that trained",)
        self._lacks = len(lacking)

    def _export_live(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No checkpoint was written: export the weights as they are when fit ends, and say so."""
        work = self._work(trainer)
        if _shards(trainer):
            reason = (
                "no ModelCheckpoint wrote a checkpoint, and this strategy shards the weights; add a ModelCheckpoint"
            )
            (work / "source" / UNAVAILABLE).write_text(reason, encoding="utf-8")
        else:
            torch.save(pl_module.state_dict(), work / "source" / WEIGHTS)
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}"
        self._notes += ("there was no best checkpoint on disk: these are the weights when fit ended",)
        self._submit(trainer, work, name, Checkpoint(f"{name} (weights when fit ended)"), None)

    def _work(self, trainer: Trainer) -> Path:
        assert self._captured is not None, "nothing is exported before its inputs are known"
        work = unfinished(self._parent(trainer))
        for file in (each for each in self._captured.iterdir() if not each.name.startswith(".")):  # its lock is its own
            link(file, work / "source" / file.name)
        if self._retakes and beside_weights(trainer.lightning_module) != self._beside:
            start = time.thread_time()
            retake(trainer.lightning_module, self.module, work / "source")
            self._retakes = time.thread_time() - start < _CHEAP_SECONDS
        write(self._answer, work / "source")
        return work

    def _submit(self, trainer: Trainer, work: Path, name: str, checkpoint: Checkpoint, held: str | None) -> None:
        assert self._engine is not None, "rank zero has an engine from setup on"
        at = replace(checkpoint, epoch=trainer.current_epoch, global_step=trainer.global_step)
        before = tuple(Path(folder) for folder in self._folders)
        request = Request(work, name, self.formats, self.dynamic, at, self._notes, held, keep=self.keep, former=before)
        self._futures[self._engine.submit(request)] = name

    def _parent(self, trainer: Trainer) -> Path:
        """Where exports lie. Nothing here may broadcast: only rank zero asks."""
        if self.into is not None and "://" not in str(self.into):
            return Path(self.into).absolute()
        place = _siblings(trainer).index(self)
        exports = f"exports-{place + 1}" if place else "exports"  # a second callback's folders have the same names
        model_checkpoint = checkpointer(_callbacks(trainer), self.monitor)
        directory = getattr(model_checkpoint, "dirpath", None)
        if directory and "://" not in str(directory):
            run = Path(directory)
            return (run.parent if run.name == "checkpoints" else run).absolute() / exports
        logger = trainer.logger
        if logger is not None and logger.save_dir:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir, str(logger.name), version, exports).absolute()
        return Path(trainer.default_root_dir, exports).absolute()

    # --- the end ------------------------------------------------------------------------------------------------------

    @override
    @_harmless
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._turn:
            return
        if not trainer.is_global_zero:
            self._complaint = ranks.hear(trainer, self._turn)
            return
        try:
            self._finish(trainer, pl_module)
        finally:
            self._complaint = self._failed()
            ranks.tell(trainer, self._turn, self._complaint)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the best if that was not done yet, wait for all exports, publish the last."""
        if self._engine is None or self._captured is None or not self._active:
            return
        if not self._export_best(trainer, wait=True) and not self._futures:
            self._export_live(trainer, pl_module)
        with ThreadPoolExecutor(1) as pool:
            try:
                console.wait(pool.submit(self._drain), lambda: self._engine.doing if self._engine else {}, self._told)
            except BaseException:
                self._close()  # ends what the pool would wait for
                raise
        if not self.reports:
            return
        if self.metric_batches:
            self.reports[-1] = self._with_metrics(trainer, pl_module, self.reports[-1])
            self.reports[-1].save()
        for sink in self._sinks(trainer):
            self._publish(sink, self.reports[-1])
        console.show(self.reports[-1])

    def _with_metrics(self, trainer: Trainer, pl_module: LightningModule, report: Report) -> Report:
        assert self._engine is not None, "only rank zero has reports"
        if trainer.world_size > 1 or not _validates(trainer, pl_module):
            why = "there is no validation" if trainer.world_size == 1 else "several processes trained together"
            return replace(report, notes=(*report.notes, f"no metrics: {why}"))
        rank_zero_info(f"ExportCallback: validating {report.folder.name} in each runtime")
        return measured(
            report, trainer, pl_module, self.module, self._engine, self.formats, batches=self.metric_batches
        )

    def _drain(self) -> None:
        """Finish what is under way; time the newest, now that the machine is quiet."""
        assert self._engine is not None, "only rank zero drains"
        self._engine.hurry()
        for future in self._futures:
            try:
                self.reports.append(future.result())
            except (CancelledError, InterruptedError):
                continue  # a newer best took its place; what was interrupted is told when the engine is closed
            except Exception as error:  # one export that cannot be written must not hide the others
                name = self._futures[future]
                rank_zero_warn(f"ExportCallback: the export of {name} was lost: {type(error).__name__}: {error}")
        self._futures.clear()
        # of several under one name the last has the folder, and an older one would write over its report
        last = {report.folder: report for report in self.reports}
        self.reports[:] = [each for each in self.reports if each is last[each.folder]]
        self.reports[:] = [each for each in self.reports[:-1] if each.folder.exists()] + self.reports[-1:]  # see keep
        wanted = {True: self.reports[-1:], False: [], "all": self.reports}[self.bench]
        self.reports[:] = [  # an export that a resumed run found finished may have been timed already
            self._timed(report) if report in wanted and report.baseline is None else report for report in self.reports
        ]

    def _timed(self, report: Report) -> Report:
        assert self._engine is not None, "only rank zero has reports"
        try:
            return self._engine.bench(report, self.formats)
        except Exception as error:  # another run may have taken its folder away; figures are not worth the report
            rank_zero_warn(f"ExportCallback: {report.folder.name} is not timed: {type(error).__name__}: {error}")
            return report

    def _sinks(self, trainer: Trainer) -> Iterator[Sink]:
        if self.into is not None and "://" in str(self.into):
            yield copy_to(str(self.into))
        yield from sinks(self.publish, trainer.loggers)

    def _publish(self, sink: Sink, report: Report) -> None:
        try:
            sink(report)
        except Exception as error:  # a sink talks to the world, and the world may fail in any way
            name = getattr(sink, "__qualname__", type(sink).__name__).split(".")[0]
            why = " ".join(str(error).split())
            rank_zero_warn(f"ExportCallback: publishing to {name} failed: {type(error).__name__}: {why}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._keep_best(trainer)
        self._close()

    @_harmless
    def _keep_best(self, trainer: Trainer) -> None:
        """Have the newest best among those that are interrupted, though it was not its turn yet."""
        if self.when == "improved" and self._engine and self._captured and not trainer.sanity_checking:
            self._export_best(trainer, wait=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        if self._tail is not None:  # a second checkpoint callback would have `test(ckpt_path="best")` warn
            trainer.callbacks = [each for each in _callbacks(trainer) if each is not self._tail]  # type: ignore[attr-defined]
        if stage == "fit" and self._complaint:
            for logger in trainer.loggers:  # the trainer would do so right after this hook
                logger.finalize("success")
            raise ExportFailed(self._complaint)

    def _failed(self) -> str:
        """What `fail_on` has to say of the last export; empty where all is well."""
        failed = [o for report in self.reports[-1:] for o in report.outcomes if o.state in self.fail_on]
        listed = "; ".join(f"{outcome.format} is {outcome.shown_state}: {outcome.reason}" for outcome in failed)
        return f"fit finished, but {listed} (see {self.reports[-1].folder / 'report.md'})" if failed else ""

    @_harmless
    def _close(self) -> None:
        """Leave nothing running and nothing half-written."""
        if self._spy is not None:
            self._spy.remove()
            self._spy = None
        if self._called is not None:
            self._called.remove()
            self._called = None
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        self._answer = None
        left = None
        if self._engine is not None:
            left = self._engine.close()
            self._engine = None
        if self._captured is not None:
            discard(self._captured)
            self._captured = None
            self._taken = 0
        if self._futures:  # what was not finished is to be exported when fit goes on
            self._seen = None
        self._futures.clear()
        self._told.clear()
        if left is not None:  # last, since a program may have made errors of warnings
            rank_zero_warn(f"ExportCallback: {interruption(left)}")


def _check_arguments(
    *, when: str, fail_on: Sequence[str], timeout: float, workers: int | None, publish: Any, keep: int | None
) -> None:
    if when not in ("improved", "fit_end"):
        raise BadRequest(f"when={when!r}; known: 'improved', 'fit_end'")
    unknown = [state for state in ([fail_on] if isinstance(fail_on, str) else fail_on) if state not in STATES]
    if unknown or isinstance(fail_on, str):
        raise BadRequest(f"fail_on={fail_on!r}; give a list of states; known: {', '.join(STATES)}")
    if timeout <= 0 or (workers is not None and workers < 1):
        raise BadRequest(f"timeout={timeout}, workers={workers}: both must be greater than zero")
    if keep is not None and keep < 1:
        raise BadRequest(f"keep={keep}; the newest export always stays, so give 1 or more, or None for all")
    if publish != "auto" and (isinstance(publish, str) or not all(callable(sink) for sink in publish)):
        raise BadRequest(f"publish={publish!r}; give 'auto' or a list of functions that take the report")


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def _siblings(trainer: Trainer) -> list[Any]:
    """The callbacks of our kind in a trainer, in its order."""
    return [each for each in _callbacks(trainer) if isinstance(each, ExportCallback)]


def _shards(trainer: Trainer) -> bool:
    """Whether each rank holds a part of the weights only; the names of a user's strategy's classes count too."""
    return not bases(trainer.strategy).isdisjoint({"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"})


def _example(pl_module: LightningModule) -> Any:
    return getattr(pl_module, "example_input_array", None)


def _validates(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether fit will run a validation loop, as far as that can be told before the loaders exist."""
    has_data = trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
    return bool(_overrides(pl_module, "validation_step") and has_data and trainer.limit_val_batches)


def _overrides(pl_module: LightningModule, method: str) -> bool:
    """Lightning's own `is_overridden` takes modules of one namespace only."""
    base = next(each for each in type(pl_module).__mro__ if each.__name__ == "LightningModule")
    return getattr(type(pl_module), method) is not getattr(base, method)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
