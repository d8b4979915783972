"""NaN as PyTorch treats it, in a module that looks for NaN: it is the greatest of all, and results of it are NaN too.

Most runtimes compare it as unlike everything, so that a maximum passes it over. A module that does not look for NaN is
traced as it is, since the tests cost time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.forward import within

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def nans_kept(model: Any) -> Iterator[None]:
    """Trace the flat `model`, if it looks for NaN, with the functions of the table below as PyTorch has them."""
    from torch.overrides import TorchFunctionMode

    if not getattr(model, "guards", False):
        yield
        return
    written = _table()

    class Kept(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            composed, given = written.get(function), dict(kwargs or {})
            if composed is None or not args or not args[0].is_floating_point():
                return function(*args, **given)
            return composed(function, *args, **given)

    with within(model, lambda _: Kept()):
        yield


def _table() -> Mapping[Any, Callable[..., Any]]:
    import torch

    named: Mapping[Callable[..., Any], tuple[str, ...]] = {
        _index: ("argmax", "argmin"),
        _extreme: ("max", "min", "amax", "amin"),
        _larger: ("maximum", "minimum"),
        _sorted: ("sort", "argsort", "topk"),
        _elementwise: ("relu", "relu_", "clamp", "clamp_", "clip", "sign"),
    }
    owners = (torch, torch.Tensor, torch.nn.functional)
    return {
        getattr(owner, name): composed
        for composed, names in named.items()
        for name in names
        for owner in owners
        if hasattr(owner, name)
    }


def _first(x: torch.Tensor, dim: int, keepdim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether there is a NaN along an axis, and the index of the first one."""
    found = x.isnan()
    return found.any(dim, keepdim), found.float().argmax(dim, keepdim)


def _index(function: Any, x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """`torch.argmax` or `torch.argmin`."""
    import torch

    if dim is None:
        return _index(function, x.flatten(), 0)
    some, first = _first(x, dim, keepdim)
    return torch.where(some, first, function(x, dim, keepdim))


def _extreme(function: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`torch.max`, `torch.min` and their forms for several axes."""
    import torch

    found = function(x, *args, **kwargs)
    dim, keepdim = _given(args, kwargs)
    if isinstance(dim, torch.Tensor):
        return _larger(function, x, dim)
    if isinstance(found, torch.Tensor):
        some = x.isnan()
        for axis in sorted([dim] if isinstance(dim, int) else dim or range(x.dim()), reverse=True):
            some = some.any(axis, keepdim)
        return torch.where(some, math.nan, found)
    some, first = _first(x, dim, keepdim)
    return type(found)((torch.where(some, math.nan, found[0]), torch.where(some, first, found[1])))


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    named = dict(zip(("dim", "keepdim"), args, strict=False)) | dict(kwargs)
    return named.get("dim", named.get("other")), bool(named.get("keepdim"))


def _larger(function: Any, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.maximum` or `torch.minimum`."""
    import torch

    return torch.where(x.isnan() | other.isnan(), math.nan, function(x, other))


def _sorted(function: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`torch.sort` and `torch.topk`, with infinity in the place of NaN meanwhile."""
    import torch

    rest = args[1:] if function.__name__ == "topk" else args
    dim = rest[0] if rest and type(rest[0]) is int else kwargs.get("dim", -1)
    absent = x.isnan()
    found = function(torch.where(absent, math.inf, x), *args, **kwargs)
    if isinstance(found, torch.Tensor):
        return found
    values, indices = found
    return type(found)((torch.where(absent.float().gather(dim, indices) > 0, math.nan, values), indices))


def _elementwise(function: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A function of each element."""
    import torch

    absent = x.isnan()
    found = function(x, *args, **kwargs)
    kept = torch.where(absent, math.nan, found)
    return found.copy_(kept) if function.__name__.endswith("_") or kwargs.get("inplace") else kept
