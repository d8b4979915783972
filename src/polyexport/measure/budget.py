"""The budget: how much of the user's own metric an artifact may lose against PyTorch on the same data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from polyexport.errors import BadRequest

Mode = Literal["min", "max"]
"""Whether a lower or a higher metric is better, as in Lightning's `ModelCheckpoint`."""

Metrics = Mapping[str, float | None]
"""Metrics by name; None if a value is not a finite number."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much worse a metric may be than PyTorch's, and which way is worse.

    Attributes:
        most: The allowed difference, or as a string a share of PyTorch's value: `"2%"`.
        mode: Whether a lower or a higher value is better; None to take it from the trainer's callbacks.

    Raises:
        BadRequest: a value is impossible.
    """

    most: float | str
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if not (_is_share(self.most) or (_is_number(self.most) and float(self.most) >= 0)):
            raise BadRequest(
                f"budget {self.most!r}; give how much worse the metric may be, such as 0.01, or a share, such as '2%'"
            )
        if self.mode not in (None, "min", "max"):
            raise BadRequest(f"budget mode={self.mode!r}; known: 'min' if lower is better, 'max' if higher is")

    def allowed(self, beside: float) -> float:
        """The allowed difference from PyTorch's value."""
        return abs(beside) * float(self.most.strip(" %")) / 100 if isinstance(self.most, str) else self.most

    def __str__(self) -> str:
        return self.most.strip() if isinstance(self.most, str) else f"{self.most:g}"


def _is_share(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\s*\d+(?:\.\d*)?\s*%\s*", value) is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Given = Budget | float | str
"""A budget as the user gives it: 0.01 and `"2%"` have no mode."""


def budgets(given: Mapping[str, Given] | None) -> dict[str, Budget]:
    """The budgets by metric.

    Raises:
        BadRequest: a value is not a budget, or `given` is not a mapping.
    """
    if not isinstance(given or {}, Mapping):
        raise BadRequest(f"budget={given!r}; give a metric's name and how much worse it may be: {{'val_acc': 0.01}}")
    return {name: each if isinstance(each, Budget) else Budget(each) for name, each in (given or {}).items()}


def directed(budgets: Mapping[str, Budget], known: Mapping[str, Mode]) -> dict[str, Budget]:
    """The budgets, with modes from `known` where they have none.

    Raises:
        BadRequest: the mode of a metric is unknown.
    """
    made = {name: replace(each, mode=each.mode or known.get(name)) for name, each in budgets.items()}
    for name, each in made.items():
        if each.mode is None:
            raise BadRequest(
                f"it is unknown which way {name} is better; give "
                f"budget={{{name!r}: Budget({each.most!r}, mode='max')}} if higher is, mode='min' if lower is"
            )
    return made


def unknown(budgets: Mapping[str, Budget], measured: Metrics) -> str:
    """A message about budgets for metrics that were not measured; empty if all were."""
    lacking = [name for name in budgets if name not in measured]
    if not lacking:
        return ""
    return f"budget for {', '.join(lacking)}, which validation does not log; it logs {', '.join(measured) or 'nothing'}"


def losses(budgets: Mapping[str, Budget], reference: Metrics, found: Metrics) -> dict[str, float | None]:
    """How much worse each metric is than PyTorch's: negative if it is better, None if either is not a number."""
    return {name: _loss(each, reference.get(name), found.get(name)) for name, each in budgets.items()}


def _loss(budget: Budget, reference: float | None, found: float | None) -> float | None:
    if reference is None or found is None or not math.isfinite(found - reference):
        return None
    return reference - found if budget.mode == "max" else found - reference


def overdrawn(budgets: Mapping[str, Budget], reference: Metrics, found: Metrics) -> str:
    """A message about metrics outside their budget, with both values; empty if there are none."""
    lost = losses(budgets, reference, found)
    return "; ".join(
        f"{name} is {_shown(found.get(name))}, PyTorch has {_shown(reference.get(name))}, the budget is {each}"
        for name, each in budgets.items()
        if not _is_within(each, lost[name], reference.get(name))
    )


_ROUNDOFF = 1e-6
"""Share of the metric's value by which rounding in float32 alone may change it."""


def _is_within(budget: Budget, lost: float | None, beside: float | None) -> bool:
    return lost is not None and beside is not None and lost <= budget.allowed(beside) + _ROUNDOFF * abs(beside)


def _shown(value: float | None) -> str:
    return "not a number" if value is None or not math.isfinite(value) else f"{value:.6g}"
