"""What forward reads of its inputs without effect: numbers that it prints or logs, checks that do nothing but raise.

A trace has no use for them, and `torch.export` refuses most. While a module is traced, forward reads there what it read
on the validation batch.

Requirements:
* A read is idle where forward, whatever it reads there, calls the same functions from the same lines and answers the
  same to the bit; or where it raises at once in the frame that read, as `assert` does.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.spec import Arrays
from polyexport.tracing.forward import within
from polyexport.tracing.reads import FailedAt, Followed, Reads, reads, watching

if TYPE_CHECKING:
    from torch import nn

_SITES, _READS = 8, 8
"""How many sites are looked at, and how often one may be read."""


@dataclass(frozen=True, slots=True)
class Idle:
    """What forward reads without effect.

    Attributes:
        values: Site -> what it read there, in order.
        checks: Those of the sites at which forward raises where it reads another truth value.
    """

    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    checks: tuple[str, ...] = ()


def idle(model: Any, inputs: Arrays, sites: Collection[str]) -> Idle:
    """Which of `sites` are idle: the flat `model` is run with other values in the place of what it reads there."""
    try:
        told = reads(model, inputs)
    except FailedAt:  # it ran before, so that only the watching fails
        return Idle()
    few = {site: values for site, values in told.objects.items() if site in sites and len(values) <= _READS}
    found = {site: values for site, values in few.items() if not any(isinstance(each, Followed) for each in values)}
    found = dict(itertools.islice(found.items(), _SITES))
    checks = tuple(site for site, values in found.items() if _only_raises(model, inputs, site, values))
    unused = (site for site, values in found.items() if site not in checks and _is_unused(model, inputs, told, site))
    return Idle({site: found[site] for site in (*checks, *unused)}, checks)


def _only_raises(model: Any, inputs: Arrays, site: str, values: tuple[Any, ...]) -> bool:
    """Whether each of the truth values that are read at `site` makes forward raise there, were it the other one."""
    if not all(isinstance(each, bool) for each in values):
        return False
    return all(_raises(model, inputs, site, (*values[:index], not values[index])) for index in range(len(values)))


def _raises(model: Any, inputs: Arrays, site: str, values: tuple[bool, ...]) -> bool:
    try:
        reads(model, inputs, {site: values})
    except FailedAt as error:
        return error.checked
    return False


def _is_unused(model: Any, inputs: Arrays, told: Reads, site: str) -> bool:
    """Whether forward goes the same way and answers the same, whatever it reads at `site`."""
    import torch

    for other in _others(told.objects[site]):
        try:
            found = reads(model, inputs, {site: other})
        except FailedAt:
            return False
        pairs = zip(found.outputs, told.outputs, strict=True)
        if found.path != told.path or not all(torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in pairs):
            return False
    return True


def _others(values: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Other values in the place of those: at first such as a size or an index may be, at last extreme ones."""
    done = [repr(values)]
    for way in range(len(_REALS)):
        other = tuple(_other(each, way) for each in values)
        if repr(other) not in done:
            done.append(repr(other))
            yield other


_INTEGERS = (lambda n: n + 1, lambda n: n - 1, lambda n: 0, lambda n: -n, lambda n: 2**31 - 1, lambda n: -(2**31))
_REALS = (
    lambda x: x + 1,
    lambda x: x - 1,
    lambda x: 0.0,
    lambda x: -x,
    lambda x: 1e30,
    lambda x: -1e30,
    lambda x: float("nan"),
)


def _other(value: Any, way: int) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return _INTEGERS[min(way, len(_INTEGERS) - 1)](value)
    if isinstance(value, float | complex):
        return _REALS[way](value)
    if isinstance(value, list):
        return [_other(each, way) for each in value]
    if isinstance(value, np.ndarray):
        return np.asarray(_other(value.tolist(), way)).astype(value.dtype, copy=False)
    return f"{value}?"


@contextlib.contextmanager
def idle_reads_given(model: nn.Module) -> Iterator[None]:
    """Let forward of a flat model read the constants that are known to be idle; see `Idle`."""
    values = getattr(model, "idle", None)
    with within(model, lambda tensors: watching(tensors, values)) if values else contextlib.nullcontext():
        yield
