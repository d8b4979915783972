"""What forward answered on the first batch of the latest validation, which a worker compares with what it rebuilds.

A hook for all modules (`register_module_forward_hook`) sees it: one on the module itself would be seen by whoever
pickles or copies that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyexport.capture.answer import Answer, answer


class Recorder:
    """Takes a copy of the first call of `module` and of its answer, until `remove`; nothing here raises in user code.

    Attributes:
        answer: None as long as the module was not called, and where the call cannot be copied.
    """

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        self.answer: Answer | None = None
        self._module, self._root, self._seen = module, root, False
        self._handle = nn.modules.module.register_module_forward_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        if module is not self._module or self._seen:
            return
        self._seen = True
        try:
            with torch.no_grad():
                self.answer = answer(self._root, args, kwargs, returned)
        except Exception:  # whatever the user's values say to a copy: then there is nothing to compare with
            self.answer = None

    def remove(self) -> None:
        """Look no longer."""
        self._handle.remove()
