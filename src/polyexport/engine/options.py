"""What to export from a training run, and how; every value is checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyexport.capture.processing import NONE, Processing
from polyexport.capture.selection import Select
from polyexport.engine import plan
from polyexport.engine.labels import check
from polyexport.errors import BadRequest
from polyexport.format import Format
from polyexport.measure.budget import Budget
from polyexport.measure.dynamic_axes import Dynamic


@dataclass(frozen=True, slots=True)
class Options:
    """What to export from a training run, and how.

    Attributes:
        formats: The formats to make of each checkpoint.
        select: What part of the module: a dotted attribute, a function of the module, or None for all of it.
        dynamic: Which input axes may differ from call to call; see `polyexport.export`.
        calibration_batches: How many batches int8 formats are calibrated with.
        keep: How many exports stay on disk; None for all.
        bench: Whether to time the artifacts at the end: True for those of the newest export, `"all"` for every export.
        timeout: Seconds that one conversion or verification may take.
        workers: How many jobs run side by side; by default half the cores, at least two.
        executor: Runs the jobs on other machines; see `Engine`.
        staging: The URL through which their files travel; see `Engine`.
        budget: How much worse each of the user's own metrics may be; see `Session.judge`.
        labels: Names of an output's classes, to be embedded in each artifact.
        metadata: Further strings to be embedded, by name.
        processing: What becomes part of each artifact before and after forward.

    Raises:
        BadRequest: a value is impossible.
    """

    formats: tuple[Format, ...]
    select: Select = None
    dynamic: Dynamic = True
    calibration_batches: int = 8
    keep: int | None = None
    bench: bool | Literal["all"] = True
    timeout: float = 600.0
    workers: int | None = None
    executor: Any = None
    staging: str | None = None
    budget: Mapping[str, Budget] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    processing: Processing = NONE

    def __post_init__(self) -> None:
        check(self.labels, self.metadata)
        plan.steps(self.formats)
        check_limits(self.workers, self.timeout, self.executor, self.staging)
        if not (self.select is None or isinstance(self.select, str) or callable(self.select)):
            raise BadRequest(f"module={self.select!r}; give the name of an attribute, or a function of the module")
        check_whole(calibration_batches=self.calibration_batches)
        if self.keep is not None:
            check_whole(keep=self.keep)
        if self.calibration_batches < 1:
            raise BadRequest(f"calibration_batches={self.calibration_batches}; give 1 or more")
        if self.keep is not None and self.keep < 1:
            raise BadRequest(f"keep={self.keep}; the newest export is always kept, so give 1 or more, or None for all")
        if self.bench not in (True, False, "all"):
            raise BadRequest(f"bench={self.bench!r}; known: True, False, 'all'")

    @property
    def batches(self) -> int:
        """How many batches to take; at least two, since every artifact is also verified with the second."""
        calibrated = any(each.calibrated for each in plan.steps(self.formats).values())
        return max(2, self.calibration_batches) if calibrated else 2


def check_limits(workers: int | None, timeout: float, executor: Any, staging: str | None) -> None:
    """Check the arguments of an engine before anything is started.

    Raises:
        BadRequest: a value is impossible.
    """
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise BadRequest(f"timeout={timeout!r}; give a number of seconds")
    if workers is not None:
        check_whole(workers=workers)
    if not timeout > 0 or (workers is not None and workers < 1):
        raise BadRequest(f"workers={workers}, timeout={timeout}: both must be greater than zero")
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise BadRequest(f"executor={executor!r} has no submit(function, *arguments)")
    if staging is not None and executor is None:
        raise BadRequest(f"staging={staging!r} is for an executor; give executor= too")


def check_whole(**numbers: Any) -> None:
    """Refuse values that are not whole numbers.

    Raises:
        BadRequest: a value is not, with its name.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise BadRequest(f"{name}={value!r}; give a whole number")
