"""Options of model libraries for exports, set while a model is traced.

https://huggingface.co/docs/transformers: a module's `config` selects one of several equivalent implementations, some of
which exporters do not support. The reference is computed without these options, so that parity judges their effect.
timm's `set_exportable` must be set before a model is built, so it cannot be used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.draws import draws_given
from polyexport.tracing.forward import uncompiled
from polyexport.tracing.idle_reads import idle_reads_given
from polyexport.tracing.nans import nans_kept
from polyexport.tracing.sizes import sizes_followed

if TYPE_CHECKING:
    from torch import nn

_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], Any]] = {
    # only PyTorch has the operator `grouped_mm`; loops over the chosen experts depend on data
    "_experts_implementation": (lambda now: now is not None, "batched_mm"),
    # overlapping chunks by `unfold` in place of `as_strided`
    "onnx_export": (lambda now: now is False, True),
}
"""Changes to a `config`: attribute, present value, new value."""


def _now(config: Any, name: str) -> Any:
    """The value of a config's attribute; a user's own config may raise anything."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


@contextlib.contextmanager
def exportable(model: nn.Module, *, dynamic: bool) -> Iterator[nn.Module]:
    """The model as exporters need it: options set, sizes traced, nothing compiled or sparse, no checks of data.

    Random numbers from a seed are constants; `dynamic` says whether the trace has dynamic axes, for which some are
    wrong. Everything is restored when the context exits.
    """
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name, (is_changed, _) in _SETTINGS.items()
        if is_changed(_now(config, name))
    ]
    for config, name, _ in before:
        setattr(config, name, _SETTINGS[name][1])
    try:
        with (
            uncompiled(),
            sizes_followed(model),
            _distributions_unchecked(),
            idle_reads_given(model),
            draws_given(model, dynamic=dynamic),
            nans_kept(model),
            _dense(model),
        ):
            yield model
    finally:
        for config, name, value in reversed(before):
            setattr(config, name, value)


_MOST_ELEMENTS = 2**26
"""A sparse tensor of more elements stays sparse."""


@contextlib.contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """Make sparse buffers and attributes dense, which products with a sparse matrix take too; no format has others."""
    import torch

    def is_sparse(value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.layout is not torch.strided
            and not value.is_nested
            and value.numel() <= _MOST_ELEMENTS
        )

    before = [
        (part, name, value)
        for part in model.modules()
        for name, value in (*part.named_buffers(recurse=False), *vars(part).items())
        if is_sparse(value)
    ]
    for part, name, value in before:
        setattr(part, name, value.to_dense())
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@contextlib.contextmanager
def _distributions_unchecked() -> Iterator[None]:
    """Disable the checks of `torch.distributions` parameters, which `torch.export` does not support."""
    from torch.distributions import Distribution

    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
