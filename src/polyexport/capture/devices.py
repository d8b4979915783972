"""A module that trained on an accelerator is rebuilt on the CPU, even if its code names a device.

Requirements:
* Devices in attributes, generators and streams become the CPU when a module is pickled.
* Devices in forward, as in `x.cuda()` or `torch.zeros(3, device="cuda")`, are replaced by the CPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

_ACCELERATOR = re.compile(r"(cuda|xpu|mps|hpu|npu|xla|mtia|ipu)(:\d+)?")
_MOVES = frozenset({"cuda", "xpu", "mps", "hpu", "npu", "ipu"})
"""Methods of a tensor that are named after the device that they move it to."""


def reduced(item: Any) -> Any:
    """How to pickle an object of a device, as `__reduce__` returns it; NotImplemented for all others."""
    import torch

    if isinstance(item, torch.device):
        return torch.device, ("cpu",)
    if isinstance(item, torch.Generator) and item.device.type != "cpu":
        return torch.Generator, ()
    return (type(None), ()) if isinstance(item, torch.Stream | torch.Event) else NotImplemented


@contextlib.contextmanager
def on_the_cpu_by_default() -> Iterator[None]:
    """New tensors are on the CPU within it, and after it too, though a module that is imported there sets a default.

    `with torch.device("cpu")` would leave that default in place of itself.
    """
    import torch

    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


class OnTheCpu:
    """A context in which PyTorch's functions use the CPU in place of any accelerator.

    It checks every function call, so it disables itself after the first use in which it was not needed.
    """

    def __init__(self) -> None:
        self._idle = self._needed = False
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        if not self._idle:
            self._entered.enter_context(self._mode())

    def __exit__(self, *error: object) -> None:
        self._entered.close()
        self._idle = not self._needed

    def __deepcopy__(self, memo: Any) -> OnTheCpu:
        return OnTheCpu()

    def _mode(self) -> Any:
        import torch
        from torch.overrides import TorchFunctionMode

        owner = self

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                given, name = dict(kwargs or {}), getattr(function, "__name__", "")
                if name in _MOVES and args and isinstance(args[0], torch.Tensor):
                    owner._needed = True
                    return args[0]
                here = [
                    "cpu" if _is_accelerator(value, by_number=name == "to" and index == 1) else value
                    for index, value in enumerate(args)
                ]
                if _is_accelerator(given.get("device"), by_number=True):
                    given["device"] = "cpu"
                    owner._needed = True
                owner._needed |= any(new is not old for new, old in zip(here, args, strict=True))
                return function(*here, **given)

        return Mode()


def _is_accelerator(value: Any, *, by_number: bool) -> bool:
    import torch

    if isinstance(value, str):
        return _ACCELERATOR.fullmatch(value) is not None
    if isinstance(value, torch.device):
        return value.type not in ("cpu", "meta")
    return by_number and type(value) is int
