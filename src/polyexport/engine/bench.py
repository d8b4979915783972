"""Latency of every artifact of an export, side by side.

Requirements:
* One process per runtime, since some crash when loaded together; the same inputs and threads for all.
* Cold starts one after another, then rounds in turn, so that a machine that slows down does so for all of them.
* What is slower than eager PyTorch is named in the notes, with what is known of the cause.
* A runtime that is missing here or ends while it is timed, and one that only stands in for the artifact's own, keeps
  its state, gets no latency, and is named in the notes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from polyexport.engine.dispatch import Dispatcher
from polyexport.engine.rerun import Runnable, recorded, runnables, signature
from polyexport.engine.routes import Watch
from polyexport.errors import line
from polyexport.format import Format
from polyexport.measure.dynamic_axes import resized
from polyexport.measure.latency import QUIET, ROUNDS, Latency, is_quiet, summarize, waited_by_median
from polyexport.measure.reference import VALIDATION_BATCH
from polyexport.report.files import save
from polyexport.report.outcome import Outcome, notes
from polyexport.report.report import Report
from polyexport.spec import ExportSpec, write_arrays
from polyexport.workers import toolchain
from polyexport.workers.job import Bench
from polyexport.workers.process import Conversation

EAGER = "pytorch"
"""The baseline's name among the formats that are timed."""


def bench(report: Report, formats: Mapping[str, Format], dispatcher: Dispatcher, watch: Watch) -> Report:
    """Time eager PyTorch and every artifact that runs; saves the report and returns it."""
    runnable = runnables(report, formats)
    if report.model is None or not runnable:
        return report
    spec = signature(report)
    batch = next((int(tensor.shape[0]) for tensor in spec.static().inputs if tensor.shape), 1)
    try:
        batches = {EAGER: VALIDATION_BATCH, **{each.name: each.batch for each in runnable}}
        measured, why_not = _measured(runnable, spec, batches, batch, dispatcher, watch, one_row=True)
    except KeyboardInterrupt:
        _noted(report, _INTERRUPTED)
        raise
    if dispatcher.workers.closed:  # by a caller that was interrupted while it waited for this
        return _noted(report, _INTERRUPTED)
    return _recorded(report, measured, why_not, {each.name: each.format.slow_because for each in runnable})


def sweep(
    report: Report, formats: Mapping[str, Format], dispatcher: Dispatcher, watch: Watch, *, most: int = 4096
) -> list[tuple[str, Latency]]:
    """Time eager PyTorch and every artifact at batch sizes 1, 2, 4 … `most`, each until its throughput gains under 5 %.

    Dynamic axes other than the batch keep their size of the validation batch; an artifact of static shapes is left
    out, one that lacks a processing step, and PyTorch where the export may not be unpickled. The report is not changed.

    Returns:
        Format and latency, in the order measured; the batch size is a field of the latency.
    """
    spec = signature(report)
    axes = {tensor.name: tensor.dynamic for tensor in spec.inputs}
    leading = {called for named in axes.values() for axis, called in named.items() if axis == 0}
    whole = [each for each in runnables(report, formats) if each.batch == VALIDATION_BATCH]
    left = [each for each in whole if each.spec.is_dynamic]
    real = recorded(report, VALIDATION_BATCH, spec.input_names)
    found: list[tuple[str, Latency]] = []
    before: dict[str, float] = {}
    size = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "batch.npz")
        while left and leading and size <= most:
            write_arrays(path, resized(real, axes, {**spec.sizes, **dict.fromkeys(leading, size)}))
            batches = dict.fromkeys([EAGER, *(each.name for each in left)], str(path))
            measured, _ = _measured(left, spec, batches, size, dispatcher, watch)
            found += measured.items()
            now = {name: latency.throughput_per_second for name, latency in measured.items()}
            left = [each for each in left if now.get(each.name, 0) > _WORTH_IT * before.get(each.name, 0)]
            before, size = now, 2 * size
    return found


_INTERRUPTED = "not timed: interrupted"

_WORTH_IT = 1.05
"""Least ratio of a doubled batch's throughput to the batch's for which the next size is tried too."""

Start = Callable[[], AbstractContextManager[Conversation]]


def _measured(
    runnable: Sequence[Runnable],
    spec: ExportSpec,
    batches: Mapping[str, str],
    batch: int,
    dispatcher: Dispatcher,
    watch: Watch,
    *,
    one_row: bool = False,
) -> tuple[dict[str, Latency], dict[str, str]]:
    """Latency of eager PyTorch and of each artifact on its batch, and the reason for each that has none.

    With `one_row`, calls with the batch's first row alone are timed too.
    """
    found: dict[str, dict[str, Any]] = {}
    why_not: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        talks: dict[str, Conversation] = {}
        for name, start in _starts(runnable, spec, batches, dispatcher, one_row):
            watch(name, "measuring")
            try:
                talks[name] = stack.enter_context(start())
            # the export was made on another machine, and its environment cannot be made here
            except Exception as error:
                why_not[name] = line(error)
                continue
            found[name] = talks[name].answer() or {}
            if "stand_in" in found[name]:
                why_not[name] = found.pop(name)["stand_in"]
        _take_turns({name: talks[name] for name in found}, found)
    for name in (*talks, *why_not):
        watch(name, None)
    ended = [name for name, about in found.items() if not about]
    why_not |= {name: f"its runtime ended while it was timed, see logs/{name}.log" for name in ended}
    measured = {
        name: summarize(**about, batch=batch, threads=dispatcher.limits.threads)
        for name, about in found.items()
        if about
    }
    return measured, why_not


def _starts(
    runnable: Sequence[Runnable], spec: ExportSpec, batches: Mapping[str, str], dispatcher: Dispatcher, one_row: bool
) -> Iterator[tuple[str, Start]]:
    """The name of each thing that is timed, and how its worker is started."""
    eager = Bench(format=None, spec=spec, batch=batches[EAGER], one_row=one_row)
    if dispatcher.trusted:  # its module is a pickle
        yield EAGER, partial(dispatcher.converse, eager, toolchain.HOST, f"{EAGER}.bench", f"logs/{EAGER}.log")
    for each in runnable:
        job = Bench(**each.of_job(dispatcher), batch=batches[each.name], one_row=one_row)
        yield (
            each.name,
            partial(dispatcher.converse, job, each.runtime, f"{each.name}.bench", each.log, gpu=each.format.uses_gpu),
        )


def _take_turns(talks: Mapping[str, Conversation], found: dict[str, dict[str, Any]]) -> None:
    """Rounds of calls, one runtime at a time; one that does not answer gets no further rounds."""
    for _ in range(ROUNDS):
        for name, talk in talks.items():
            answer = talk.ask() if found[name] else None
            if answer is None:
                found[name] = {}
            else:
                samples = {each: [*found[name].get(each, ()), *answer[each]] for each in ("samples_ms", "one_row_ms")}
                found[name] |= answer | samples


def _recorded(
    report: Report,
    measured: Mapping[str, Latency],
    why_not: Mapping[str, str],
    slow_because: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    baseline = measured.get(EAGER)
    quiet = is_quiet(measured.values())
    beside = baseline if quiet and baseline is not None and baseline.waited <= QUIET else None
    outcomes = tuple(_with_latency(outcome, measured.get(outcome.format), beside) for outcome in report.outcomes)
    texts = [f"no latency of {name}: {why}" for name, why in why_not.items()]
    if not quiet:
        waited = waited_by_median(measured.values())
        texts.append(
            f"latency was measured on a busy machine: runtimes waited for a processor {waited:.0%} of the time, "
            "so no format is called the fastest"
        )
    elif busy := {name: latency.waited for name, latency in measured.items() if latency.waited > QUIET}:
        named = {"eager PyTorch" if name == EAGER else name: waited for name, waited in busy.items()}
        shares = ", ".join(f"{name} {waited:.0%}" for name, waited in named.items())
        who = "no format has a speed-up" if EAGER in busy else "some formats have no speed-up"
        texts.append(f"{who}: their runtimes waited for a processor for much of the time ({shares})")
    for outcome in outcomes:
        if (latency := outcome.latency) is not None and latency.speedup and round(latency.speedup, 2) < 1:
            texts.append(_slower(outcome.format, latency, slow_because.get(outcome.format, "")))
    return _noted(replace(report, outcomes=outcomes, baseline=baseline), *texts)


def _slower(name: str, latency: Latency, because: str) -> str:
    eager_ms = latency.p50_ms * (latency.speedup or 1)
    return (
        f"{name} is slower than eager PyTorch on the same {latency.threads} threads: {latency.p50_ms:.3g} ms against "
        f"{eager_ms:.3g}; {f'what may be the cause: {because}' if because else 'the cause is unknown'}"
    )


def _noted(report: Report, *texts: str) -> Report:
    """The report with these notes about timing in place of earlier ones, saved."""
    kept = (note for note in report.notes if note.kind != "latency")
    report = replace(report, notes=(*kept, *notes("latency", *texts)))
    save(report)
    return report


def _with_latency(outcome: Outcome, latency: Latency | None, baseline: Latency | None) -> Outcome:
    """An outcome with its latency, and its speedup over the `baseline` where the two can be compared."""
    if latency is None:
        return outcome
    if baseline is not None and latency.waited <= QUIET and not outcome.outside:
        latency = replace(latency, speedup=baseline.p50_ms / latency.p50_ms)
    spent = (latency.first_ms + sum(latency.samples_ms)) / 1e3 + latency.load_seconds
    return replace(outcome, latency=latency, seconds={**outcome.seconds, "bench": spent})
