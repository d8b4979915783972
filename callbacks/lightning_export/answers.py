"""Records what forward returned on the first batch of each validation, for a worker to compare its rebuilt module with.

It is recorded by a global hook (`register_module_forward_hook`), since a hook on the module itself would be pickled and
copied with it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_export.trainer import KEPT_BY_LIGHTNING
from lightning_export.watch import before_hooks, is_redirected
from polyexport.capture.answer import Answer, answer
from polyexport.capture.changes import beside_weights
from polyexport.errors import WarningsAllowed, add_filters, remove_filters


def why_unrecorded(*, sharded: bool, compiled: bool, overridden: bool) -> str:
    """Why the outputs of a module cannot be recorded; empty if they can."""
    if compiled:
        why = "forward is compiled (torch.compile), and compiled code calls no hooks that could record its output"
    elif sharded:
        why = "each process has only a shard of the weights"
    elif overridden:
        why = "`__call__` is overridden, which hooks of forward cannot see"
    else:
        return ""
    return f"not compared with the outputs in training: {why}"


class Recorder:
    """Copies the arguments and outputs of the first call of `module`, until `remove`; never raises in user code.

    A strategy that wraps the module, as DDP does, calls it with the arguments of `validation_step`, while Lightning has
    replaced its forward: such a call is ignored.

    Attributes:
        answer: None until the module is called, and if the call cannot be copied.
    """

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self.answer: Answer | None = None
        self._module, self._root, self._begun, self._seen = module, root, 0, False
        self._filter = ("ignore", _ADVICE, UserWarning, None, 0)
        add_filters(self._filter)
        begin = nn.modules.module.register_module_forward_pre_hook(self._begin)
        self._handles = [begin, nn.modules.module.register_module_forward_hook(self._look, with_kwargs=True)]

    def _begin(self, module: nn.Module, args: Any) -> None:
        if module is self._module and not is_redirected(module):
            self._begun += 1
            # the module's own hooks come after global ones, and may change what it returns
            if module._forward_hooks and self._begun == 1:
                self._handles.append(module.register_forward_hook(self._record, with_kwargs=True))

    def _look(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        if module is self._module and self._begun and not module._forward_hooks:
            self._record(module, args, kwargs, returned)

    def _record(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        if self._seen:
            return
        self._seen = True
        try:
            args, kwargs = before_hooks(module, (args, kwargs))
            with torch.no_grad(), WarningsAllowed():
                recorded = answer(self._root, args, kwargs, returned)
            self.answer = replace(recorded, beside=beside_weights(self._root, KEPT_BY_LIGHTNING))
        except Exception:  # the user's values may refuse to be copied: then there is nothing to compare with
            self.answer = None

    def remove(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
            nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)  # `remove` forgets it there
        remove_filters(self._filter)


_ADVICE = re.compile(re.escape("Using `torch.compile(module)` when there are global hooks"))
"""What PyTorch tells the user about global hooks, which are ours, at each call of a compiled part of the module."""
