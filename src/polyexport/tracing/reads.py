"""What forward reads from its inputs into Python: the branches, loops and numbers that a trace freezes.

Requirements:
* Sizes are not data: what depends only on the shape of an input is not listed.
* A site is `file:line` of the caller, the same for a read in PyTorch and for the tracer's warning about it.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import CodeType, FrameType, MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.spec import Arrays

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reads:
    """What one call of forward read, and the path that it took.

    Attributes:
        values: The values read at each site, in order, as text.
        path: A hash of the functions called and of the lines of code that called them.
        objects: The same values as objects.
        outputs: What forward returned.
        counts: The sites of sizes that depend on values, with that size: 0, 1, or 2 for all above.
        guards: Whether it looks for NaN or infinity.
        ties: Whether it chooses among elements in an order that PyTorch does not define for equal ones.
        folded: The inputs, by index, whose int64 values it folds into a range, as hashes do: any integer will do there.
    """

    values: Mapping[str, tuple[str, ...]]
    path: int
    objects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    outputs: tuple[torch.Tensor, ...] = ()
    counts: frozenset[tuple[str, int]] = frozenset()
    guards: bool = False
    ties: bool = False
    folded: frozenset[int] = frozenset()


class Followed(str):
    """What depends on values and is no constant in a trace: a size, or the side that `torch.cond` takes."""

    __slots__ = ()


_READERS = {
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__array__",
    "__contains__",
    "item",
    "tolist",
    "numpy",
    "__format__",
    "__repr__",
    "_assert",
    "equal",
    "allclose",
    "is_nonzero",
}
_SIZED_BY_DATA = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
"""Functions whose results have sizes that depend on values; the sizes are then read without a call."""
_GUARDS = {"isnan", "isinf", "isfinite", "isposinf", "isneginf", "nan_to_num", "nansum", "nanmean", "nanmedian"}
"""Functions for which NaN or infinity is a value like others."""
_CHOOSERS = {"topk", "kthvalue", "median", "nanmedian", "mode"}
"""Functions whose choice among equal elements is not defined."""
_FOLDS = {
    *("remainder", "fmod", "floor_divide", "__mod__", "__floordiv__"),
    *(f"bitwise_{name}" for name in ("and", "or", "xor", "left_shift", "right_shift")),
    *(f"__{name}__" for name in ("and", "or", "xor", "lshift", "rshift")),
}
"""Functions of integers that may bring any of them into a range."""
_SHARED = {"__dlpack__", "untyped_storage", "storage", "data_ptr"}
"""Functions that share a tensor's memory with code that cannot be watched: it may read any value there."""
_UNWARNED = {"equal", "allclose", "__dlpack__"}
"""Readers of which the tracer gives no warning."""
_WARNING = "Converting a tensor to a "


class FailedAt(Exception):
    """Forward raised.

    Attributes:
        site: The last one that it read at, or None if it had read nothing.
        checked: Whether it was raised by a `raise` or `assert` in a frame of the last read, without reading further
            truth values.
    """

    def __init__(self, site: str | None, *, checked: bool = False) -> None:
        super().__init__(site)
        self.site = site
        self.checked = checked


Given = Mapping[str, Sequence[Any]]
"""The values that forward gets at each site, in order, in place of those that it would read."""
NOTHING: Given = MappingProxyType({})


def reads(model: Any, inputs: Arrays, given: Given = NOTHING) -> Reads:
    """Run a flat module once, and list the values that forward reads and that depend on `inputs`.

    Raises:
        FailedAt: forward raised.
    """
    import torch

    tensors = [torch.from_numpy(inputs[name].copy()) for name in model.input_names]
    watch = watching(tensors, given)
    try:
        with torch.inference_mode(), watch:
            answer = model(*tensors)
    except Exception as error:  # forward is the user's, and may raise anything
        checked = not watch.decided and _raised_by(watch.reading, error)
        raise FailedAt(next(reversed(watch.found), None), checked=checked) from error
    objects = {site: tuple(values) for site, values in watch.found.items()}
    texts = {site: tuple(map(_plain, values)) for site, values in objects.items()}
    outputs = answer if isinstance(answer, tuple) else (answer,)
    copied, counts = tuple(tensor.clone() for tensor in outputs), frozenset(watch.counts)
    return Reads(texts, watch.path, objects, copied, counts, watch.guards, watch.ties, frozenset(watch.folded))


def path(model: Any, tensors: Sequence[torch.Tensor]) -> int:
    """A hash of the functions of torch that a flat module calls for some inputs, and of where it calls them.

    The inputs may be fake, without values.

    Raises:
        Exception: whatever forward raises.
    """
    import torch

    watch = watching(())
    fake = next((tensor.fake_mode for tensor in tensors if hasattr(tensor, "fake_mode")), contextlib.nullcontext())
    with torch.no_grad(), fake, watch:
        model(*tensors)
    return int(watch.path)


def _raised_by(frames: Sequence[FrameType], error: BaseException) -> bool:
    """Whether the innermost frame of an error is one of `frames`, at `raise` or `assert`, or calls `torch._assert`."""
    steps: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        steps, step = [*steps, step], step.tb_next
    last = steps[-1]
    if dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] != "RAISE_VARARGS":
        return False
    if last.tb_frame.f_code in _checks():
        steps = [each for each in steps if not each.tb_frame.f_code.co_filename.startswith(_not_the_users())]
    return bool(steps) and any(steps[-1].tb_frame is frame for frame in frames)


@functools.cache
def _checks() -> frozenset[CodeType]:
    """The code of functions that only raise if their argument is false."""
    import torch

    return frozenset(each.__code__ for each in (torch._assert, torch._check, torch._check_value, torch._check_with))


def watching(inputs: Sequence[torch.Tensor], given: Given = NOTHING) -> Any:
    """A mode that tracks values that depend on `inputs` through every function of torch.

    The first reads at a site that is in `given` return those values, without a call.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as pytree
    from torch.utils.weak import WeakIdKeyDictionary

    dependent: Any = WeakIdKeyDictionary()

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))

    def origins(value: Any) -> frozenset[int]:
        """The inputs, by index, that it depends on."""
        return frozenset().union(*(dependent.get(tensor, ()) for tensor in tensors(value)))

    def mark(value: Any, inputs: frozenset[int]) -> None:
        for tensor in tensors(value):
            dependent[tensor] = inputs

    class Watch(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.path = 0
            self.found: dict[str, list[Any]] = {}
            self.counts: set[tuple[str, int]] = set()
            self.guards = False
            self.ties = False
            self.folded: set[int] = set()
            self.reading: tuple[FrameType, ...] = ()
            self.decided = False

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.compiler.is_dynamo_compiling():  # as in torch.cond: what is compiled is code, and is looked at too
                return function(*args, **(kwargs or {}))
            name, frames = getattr(function, "__name__", ""), _frames()
            site = _at(frames[-1])
            self.path = hash((self.path, name, site, _position(frames[-1])))
            depends = origins((args, kwargs))
            if depends and name in _READERS:
                there = self.found.setdefault(site, [])
                if name != "__repr__":  # which the message of a failed assertion may use, from anywhere
                    self.reading = frames
                known = given.get(site, ())
                if len(there) < len(known):
                    there.append(known[len(there)])
                    self.decided = False
                    return None if function is torch._assert else there[-1]
            answer = function(*args, **(kwargs or {}))
            self.decided |= isinstance(answer, bool)
            if depends:
                if name in _READERS:
                    there.append(copy.copy(answer))  # an array looks into a tensor that may change
                elif name in _SIZED_BY_DATA:
                    sizes = [tuple(tensor.shape) for tensor in tensors(answer)]
                    self.found.setdefault(site, []).append(Followed(sizes))
                elif name in _SHARED:
                    self.found.setdefault(site, []).append(Followed(args[0].detach().cpu().numpy().tobytes().hex()))
                elif name == "cond" and args[0] in dependent:
                    self.found.setdefault(site, []).append(Followed(bool(args[0])))
                self.guards |= name in _GUARDS
                self.ties |= name in _CHOOSERS
                if _is_sized_by_data(name, args):
                    self.counts |= {(site, min(2, *tensor.shape[:1])) for tensor in tensors(answer) if tensor.dim()}
                if name in _FOLDS:
                    self.folded |= origins([each for each in tensors(args) if each.dtype == torch.int64])
                mark(answer, depends)
                if name.endswith("_") or name == "__setitem__":  # in place
                    mark(args[0], depends)
            return answer

    for index, tensor in enumerate(inputs):
        mark(tensor, frozenset({index}))
    return Watch()


def _is_sized_by_data(name: str, args: Sequence[Any]) -> bool:
    """Whether a function's result has a size that depends on values, as has a selection by a mask."""
    import torch

    if name != "__getitem__":
        return name in _SIZED_BY_DATA or (name == "where" and len(args) == 1)
    index = args[1] if isinstance(args[1], tuple) else args[1:]
    return any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index)


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, np.ndarray) else value)


def caller_site() -> str:
    """The site of the innermost caller outside of torch and polyexport."""
    return _at(_frames()[-1])


def _at(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _position(frame: FrameType) -> Any:
    """Where the expression that a frame is at begins and ends: two sides of a branch may be in one line."""
    # not `f_lasti` itself: the interpreter specializes instructions after some runs, which moves it a little
    return _positions(frame.f_code)[frame.f_lasti // 2]


@functools.lru_cache(4096)
def _positions(code: CodeType) -> tuple[Any, ...]:
    return tuple(code.co_positions())


def _frames() -> tuple[FrameType, ...]:
    """The frames from the caller to the innermost one outside of torch and polyexport."""
    passed, frames = _not_the_users(), [sys._getframe(1)]
    while (outer := frames[-1].f_back) and frames[-1].f_code.co_filename.startswith(passed):
        frames.append(outer)
    return tuple(frames)


def site_of(error: BaseException) -> str:
    """The innermost site in an error's traceback; empty if there is none."""
    frames = traceback.walk_tb(error.__traceback__)
    return _innermost([f"{frame.f_code.co_filename}:{line}" for frame, line in frames])


def site_in(stack: str) -> str:
    """The innermost site in the text of a stack; empty if there is none."""
    return _innermost([f"{file}:{line}" for file, line in re.findall(r'File "(.+?)", line (\d+)', stack)])


def _innermost(sites: Sequence[str]) -> str:
    passed = _not_the_users()
    return next((site for site in reversed(sites) if not site.startswith(passed)), "")


@functools.cache
def _not_the_users() -> tuple[str, ...]:
    """Path prefixes of the files of torch, its dependencies, the standard library and polyexport."""
    packages = (os.path.dirname(str(find.origin)) for find in map(find_spec, ("torch", "sympy")) if find)
    return (*packages, os.path.dirname(os.path.dirname(__file__)), warnings.__file__, contextlib.__file__)


@contextlib.contextmanager
def frozen_sites() -> Iterator[set[str]]:
    """Collect the sites at which `torch.jit` records a value as a constant, with a warning, or see `note_frozen`."""
    found: set[str] = set()

    def show(message: Any, *rest: Any, **more: Any) -> None:
        if str(message).startswith(_WARNING):
            found.add(caller_site())
        shown(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_WARNING)
        shown, warnings.showwarning = warnings.showwarning, show
        _collecting.append(found)
        try:
            yield found
        finally:
            _collecting.pop()


_collecting: list[set[str]] = []


def note_frozen(function: Any) -> None:
    """Add the caller's site to those of `frozen_sites`, if a tracer freezes without a warning what `function` reads."""
    import torch

    if _collecting and getattr(function, "__name__", "") in _UNWARNED and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
        _collecting[-1].add(caller_site())


def named(sites: set[str]) -> str:
    """Sites for messages: file names without folders, in order."""
    return ", ".join(sorted(os.path.basename(site) for site in sites))
