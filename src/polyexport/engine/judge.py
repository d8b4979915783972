"""The user's own metric, of PyTorch and of each artifact, and what a budget makes of it.

Requirements:
* Of a low precision the budget is the judge where there is one: inside of it is `verified`, whatever single elements
  do. Float formats have to agree element by element as well.
* Outside of the budget is a `mismatch`, in every precision.
* What has no metric is not said to be within the budget: it is `degraded`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from polyexport.errors import line
from polyexport.measure.budget import Budget, Metrics, overdrawn, unknown
from polyexport.report import files
from polyexport.report.outcome import Note, Outcome
from polyexport.report.report import Report
from polyexport.spec import Precision, Runner

Metric = Callable[[Runner | None], Metrics]
"""The metrics of what a runner answers; of PyTorch where there is none."""

Open = Callable[[Report, str], AbstractContextManager[Runner]]
"""One artifact of a report as a function, by its format's name."""

LOW: tuple[Precision, ...] = ("int8", "w8", "w4")
"""Precisions whose single elements may be far off though the whole is right."""


def measured(report: Report, metric: Metric, runner: Open, budget: Mapping[str, Budget]) -> Report:
    """The report with the metrics of PyTorch and of every artifact that runs, judged by the budget; it is saved too."""
    try:
        report = replace(report, metrics=metric(None), budget=budget)
    except Exception as error:  # the user's own code, on another device and without the rest of the run
        return unmeasured(report, line(error, 200), budget)
    if why := unknown(budget, report.metrics):
        return unmeasured(report, why, budget)
    for outcome in (each for each in report.outcomes if _is_measured(each, budget)):
        try:
            with runner(report, outcome.format) as run:
                settled = judged(replace(outcome, metrics=metric(run)), report.metrics, budget)
        except Exception as error:  # such as a last batch that is smaller than an artifact of static shapes takes
            why = line(error, 200)
            report = _noted(report, f"no metrics of {outcome.format}: {why}")
            settled = _unjudged(outcome, why, budget)
        report = replace(
            report, outcomes=tuple(settled if each.format == outcome.format else each for each in report.outcomes)
        )
    files.save(report)
    return report


def unmeasured(report: Report, why: str, budget: Mapping[str, Budget]) -> Report:
    """The report where no metric can be had, which a note says, and each artifact that a budget was given for."""
    report = replace(report, outcomes=tuple(_unjudged(each, why, budget) for each in report.outcomes))
    report = _noted(report, f"no metrics: {why}")
    files.save(report)
    return report


def judged(outcome: Outcome, reference: Metrics, budget: Mapping[str, Budget]) -> Outcome:
    """An outcome whose metrics are known, by the budget."""
    if why := overdrawn(budget, reference, outcome.metrics):
        also = f"; {outcome.reason}" if outcome.reason else ""
        return replace(outcome, state="mismatch", reason=f"outside the budget: {why}{also}", by_budget=True)
    if not _is_pardoned(outcome, budget):
        return outcome
    remark = "; ".join(filter(None, [outcome.remark, f"within the budget, though by single elements {outcome.reason}"]))
    return replace(outcome, state="verified", reason="", remark=remark, by_budget=True)


def _is_measured(outcome: Outcome, budget: Mapping[str, Budget]) -> bool:
    return outcome.publishable or _is_pardoned(outcome, budget)


def _is_pardoned(outcome: Outcome, budget: Mapping[str, Budget]) -> bool:
    """Whether it disagrees in a way that a budget may allow: it runs, in low precision."""
    runs = outcome.state == "mismatch" and outcome.parity is not None
    return bool(budget) and runs and outcome.precision in LOW


def _unjudged(outcome: Outcome, why: str, budget: Mapping[str, Budget]) -> Outcome:
    if not (budget and outcome.publishable):
        return outcome
    lacks = f"it is not known whether it keeps the budget: {why}"
    return replace(outcome, state="degraded", reason="; ".join(filter(None, [outcome.reason, lacks])))


def _noted(report: Report, note: str) -> Report:
    return replace(report, notes=(*report.notes, Note("metrics", note)))
