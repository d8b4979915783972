"""Takes the inputs and outputs of forward (or `preprocess`) in validation, or in the first training batch.

Artifacts are verified with the first validation batch; further ones are for calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_export.answers import Recorder, why_unrecorded
from lightning_export.best import bases
from lightning_export.capture import Called, Spy, is_compiled
from lightning_export.harmless import warn
from lightning_export.trainer import example, shards, validates
from lightning_export.watch import Call
from polyexport import BadRequest
from polyexport.capture.flatten import as_call, check_dense, flattened_call
from polyexport.capture.processing import Processing, entry, preprocessed, resolved, unlike
from polyexport.capture.selection import selected
from polyexport.engine.session import Session


class Inputs:
    """Watches `forward` during the validation batches whose inputs a session wants.

    Args:
        session: The session that takes them; only rank zero has one.
        given: The user's argument `inputs`, which replaces captured inputs: a function of the batch, or inputs.
    """

    def __init__(self, session: Session, given: Callable[[Any], Any] | Iterable[Any] | None) -> None:
        self._session = session
        self._given = given if given is None or callable(given) else _one_by_one(given)
        self._is_of_the_batch = callable(given)
        self._select = session.options.select
        self._spy: Spy | None = None
        self._called: Called | None = None
        self._recorder: Recorder | None = None
        self._refused = False

    # --- one validation batch -----------------------------------------------------------------------------------------

    def before(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int, dataloader_idx: int) -> None:
        """Watch forward in this batch, if its inputs or outputs are needed."""
        if self._records(trainer, pl_module, batch_idx, dataloader_idx):
            self._recorder = Recorder(selected(pl_module, self._select), pl_module)
        if not self._takes(batch_idx, dataloader_idx):
            return
        if (watched := self._watched(pl_module)) is not None:
            profiled = "AdvancedProfiler" in bases(getattr(trainer, "profiler", None))
            self._spy = Spy(watched, pl_module, profiled=profiled)
        if self._given is None and not self._session.captured:
            self._called = Called(pl_module)

    def after(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Give the session what was captured."""
        if self._recorder is not None:
            self._session.record(self._recorder.answer)
        spy, called = self._spy, self._called
        self.close()
        if not self._takes(batch_idx, dataloader_idx):
            return
        seen, trouble = (spy.call, spy.trouble) if spy is not None else (None, "")
        if not self._session.captured:
            if trouble:
                self._session.note(
                    f"forward's arguments cannot be copied ({trouble}), so they are taken as forward left them"
                )
            early = trainer.sanity_checking and not trouble
            self._take_first(pl_module, batch, seen, called.outermost if called else (), early=early)
        elif self._given is not None:
            inputs = self._given(batch)
            self._take_next(pl_module, None if inputs is None else as_call(inputs))
        else:
            self._take_next(pl_module, seen)

    def _take_next(self, pl_module: LightningModule, call: Call | None) -> None:
        try:
            self._session.skip() if call is None else self._session.take(pl_module, *call)
        except OSError as error:
            self._warn(error, "until then artifacts are verified with fewer batches")

    def _warn(self, error: OSError, meanwhile: str) -> None:
        warn(
            f"the inputs of forward cannot be written to {self._session.exports_folder()}: "
            f"{error.strerror or error}; this is tried again in the next validation, and {meanwhile}"
        )

    def of_training(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Without validation, take inputs from `inputs` or `example_input_array` at the first training batch."""
        if not (self._session.captured or self._refused or validates(trainer, pl_module)):
            self._take_first(pl_module, batch, None, (), early=False)

    def close(self) -> None:
        """Stop watching."""
        for watcher in (self._spy, self._called, self._recorder):
            if watcher is not None:
                watcher.remove()
        self._spy = self._called = self._recorder = None

    def _watched(self, pl_module: LightningModule) -> nn.Module | None:
        """The module to watch: the one that takes the artifact's inputs, or if those are given, the exported one.

        What forward receives of the first batch shows whether `preprocess` does the same as training.
        """
        core, steps = selected(pl_module, self._select), resolved(self._session.options.processing, pl_module)
        if self._given is None:
            first = entry(core, steps)
            return first if isinstance(first, nn.Module) else None
        compares = steps.preprocess is not None and self._is_of_the_batch and not self._session.captured
        return core if compares else None

    # --- which ones ---------------------------------------------------------------------------------------------------

    def _records(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether forward's outputs for this batch are recorded: the first of each validation, not of sanity checks."""
        if self._refused or batch_idx or dataloader_idx or trainer.sanity_checking:
            return False
        watched = selected(pl_module, self._select)
        overridden = type(watched).__call__ is not nn.Module.__call__
        compiled = is_compiled(watched, pl_module)
        if why := why_unrecorded(sharded=shards(trainer), compiled=compiled, overridden=overridden):
            self._session.note(why, quiet=True)
        return not why

    def _takes(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether to keep the inputs of this batch: the first, or the next one for calibration.

        The sanity check may have too few batches; the first validation then continues where it ended.
        """
        if dataloader_idx or self._refused:
            return False
        if not self._session.captured:
            return batch_idx == 0
        return batch_idx == self._session.taken and self._session.wants_more

    # --- the first one ------------------------------------------------------------------------------------------------

    def _take_first(
        self, pl_module: LightningModule, batch: Any, seen: Call | None, called: Any, *, early: bool
    ) -> None:
        try:
            call = self._arguments(pl_module, batch, seen, called)
            steps = resolved(self._session.options.processing, pl_module)
            first = entry(selected(pl_module, self._select), steps)
            leaves, _, names = flattened_call(getattr(first, "forward", first), *call)
            if self._given is not None and steps.preprocess is not None:
                self._try_step(steps, call, seen)
        except BadRequest as error:
            if early:  # in the sanity check nothing is lost yet
                raise
            self._refuse(error)
            return
        try:
            check_dense({name: leaves[leaf] for name, leaf in names.items()})
        except BadRequest as error:
            self._refuse(error)
            return
        try:
            self._session.take(pl_module, *call)
        except OSError as error:
            self._warn(error, "nothing is exported until then")
        except BaseException:
            self._refused = True
            raise

    def _refuse(self, error: BadRequest) -> None:
        self._refused = True
        warn(f"{str(error).removeprefix('ExportCallback ')}. Nothing is exported.")

    def _arguments(self, pl_module: LightningModule, batch: Any, seen: Call | None, called: Any) -> Call:
        """The inputs from `inputs`, else as captured, else from `example_input_array`."""
        step = self._session.options.processing.preprocess
        if self._given is not None:
            if (inputs := self._given(batch)) is None:
                raise BadRequest("inputs has no batch")
            return as_call(inputs)
        if seen is not None:
            return seen
        if step is not None:
            raise BadRequest(
                "preprocess was not called on the first validation batch, so ExportCallback could not capture raw "
                "inputs; call it in validation_step, or give inputs=<a function of the batch that returns them>, or "
                "inputs=<raw batches>, such as a DataLoader"
            )
        if self._select is None and example(pl_module) is not None:
            return as_call(example(pl_module))
        what = "forward" if self._select is None else f"forward of module={self._select!r}"
        names = ", ".join(map(repr, called[:5]))
        part = "module=<the part that is called>" + (f" (called were {names})" if names else "")
        raise BadRequest(
            f"ExportCallback could not capture inputs: {what} was not called on the first validation batch; call it "
            f"in validation_step, set example_input_array on the module, give {part}, or give "
            "inputs=<a function of the batch>"
        )

    def _try_step(self, steps: Processing, call: Call, seen: Call | None) -> None:
        """Check that `preprocess` takes these inputs and returns what forward received; warn if it does not."""
        with isolate_rng():
            made = as_call(preprocessed(steps, *call))
        if seen is not None and (how := unlike(made, seen)):
            self._session.note(
                f"preprocess makes something else of the first validation batch than forward received there ({how}): "
                "an application would feed the model otherwise than training did"
            )


def _one_by_one(batches: Iterable[Any]) -> Callable[[Any], Any]:
    """A function that returns the next batch at each call, and None after the last; keeps training's random state."""
    iterators: list[Iterator[Any]] = []

    def following(_: Any) -> Any:
        with isolate_rng():  # a DataLoader draws a seed
            iterators[:] = iterators or [iter(batches)]
            return next(iterators[0], None)

    return following
