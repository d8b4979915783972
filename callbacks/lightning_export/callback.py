"""`ExportCallback`: the hooks of a Lightning trainer, each a few calls to a `polyexport.engine.session.Session`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_export import fit, ranks
from lightning_export.arguments import check, check_inputs, described, refuse
from lightning_export.best import follow, take_out
from lightning_export.harmless import harmless, warn
from lightning_export.inputs import Inputs
from lightning_export.metrics import warn_of_unlogged
from lightning_export.offers import Offers
from lightning_export.trainer import exports_folder, is_last_epoch, say, siblings
from polyexport import Budget, Format, Report
from polyexport.capture.processing import Processing
from polyexport.engine.labels import is_list
from polyexport.engine.options import Options
from polyexport.engine.session import Session, complaint
from polyexport.errors import WarningsAllowed
from polyexport.formats import resolve
from polyexport.measure.budget import budgets
from polyexport.measure.dynamic_axes import plain
from polyexport.publish import Sink
from polyexport.report.outcome import State


class ExportCallback(Callback):
    """Export each new best checkpoint to deployment formats, verify each artifact against PyTorch, time and publish it.

    Everything happens in worker processes with a copy of the checkpoint, while training goes on. When `fit` ends,
    pending exports are finished, and the newest one, which is the best of the run, is timed and published.

    Args:
        formats: Names, aliases or `Format` values: `["onnx", "openvino"]`.
        into: Folder for the exports, or an fsspec URL that the best export is copied to when `fit` ends. By default
            `exports/` in the folder of the run.
        when: `"improved"`: export each new best; `"fit_end"`: only the last one.
        module: What to export: None for the LightningModule's `forward`, a dotted attribute (`"model.backbone"`), or a
            function that takes the LightningModule and returns a part of it.
        inputs: None: what `forward` (or `preprocess`) receives from the first validation batch; a function of that
            batch that returns a tensor, a tuple of arguments, or a dict of them; or a list or `DataLoader` of these.
        dynamic: True: the batch axis is dynamic, and all axes whose size differs between the validation batches that
            were taken; False: all axes are static; or a mapping of input name -> {axis: name}.
        calibration_batches: How many validation batches int8 formats are calibrated with. At least two are taken in any
            case: every artifact is also verified with the second.
        fail_on: States that make `fit` raise `ExportFailed` once everything is written.
        timeout: Seconds that one conversion or verification may take, not counting time in which it has no processor.
        workers: How many conversions run side by side; by default half the cores, at least two.
        publish: Where the best export goes when `fit` ends, with the metrics of those before it: `"auto"` for the
            trainer's W&B, TensorBoard and MLflow loggers; or functions of the report: `[Wandb(registry="model")]`.
        monitor: The metric of the `ModelCheckpoint` to follow, if there are several.
        keep: How many exports stay on disk; the newest, and those to which you added files, always do. By default all.
        bench: Whether to time the artifacts of the best export when `fit` ends; `"all"` times those of every export.
        metric_batches: On how many validation batches your own `validation_step` runs with each artifact in place of
            `forward` when `fit` ends, for metrics next to PyTorch's; 0 for none, or with a budget for all.
        budget: How much worse a metric that `validation_step` logs may be than PyTorch's: `{"val_acc": 0.01}`, or as a
            share `{"val_loss": "2%"}`. An artifact that loses more is a `mismatch`; in int8, w8 and w4 one that loses
            less is `verified`, whatever its single elements. Which way is better comes from the `ModelCheckpoint` that
            monitors the metric, or from `Budget(0.01, mode="max")`.
        executor: Runs the work on other machines: anything with `submit(function, *arguments)` that returns a future,
            such as dask's `Client.get_executor()`. Latency is measured on this machine.
        staging: An fsspec URL through which files travel to those machines; by default they travel by the executor.
        labels: Names of the classes in the last axis of an output, in order: `["cat", "dog"]`. They are embedded in
            each artifact; `polyexport.load(…).labels` returns them.
        metadata: Further strings to be embedded, by name.
        preprocess: A module, a function of tensors, or the name of an attribute of the LightningModule, which runs
            before `forward` in each artifact: it takes raw inputs and returns what `forward` takes. Artifacts are
            verified with raw inputs: if `validation_step` does not call it as a module, give them as `inputs`.
        postprocess: The same for what runs after `forward`: it takes what `forward` returned.

    Attributes:
        reports: The finished exports of this run, the oldest first; on rank zero only, and lost with a spawned process.
        session: The session that exports; None outside of `fit`, and on other ranks.

    Raises:
        UnknownFormat: a format's name is unknown.
        BadRequest: an argument is impossible, or (when `fit` starts) there is no way to know the inputs of `forward`.
    """

    def __init__(
        self,
        formats: Sequence[str | Format],
        *,
        into: str | Path | None = None,
        when: Literal["improved", "fit_end"] = "improved",
        module: str | Callable[[Any], Any] | None = None,
        inputs: Callable[[Any], Any] | Iterable[Any] | None = None,
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
        budget: Mapping[str, Budget | float | str] | None = None,
        executor: Any = None,
        staging: str | None = None,
        labels: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        preprocess: Callable[..., Any] | str | None = None,
        postprocess: Callable[..., Any] | str | None = None,
    ) -> None:
        super().__init__()
        self.options = Options(
            resolve(formats),
            select=module,
            dynamic=plain(dynamic),
            calibration_batches=calibration_batches,
            keep=keep,
            bench=bench,
            timeout=timeout,
            workers=workers,
            executor=executor,
            staging=staging,
            budget=budgets(budget),
            labels=tuple(labels) if is_list(labels) else labels,  # type: ignore[arg-type]  # refused by Options
            metadata=dict(metadata) if isinstance(metadata, Mapping) else metadata or {},
            processing=Processing(preprocess, postprocess),
        )
        check(
            into=into,
            when=when,
            fail_on=fail_on,
            publish=publish,
            monitor=monitor,
            metric_batches=metric_batches,
            keep=keep,
        )
        check_inputs(inputs, self.options, metric_batches)
        self.into = into
        self.when = when
        self.inputs = inputs
        self.fail_on = tuple(fail_on)
        self.publish: Any = publish if publish == "auto" else list(publish)  # Hydra passes its own containers
        self.monitor = monitor
        self.metric_batches = metric_batches
        self.reports: list[Report] = []
        self._folders: list[Path] = []
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Reset the state of one fit."""
        self.session: Session | None = None
        self._inputs: Inputs | None = None
        self._tail: Callback | None = None
        self._offers = Offers(self.monitor)
        self._turn = self._complaint = ""
        self._is_budget_new = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportCallback:
        """A callback with the same arguments, for another trainer; both share the list `reports`."""
        made = copy.copy(self)
        made._start_afresh()
        made._folders = list(self._folders)
        return made

    @property
    @override
    def state_key(self) -> str:
        """Distinguishes the callbacks of a trainer by what they export, since a resumed run may have other folders."""
        names, part = [each.name for each in self.options.formats], described(self.options.select)
        steps = {"processing": around} if (around := self.options.processing.described) else {}
        return self._generate_state_key(formats=names, module=part, when=self.when, monitor=self.monitor, **steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The folders of this run's exports, so that a resumed run repeats none that is finished."""
        return {"folders": list(map(str, self._folders))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folders[:] = map(Path, state_dict.get("folders", ()))  # the session has the same list

    # --- before training ----------------------------------------------------------------------------------------------

    @override
    @WarningsAllowed()
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._turn = self._complaint = ""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return
        self._turn = ranks.turn()
        self.reports.clear()
        refuse(self, siblings(trainer, ExportCallback), trainer, pl_module)
        self._tail = follow(trainer, self.monitor, self._tail, self._look)
        if trainer.is_global_zero:
            self._open(trainer, pl_module)

    @harmless
    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the session, and install missing toolchains: during training, if it has more than one epoch."""
        self.session = fit.begin(
            trainer,
            pl_module,
            self.options,
            lambda: exports_folder(trainer, self.into, self.monitor, siblings(trainer, ExportCallback).index(self)),
            reports=self.reports,
            folders=self._folders,
        )
        self._inputs = Inputs(self.session, self.inputs)
        self.session.install(wait=trainer.world_size == 1 and is_last_epoch(trainer))
        self.session.clear()

    # --- what forward takes -------------------------------------------------------------------------------------------

    @override
    @harmless
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._inputs is not None:
            self._inputs.before(trainer, pl_module, batch_idx, dataloader_idx)

    @override
    @harmless
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._inputs is not None:
            self._inputs.after(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    @harmless
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._inputs is not None:
            self._inputs.of_training(trainer, pl_module, batch)

    @override
    @harmless
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.session is not None and self.options.budget and self._is_budget_new:
            self._is_budget_new = False
            warn_of_unlogged(trainer, self.options.budget)

    # --- a new best ---------------------------------------------------------------------------------------------------

    @harmless
    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each hook in which a checkpoint may have been written, so it must cost next to nothing."""
        if self.session is None:
            return
        say(trainer, self.session.told)
        if self.when == "improved":
            self._offers.offer(trainer, self.session)
        else:
            self._offers.meet(trainer, self.session)

    # --- the end ------------------------------------------------------------------------------------------------------

    @override
    @harmless
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._turn:
            return
        if not trainer.is_global_zero:
            self._complaint = ranks.hear(trainer, self._turn)
            return
        try:
            if self.session is not None and self.session.captured:
                self._offer_at_end(trainer, self.session)
                fit.end(trainer, pl_module, self.session, self.reports, self.metric_batches, self.publish, self.into)
        finally:
            self._complaint = complaint(self.reports, self.fail_on)
            ranks.tell(trainer, self._turn, self._complaint)

    @harmless
    def _offer_at_end(self, trainer: Trainer, session: Session) -> None:
        """Guarded by itself: if it fails, the exports that there are still have to be finished and published."""
        self._offers.offer_last(trainer, session)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._offer_last(trainer)
        self._close()

    @harmless
    def _offer_last(self, trainer: Trainer) -> None:
        """Offer the newest checkpoint at once, so that it is the one that can be resumed."""
        if self.session is not None and self.when == "improved":
            self._offers.offer(trainer, self.session, wait=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        take_out(trainer, self._tail)
        if stage == "fit" and self._complaint:
            fit.fail(trainer, self._complaint)

    @harmless
    def _close(self) -> None:
        """Stop all workers and remove unfinished files."""
        if self._inputs is not None:
            self._inputs.close()
        session, self.session, self._inputs = self.session, None, None
        if session is None:
            return
        if session.pending:  # so that what is unfinished is exported when fit is called again
            self._offers.offered = None
        if why := session.close():  # last, since warnings may be errors in the user's program
            warn(why)
