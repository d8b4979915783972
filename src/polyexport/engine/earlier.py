"""Earlier exports in the folder: one to be reused, those to be removed, and names that are taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyexport.engine.request import Request
from polyexport.errors import BadRequest
from polyexport.formats import known
from polyexport.measure.reference import Reference
from polyexport.report import manifest
from polyexport.report.folders import BEST, can_write, free_name, is_export, may_become_export, may_point_best
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report, history
from polyexport.serialization import encode


def prune(newest: Report, keep: int | None) -> None:
    """Remove the oldest exports of this run beyond `keep`; never the newest, which is the best, nor another run's."""
    older = history(newest)[:-1] if keep is not None else []
    for each in older[: max(0, len(older) + 1 - (keep or 1))]:
        if may_become_export(each.folder):  # else the user has put files in it
            shutil.rmtree(each.folder, ignore_errors=True)


def beside_what_is_there(request: Request) -> Request:
    """The request, renamed if its name would overwrite files that are not an export; a note says so."""
    parent, name, found = request.work.parent, request.name, request.notes
    if (free := free_name(parent, name)) != name:
        ours = "has files of yours" if is_export(parent / name) else "is not an export"
        what = ours if can_write(parent / name) or not (parent / name).is_dir() else "cannot be written"
        found += (f"{parent / name} {what} and is left alone, so this export is called {free}",)
    if request.best and not may_point_best(parent / BEST):
        found += (
            f"{parent / BEST} does not point to an export and is left alone, so nothing points to the newest export",
        )
    return replace(request, name=free, notes=found)


def finished_before(request: Request, reference: Reference) -> Report | None:
    """The finished export of the same name, request, weights, inputs and outputs, if every format in it agreed.

    The outputs are compared since forward may have changed, which the weights do not show.
    """
    if not all(known().get(each.name) is each for each in request.formats):
        return None  # a user's own format may have changed under the same name
    for folder in (request.final, *(parent / request.name for parent in request.former)):
        try:
            before, report = manifest.load(folder), Report.load(folder)
        except (OSError, BadRequest):
            continue  # no report, or another version's
        same = before.checkpoint.sha256 == reference.checkpoint_sha256 and before.question == encode(request.question)
        if not (same and all(outcome.publishable or _is_still_out_of_reach(outcome) for outcome in report.outcomes)):
            continue
        if _have_equal_arrays(folder / before.batches[0].path, request.work / reference.batches[0].path):
            return report
    return None


def _have_equal_arrays(one: Path, other: Path) -> bool:
    """Whether two files have equal arrays of the same names; not if one is gone, as where data must not stay."""
    if not (one.exists() and other.exists()):
        return False
    with np.load(one) as ours, np.load(other) as theirs:
        return set(ours) == set(theirs) and all(_is_same(ours[name], theirs[name]) for name in ours)


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _is_still_out_of_reach(outcome: Outcome) -> bool:
    """Whether a format was skipped for hardware or a program that is still missing."""
    each = known()[outcome.format]
    return outcome.state == "skipped" and bool(each.lacks())
