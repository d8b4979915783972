"""The engine without a trainer: export one module, and wait for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyexport.capture.code import libraries
from polyexport.capture.processing import NONE, Processing, Step, entry, preprocessed, resolved
from polyexport.capture.weights import WEIGHTS
from polyexport.engine.engine import Engine
from polyexport.engine.judge import measured
from polyexport.engine.labels import check
from polyexport.engine.request import Request
from polyexport.errors import BadRequest
from polyexport.format import Format
from polyexport.formats import resolve
from polyexport.measure.budget import Budget, budgets, directed
from polyexport.measure.dynamic_axes import Dynamic, plain
from polyexport.report.folders import can_write, check_name, discard, foreign, is_export, may_become_export, unfinished
from polyexport.report.outcome import Checkpoint
from polyexport.report.report import Report
from polyexport.serialization import writing
from polyexport.spec import Runner

_NONE = Checkpoint("")


def export(
    module: Any,
    inputs: Any,
    formats: Iterable[str | Format],
    into: str | Path,
    *,
    dynamic: Dynamic = True,
    calibration: Iterable[Any] = (),
    bench: bool = True,
    timeout: float = 600.0,
    workers: int | None = None,
    executor: Any = None,
    staging: str | None = None,
    progress: Callable[[str], object] | None = None,
    checkpoint: Checkpoint = _NONE,
    metric: Callable[[Runner], Mapping[str, float]] | None = None,
    budget: Mapping[str, Budget | float | str] | None = None,
    labels: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    preprocess: Step = None,
    postprocess: Step = None,
) -> Report:
    """Export a PyTorch module: convert it, verify each artifact against it, measure latency.

    Args:
        module: A `torch.nn.Module` with its weights; it is not changed. It is exported in eval mode, as float32.
        inputs: What forward takes, or `preprocess`: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. Parity is judged on it, so give real data.
        formats: Names, aliases or `Format` values.
        into: Folder that becomes the export: a new or empty one, or an earlier export, which is replaced.
        dynamic: True: the batch axis is dynamic, and every axis whose size differs between `inputs` and `calibration`;
            False: all axes are static; or a mapping of input name -> {axis: name}.
        calibration: Further inputs, each like `inputs`. int8 formats are calibrated with all of them, and every
            artifact is verified with some of them.
        bench: Whether to time the artifacts.
        timeout: Seconds that one conversion or verification may take.
        workers: How many jobs run side by side; by default half the cores, at least two.
        executor: Runs the jobs on other machines; see `Engine`.
        staging: The URL through which their files travel; see `Engine`.
        progress: Called with one line about each format when it is finished; for example `print`.
        checkpoint: The checkpoint that the weights were read from, for the report.
        metric: Your own metrics of a model, given as a function of named arrays; called with PyTorch and each artifact:
            `lambda run: {"accuracy": float((run({"x": x})["output_0"].argmax(-1) == y).mean())}`.
        budget: How much worse each metric may be than PyTorch's: `{"accuracy": Budget(0.01, mode="max")}`. An artifact
            that loses more is a `mismatch`; in int8, w8 and w4 one that loses less is `verified`, whatever its
            elements.
        labels: Names of the classes in the last axis of an output, in their order, to be embedded in each artifact.
        metadata: Further strings to be embedded, by name.
        preprocess: A module, or a function of tensors, that runs before forward in each artifact: it takes raw inputs
            and returns what forward takes. Or the name of an attribute of the module.
        postprocess: The same for what runs after forward: it takes what forward returned.

    Returns:
        The report, also saved in `into` as `report.json`, `report.md` and `report.html`.

    Raises:
        UnknownFormat: a format's name is unknown.
        BadRequest: the module's or the inputs' values cannot be flattened into tensors, forward or `preprocess` takes
            other arguments, labels or metadata are not strings, `into` exists and is not an export or has files of
            yours, or a budget has no metric or does not say which way it is better.
    """
    from polyexport.capture.flatten import as_runner
    from polyexport.capture.snapshot import load

    check(labels, metadata or {})
    steps = Processing(preprocess, postprocess)
    dynamic = plain(dynamic)
    chosen, limits = resolve(formats), directed(budgets(budget), {})
    if limits and metric is None:
        raise BadRequest(
            f"a budget for {', '.join(limits)}, but no metric; give metric=, a function of a runner that measures it"
        )
    with (
        requested(module, inputs, chosen, into, dynamic, calibration, checkpoint, steps) as request,
        Engine(
            workers=workers,
            timeout=timeout,
            executor=executor,
            staging=staging,
            libraries=libraries(module),
            tell=progress,
        ) as engine,
    ):
        request = replace(request, labels=tuple(labels), metadata=dict(metadata or {}), processing=steps.described)
        report = engine.submit(request).result()
        report = engine.bench(report, chosen) if bench else report
        if metric is None or report.model is None:
            return report
        eager = as_runner(load(report.folder / "source"))
        judged = measured(report, lambda run: metric(run or eager), engine, chosen, limits)
        return engine.explained(judged, chosen)


@contextlib.contextmanager
def requested(
    module: Any,
    inputs: Any,
    formats: tuple[Format, ...],
    into: str | Path,
    dynamic: Dynamic = True,
    calibration: Iterable[Any] = (),
    checkpoint: Checkpoint = _NONE,
    steps: Processing = NONE,
) -> Iterator[Request]:
    """A request for an engine, from the arguments of `export` and with its errors; its files are removed at the end."""
    import torch

    from polyexport.capture.answer import ask
    from polyexport.capture.calls import check_call, save_call
    from polyexport.capture.flatten import as_call, check_dense, flattened_call
    from polyexport.capture.snapshot import save_module

    check_name(into)
    final = Path(into).expanduser().resolve()
    if final.is_dir() and not can_write(final):
        raise BadRequest(f"{final} cannot be written; give another folder")
    if is_export(final) and (theirs := foreign(final)):
        raise BadRequest(
            f"{final} is an export that also has {', '.join(theirs[:3])}, which would be lost; move that, or give "
            "another folder"
        )
    if not may_become_export(final):
        raise BadRequest(f"{final} exists and is not an export; give a new or empty folder, or an export to replace")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = unfinished(final.parent)
    except OSError as error:
        raise BadRequest(f"{final.parent} is no folder that can be written: {error.strerror}") from None
    try:
        found = resolved(steps, module)
        for index, call in enumerate(map(as_call, itertools.chain([inputs], calibration))):
            first = entry(module, found)
            check_call(first, *call)
            leaves, _, names = flattened_call(getattr(first, "forward", first), *call)
            check_dense({name: leaves[leaf] for name, leaf in names.items()})
            save_call(*call, work / "source", index)
        received = as_call(inputs) if found.preprocess is None else as_call(preprocessed(found, *as_call(inputs)))
        check_call(module, *received)
        note = save_module(module, None, *as_call(inputs), work / "source", steps=steps)
        with writing(work / "source" / WEIGHTS) as file:
            torch.save(module.state_dict(), file)
        ask(module, received, work / "source")
        yield Request(work, final.name, formats, dynamic, checkpoint, (note,) if note else (), best=False)
    finally:
        discard(work)
