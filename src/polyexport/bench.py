"""Latency of every artifact of an export, side by side.

Requirements:
* One process per runtime, since some runtimes crash beside each other; the same inputs and threads for all.
* Cold starts one after another, then rounds in turn, so that drift of the machine hits all alike.
* A runtime that ends while it is timed keeps its state, gets no latency, and is named in the notes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from polyexport import toolchain
from polyexport.build import Watch
from polyexport.dispatch import Dispatcher
from polyexport.format import Format
from polyexport.job import Batch, Job
from polyexport.latency import ROUNDS, Latency, summarise
from polyexport.process import Conversation
from polyexport.records import decode, read_json
from polyexport.reference import VALIDATION_BATCH
from polyexport.report import Outcome, Report
from polyexport.spec import ExportSpec

EAGER = "pytorch"
"""The baseline's name among the formats that are timed."""


def bench(report: Report, formats: Mapping[str, Format], dispatcher: Dispatcher, watch: Watch) -> Report:
    """Time eager PyTorch and every artifact that runs; saves the report and returns it."""
    runnable = [outcome for outcome in report.outcomes if outcome.parity is not None]
    if report.model is None or not runnable:
        return report
    spec = decode(ExportSpec, read_json(report.folder / "manifest.json")["spec"])
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        talks: dict[str, Conversation] = {}
        for name, start in _starts(runnable, formats, spec, dispatcher):
            watch(name, "measuring")
            talks[name] = stack.enter_context(start())
            found[name] = talks[name].answer()
        _take_turns(talks, found)
    batch = next((int(tensor.shape[0]) for tensor in spec.static().inputs if tensor.shape), 1)
    measured = {
        name: summarise(**about, batch=batch, threads=dispatcher.bounds.threads)
        for name, about in found.items()
        if about
    }
    for name in found:
        watch(name, "")
    return _recorded(report, measured, [outcome.format for outcome in runnable])


Start = Callable[[], AbstractContextManager[Conversation]]


def _starts(
    outcomes: Sequence[Outcome], formats: Mapping[str, Format], spec: ExportSpec, dispatcher: Dispatcher
) -> Iterator[tuple[str, Start]]:
    """What is timed, by name, and how its worker is started."""
    batches = (Batch(VALIDATION_BATCH),)
    eager = Job("bench", spec=spec, batches=batches)
    yield EAGER, partial(dispatcher.converse, eager, toolchain.HOST, f"{EAGER}.bench", "logs/model.log")
    for outcome in outcomes:
        each, name = formats[outcome.format], outcome.format
        assert outcome.artifact is not None, "what has parity was made"
        made_by = next(route for route in each.routes if route.name == outcome.route)
        chain = toolchain.find(each.runtime or made_by.toolchain)
        signature = replace(spec, inputs=outcome.inputs, outputs=outcome.outputs)
        source = outcome.artifact.path
        job = Job("bench", name, dispatcher.declared(each), source=source, spec=signature, batches=batches)
        yield name, partial(dispatcher.converse, job, chain, f"{name}.bench", f"logs/{name}.log", gpu=each.needs_gpu)


def _take_turns(talks: Mapping[str, Conversation], found: dict[str, dict[str, Any]]) -> None:
    """Rounds of calls, one runtime at a time; who does not answer is out."""
    for _ in range(ROUNDS):
        for name, talk in talks.items():
            answer = talk.ask() if found[name] else None
            if answer is None:
                found[name] = {}
            else:
                answer["samples_ms"] = [*found[name].get("samples_ms", ()), *answer["samples_ms"]]
                found[name] |= answer


def _recorded(report: Report, measured: Mapping[str, Latency], timed: Sequence[str]) -> Report:
    baseline = measured.get(EAGER)
    outcomes = tuple(_with_latency(outcome, measured.get(outcome.format), baseline) for outcome in report.outcomes)
    missing = [name for name in timed if name not in measured]
    notes = (f"no latency of {name}: its runtime ended while it was timed, see logs/{name}.log" for name in missing)
    report = replace(report, outcomes=outcomes, baseline=baseline, notes=(*report.notes, *notes))
    report.save()
    return report


def _with_latency(outcome: Outcome, latency: Latency | None, baseline: Latency | None) -> Outcome:
    if latency is None:
        return outcome
    if baseline is not None:
        latency = replace(latency, speedup=baseline.p50_ms / latency.p50_ms)
    spent = (latency.first_ms + sum(latency.samples_ms)) / 1e3 + latency.load_seconds
    return replace(outcome, latency=latency, seconds={**outcome.seconds, "bench": spent})
