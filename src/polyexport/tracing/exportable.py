"""The switches that model libraries have for an export, set while a model is traced.

https://huggingface.co/docs/transformers: a module's `config` chooses among implementations that compute the same, some
of which no exporter takes. The reference is made without them, so that parity judges what they change. timm's
`set_exportable` is read while a model is built, too early for us.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.forward import uncompiled
from polyexport.tracing.idle_reads import idle_reads_given
from polyexport.tracing.sizes import lengths_followed

if TYPE_CHECKING:
    from torch import nn

_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], Any]] = {
    # `grouped_mm` is an operator that PyTorch alone has; loops over the experts that were chosen ask for data
    "_experts_implementation": (lambda now: now is not None, "batched_mm"),
    # overlapping chunks by `unfold` in place of `as_strided`
    "onnx_export": (lambda now: now is False, True),
}
"""What is changed in a `config`: where which value stands, and the one that takes its place."""


def _now(config: Any, name: str) -> Any:
    """What a config has under a name; one of the user's own may answer in any way."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


@contextlib.contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """The model as exporters take it: its switches set, sizes followed, no checks, nothing read that has no effect.

    All is as before when the block ends.
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
        with uncompiled(), lengths_followed(model), _distributions_unchecked(), idle_reads_given(model):
            yield model
    finally:
        for config, name, value in reversed(before):
            setattr(config, name, value)


@contextlib.contextmanager
def _distributions_unchecked() -> Iterator[None]:
    """Let `torch.distributions` take their parameters without looking at them, which `torch.export` refuses."""
    from torch.distributions import Distribution

    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
