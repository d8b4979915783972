"""The outputs of a module's layers by the layers' names, and which layer reads which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture.flatten import as_runner
from polyexport.spec import Arrays

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Computed:
    """The intermediate results of one call of a module.

    Attributes:
        values: The output of each layer, in the order of computation.
        outputs: The module's outputs.
        reads: The layers that each layer reads directly.
        answers: The layers that each output is computed from directly.
    """

    values: Arrays = field(default_factory=dict)
    outputs: Arrays = field(default_factory=dict)
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)


def computed(model: Any, inputs: Arrays) -> Computed:
    """The outputs of the layers of a flat `model` (see `flat`).

    A layer is a module, or a function that a module with submodules calls between them: `relu behind conv`. Its outputs
    are the float tensors that it returns. A layer that returns the previous layer's output, such as a container or a
    dropout, is left out, and so is the module as a whole.
    """
    record = _Record()
    with record.functions(), _hooks(model, record):
        record.made.outputs.update(as_runner(model)(inputs))
    return record.made


class _Record:
    """Records layers as they are computed, and which layer reads which."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self.made = Computed()
        self.running: list[nn.Module] = []  # the innermost one last
        self._behind: Any = WeakTensorKeyDictionary()  # the layers that a tensor was computed from directly
        self._modules: dict[str, tuple[str, ...]] = {}  # the modules after which a function layer is named
        self._latest = ""

    def behind(self, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """The layers that tensors were computed from directly."""
        return tuple(dict.fromkeys(name for tensor in tensors for name in self._behind.get(tensor, ())))

    def module(self, name: str, returned: Any) -> None:
        """Record what a module returned."""
        tensors = _tensors(returned)
        for index, tensor in enumerate(tensors):
            self._layer(f"{name}[{index}]" if len(tensors) > 1 else name, tensor, is_module=True)

    def functions(self) -> AbstractContextManager[Any]:
        """A context in which PyTorch's functions are recorded, with the layers that their results depend on."""
        from torch.overrides import TorchFunctionMode

        class Functions(TorchFunctionMode):
            def __torch_function__(mode, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                returned = function(*args, **(kwargs or {}))
                self._function(function, self.behind(_tensors((args, kwargs))), _tensors(returned))
                return returned

        return Functions()

    def _function(self, function: Any, behind: tuple[str, ...], returned: Sequence[torch.Tensor]) -> None:
        for tensor in returned:
            self._behind[tensor] = behind
        if len(returned) == 1 and self.running and next(self.running[-1].children(), None) is not None:
            self._layer(f"{function.__name__.strip('_')} behind", returned[0], is_module=False)

    def _layer(self, name: str, tensor: torch.Tensor, *, is_module: bool) -> None:
        if not tensor.is_floating_point() or tensor.numel() < 2:
            return
        made, reads = self.made, self.behind([tensor])
        array = tensor.detach().float().numpy().copy()  # the next layer may change it in place
        if self._is_latest(array):
            if not is_module or self._latest in self._modules[self._latest]:
                return
            reads = made.reads.pop(self._latest)  # the module returns the function's result
            del made.values[self._latest]
        after = dict.fromkeys(module for other in reads for module in self._modules[other])
        called = _unique(name if is_module else f"{name} {', '.join(after) or 'the inputs'}", made.values)
        made.values[called], made.reads[called] = array, reads
        self._behind[tensor], self._modules[called] = (called,), (called,) if is_module else tuple(after)
        self._latest = called

    def _is_latest(self, array: np.ndarray) -> bool:
        latest = self.made.values.get(self._latest)
        return latest is not None and latest.size == array.size and np.array_equal(array.ravel(), latest.ravel())


@contextlib.contextmanager
def _hooks(model: Any, record: _Record) -> Iterator[None]:
    """Record what the modules in a flat `model` return, and what it returns itself."""

    def enter(module: nn.Module, _args: Any) -> None:
        record.running.append(module)

    def leave(name: str, returned: Any) -> None:
        record.running.pop()
        if name == _WHOLE:
            answers = returned if isinstance(returned, tuple) else (returned,)
            found = zip(model.output_names, answers, strict=True)
            record.made.answers.update({called: record.behind([tensor]) for called, tensor in found})
        elif name != _INNER:
            record.module(name.removeprefix(f"{_INNER}."), returned)

    handles = []
    for name, part in model.named_modules():
        handles.append(part.register_forward_pre_hook(enter))
        handles.append(part.register_forward_hook(lambda _module, _args, returned, name=name: leave(name, returned)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_WHOLE, _INNER = "", "inner"
"""Names of a flat model and of the module in it, among its submodules."""


def _tensors(tree: Any) -> list[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _unique(name: str, taken: Arrays) -> str:
    """The name, with a counter if a layer is called again."""
    count = 1 + sum(other == name or other.startswith(f"{name} (call ") for other in taken)
    return name if count == 1 else f"{name} (call {count})"
