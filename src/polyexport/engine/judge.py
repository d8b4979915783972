"""The user's own metric of PyTorch and of each artifact, judged by the budget.

Requirements:
* In a low precision the budget decides, if there is one: within it an artifact is `verified`, whatever single elements
  do. Float formats have to agree element by element as well.
* Outside the budget is a `mismatch`, in every precision. If a converter can, the layers that cost the most go back to
  float first, more of them in each round, and the first artifact within the budget is kept.
* An artifact without a metric is not claimed to be within the budget: it is `degraded`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyexport.errors import line
from polyexport.format import Format
from polyexport.measure.budget import Budget, Metrics, overdrawn, unknown
from polyexport.measure.drafts import SHARES
from polyexport.report import files
from polyexport.report.outcome import Note, Outcome, Round, notes, of_precisions
from polyexport.report.report import Report
from polyexport.spec import LOW, Runner

if TYPE_CHECKING:
    from polyexport.engine.engine import Engine

Metric = Callable[[Runner | None], Metrics]
"""Computes the metrics of a runner; of PyTorch for None."""


def measured(
    report: Report, metric: Metric, engine: Engine, formats: Iterable[Format], budget: Mapping[str, Budget]
) -> Report:
    """The report with the metrics of PyTorch and of every artifact that runs, judged by the budget; it is saved too."""
    try:
        report = replace(report, metrics=metric(None), budget=budget)
    except Exception as error:  # the user's own code, on another device and without the rest of the run
        return unmeasured(report, line(error, 200), budget)
    if why := unknown(budget, report.metrics):
        return unmeasured(report, why, budget)
    by = _Judge(metric, engine, tuple(formats))
    for outcome in (each for each in report.outcomes if _is_measured(each, budget)):
        try:
            settled = by.judged(report, outcome)
        except Exception as error:  # such as a last batch that is smaller than an artifact of static shapes takes
            why = line(error, 200)
            report = _noted(report, f"no metrics of {outcome.format}: {why}")
            settled = _unjudged(outcome, why, budget)
        report = _with(report, by.mended(report, outcome, settled))
    if any(outcome.rounds for outcome in report.outcomes):
        report = _timed(report, engine, by.formats)
    files.save(report)
    return report


@dataclass(frozen=True, slots=True)
class _Judge:
    """Measures artifacts, and remakes those outside the budget."""

    metric: Metric
    engine: Engine
    formats: tuple[Format, ...]

    def judged(self, report: Report, outcome: Outcome) -> Outcome:
        """The outcome with its metrics, judged by the budget."""
        with self.engine.runner(_with(report, outcome), outcome.format, self.formats) as run:
            return judged(replace(outcome, metrics=self.metric(run)), report.metrics, report.budget)

    def mended(self, report: Report, first: Outcome, settled: Outcome) -> Outcome:
        """The artifact with the fewest layers in float that is within the budget, if `settled` is not.

        `first` is the outcome before it was judged. Where none keeps the budget the first one stays.
        """
        if settled.publishable or not settled.by_budget or not self.engine.mends(report, first.format, self.formats):
            return settled
        tried, failed = [(0.0, settled)], ""
        try:
            for share in SHARES:
                tried.append((share, self._again(report, first, share)))
                if tried[-1][1].publishable:
                    break
        except Exception as error:  # a converter may raise anything, and what there is stays
            failed = line(error, 200)
        _, last = tried[-1]
        stays = last if last.publishable else settled
        rounds = tuple(_round(share, each, chosen=each is stays) for share, each in tried)
        if last.publishable:
            return replace(self.engine.settled(report, last, self.formats), rounds=rounds)
        so_far = f"with {tried[-1][0]:.1%} of its layers in float it still is" if len(tried) > 1 else ""
        return replace(settled, reason="; ".join(filter(None, [settled.reason, so_far, failed])), rounds=rounds)

    def _again(self, report: Report, first: Outcome, share: float) -> Outcome:
        """The artifact with that share of its layers in float, judged by the budget; stored next to the other one."""
        made = self.engine.remade(report, first.format, share, self.formats)
        return self.judged(report, made) if _is_measured(made, report.budget) else made


def _round(share: float, outcome: Outcome, *, chosen: bool) -> Round:
    size = outcome.artifact.bytes if outcome.artifact else 0
    p50_ms = outcome.latency.p50_ms if outcome.latency else None
    return Round(share, size, outcome.metrics, p50_ms, outcome.remark, chosen)


def _with(report: Report, outcome: Outcome) -> Report:
    """The report with this outcome in place of the one of the same format."""
    outcomes = (outcome if each.format == outcome.format else each for each in report.outcomes)
    return replace(report, outcomes=tuple(outcomes))


def _timed(report: Report, engine: Engine, formats: Iterable[Format]) -> Report:
    """The report of artifacts some of which were made again: described, and timed where the others were."""
    kept = [note for note in report.notes if note.kind != "precision"]
    report = replace(report, notes=(*kept, *notes("precision", *of_precisions(report.outcomes))))
    return report if report.baseline is None else engine.bench(report, formats)


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
