"""The user's own metric of PyTorch and of each artifact, judged by the budget.

Requirements:
* In a low precision the budget decides, if there is one: within it an artifact is `verified`, whatever single elements
  do. Float formats have to agree element by element as well.
* Outside the budget is a `mismatch`, in every precision.
* An artifact without a metric is not claimed to be within the budget: it is `degraded`, with the reason.
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
"""Computes the metrics of a runner; of PyTorch for None."""

Open = Callable[[Report, str], AbstractContextManager[Runner]]
"""Opens one artifact of a report as a function, by its format's name."""

LOW: tuple[Precision, ...] = ("int8", "w8", "w4")
"""Precisions in which single elements may be far off although the model is as good."""


def measured(report: Report, metric: Metric, runner: Open, budget: Mapping[str, Budget]) -> Report:
    """The report with the metrics of PyTorch and of every artifact that runs, judged by the budget; saved."""
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
    """The report where no metric could be measured: a note says why, and so does each artifact with a budget."""
    report = replace(report, outcomes=tuple(_unjudged(each, why, budget) for each in report.outcomes))
    report = _noted(report, f"no metrics: {why}")
    files.save(report)
    return report


def judged(outcome: Outcome, reference: Metrics, budget: Mapping[str, Budget]) -> Outcome:
    """An outcome with measured metrics, judged by the budget."""
    if why := overdrawn(budget, reference, outcome.metrics):
        also = f"; {outcome.reason}" if outcome.reason else ""
        return replace(outcome, state="mismatch", reason=f"outside the budget: {why}{also}", by_budget=True)
    if not _is_pardoned(outcome, budget):
        return outcome
    remark = "; ".join(
        filter(None, [outcome.remark, f"within the budget, although element by element: {outcome.reason}"])
    )
    return replace(outcome, state="verified", reason="", remark=remark, by_budget=True)


def _is_measured(outcome: Outcome, budget: Mapping[str, Budget]) -> bool:
    return outcome.publishable or _is_pardoned(outcome, budget)


def _is_pardoned(outcome: Outcome, budget: Mapping[str, Budget]) -> bool:
    """Whether it disagrees in a way that a budget may allow: a low precision that runs."""
    runs = outcome.state == "mismatch" and outcome.parity is not None
    return bool(budget) and runs and outcome.precision in LOW


def _unjudged(outcome: Outcome, why: str, budget: Mapping[str, Budget]) -> Outcome:
    if not (budget and outcome.publishable):
        return outcome
    lacks = f"not known to be within the budget: {why}"
    return replace(outcome, state="degraded", reason="; ".join(filter(None, [outcome.reason, lacks])))


def _noted(report: Report, note: str) -> Report:
    return replace(report, notes=(*report.notes, Note("metrics", note)))
