"""What forward answered on the first batch of the latest validation, which a worker compares with what it rebuilds.

A hook for all modules (`register_module_forward_hook`) sees it: one on the module itself would be seen by whoever
pickles or copies that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyexport.capture.answer import Answer, answer


def why_unrecorded(*, sharded: bool, compiled: bool) -> str:
    """Why nothing is recorded of a module; empty where it is."""
    if compiled:
        why = "forward is compiled (torch.compile), and compiled code calls no hook that could record it"
    elif sharded:
        why = "each process has a part of the weights only"
    else:
        return ""
    return f"not compared with the training process's own answer: {why}"


class Recorder:
    """Takes a copy of the first call of `module` and of its answer, until `remove`; nothing here raises in user code.

    A strategy that wraps the module, as DDP does, calls it with the arguments of `validation_step`, and its forward is
    Lightning's own meanwhile: that is no call of forward.

    Attributes:
        answer: None as long as the module was not called, and where the call cannot be copied.
    """

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self.answer: Answer | None = None
        self._module, self._root, self._begun, self._seen = module, root, 0, False
        begin = nn.modules.module.register_module_forward_pre_hook(self._begin)
        self._handles = (begin, nn.modules.module.register_module_forward_hook(self._look, with_kwargs=True))

    def _begin(self, module: nn.Module, args: Any) -> None:
        if module is self._module:
            self._begun += getattr(module.forward, "__name__", "") != _REDIRECTED

    def _look(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        if module is not self._module or self._seen or not self._begun:
            return
        self._seen = True
        try:
            with torch.no_grad():
                self.answer = answer(self._root, args, kwargs, returned)
        except Exception:  # whatever the user's values say to a copy: then there is nothing to compare with
            self.answer = None

    def remove(self) -> None:
        """Look no longer."""
        for handle in self._handles:
            handle.remove()


_REDIRECTED = "wrapped_forward"
"""What Lightning puts in the place of forward while a strategy's wrapper calls the module."""
