"""Packed sequences as padded ones, which tracers and converters support, and recurrent layers over them.

Here a `torch.nn.utils.rnn.PackedSequence` has the padded sequence as its `data`, (T, B, *), whose values after a
sequence's end are arbitrary. `batch_sizes` has the attribute `rows`, which is B.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions import projected

if TYPE_CHECKING:
    import torch

_SHUT = 100.0
"""The sigmoid of this is exactly 1, and that of its negative almost 0."""


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    import torch

    return {
        torch._VF._pack_padded_sequence: pack,
        torch._VF._pad_packed_sequence: pad,
        torch.Tensor.__getitem__: lambda x, at: x.rows if hasattr(x, "rows") and at == 0 else x[at],
        **{layer: _over_packed(layer) for layer in (torch.gru, torch.rnn_tanh, torch.rnn_relu)},
        torch.lstm: _over_packed(projected.lstm),
    }


@contextlib.contextmanager
def sizes_unchecked() -> Iterator[None]:
    """Disable recurrent layers' check of the states' sizes, which reads a number from `batch_sizes`."""
    from torch.nn.modules import rnn

    before = {layer: layer.check_forward_args for layer in (rnn.RNNBase, rnn.LSTM)}
    for layer in before:
        layer.check_forward_args = lambda *sizes: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, check in before.items():
            layer.check_forward_args = check  # type: ignore[method-assign]


def pack(input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack an input of (T, B, *) with lengths in descending order."""
    import torch

    x = input.transpose(0, 1) if batch_first else input
    sizes = (torch.arange(x.shape[0])[:, None] < lengths).sum(1)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # public, but untyped
        sizes = sizes[: lengths[0]]  # as PyTorch does; `torch.export` does not support sizes that depend on data
    sizes.rows = x.shape[1]  # type: ignore[attr-defined]
    return x, sizes


def pad(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The padded sequence, with `padding_value` after each end, and the lengths."""
    import torch

    if not hasattr(batch_sizes, "rows"):  # forward was given a packed sequence
        return torch._VF._pad_packed_sequence(data, batch_sizes, batch_first, padding_value, total_length)
    lengths, x = _lengths(data, batch_sizes), data[:total_length]
    more = x.new_full((total_length - x.shape[0], *x.shape[1:]), padding_value)
    if not isinstance(more.shape[0], int) or more.shape[0]:
        x = torch.cat([x, more])
    inside = (torch.arange(x.shape[0])[:, None] < lengths).reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    x = x.where(inside, torch.full((), padding_value, dtype=x.dtype))
    return x.transpose(0, 1) if batch_first else x, lengths


def _lengths(data: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    import torch

    return (torch.arange(data.shape[1]) < sizes[:, None]).sum(0)


def _over_packed(layer: Callable[..., Any]) -> Callable[..., Any]:
    def over(data: torch.Tensor, sizes: Any, *rest: Any) -> Any:
        return _layers(layer, data, sizes, *rest) if hasattr(sizes, "rows") else layer(data, sizes, *rest)

    return over


def _layers(
    layer: Callable[..., Any],
    data: torch.Tensor,
    sizes: torch.Tensor,
    states: Any,
    weights: Sequence[torch.Tensor],
    has_biases: bool,
    count: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> Any:
    """Run each layer and direction over padded rows; in reverse each sequence begins at its own end."""
    import torch

    lengths = _lengths(data, sizes)
    time = torch.arange(data.shape[0])[:, None]
    inside = time < lengths
    x = data.where(inside[..., None], torch.zeros((), dtype=data.dtype))  # any values, NaN too, may be after an end
    ways = [None, torch.where(inside, lengths - 1 - time, time)] if bidirectional else [None]
    each = len(weights) // (count * len(ways))
    initial, last = states if isinstance(states, list | tuple) else (states,), []
    for depth in range(count):
        outputs = []
        for way, backwards in enumerate(ways):
            at = depth * len(ways) + way
            own, start = weights[at * each :][:each], [state[at : at + 1] for state in initial]
            y, ends = _one(layer, _in_turn(x, backwards), inside, start, own, has_biases)
            outputs.append(_in_turn(y, backwards))
            last.append([_in_turn(y, (lengths - 1)[None]), *ends])
        x = torch.cat(outputs, -1)
    return x, *map(torch.cat, zip(*last, strict=True))


def _one(
    layer: Callable[..., Any],
    x: torch.Tensor,
    inside: torch.Tensor,
    start: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    has_biases: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of one layer in one direction, and for an LSTM the last cell state (1, B, H)."""
    import torch

    how = (has_biases, 1, 0.0, False, False, False)
    if len(start) == 1:
        return layer(x, start[0], weights, *how)[0], []
    # after the end an extra input closes the input gate and opens the forget gate; it is omitted if unused
    gates = ((-_SHUT, 1), (_SHUT, 1), (0.0, 2))  # in, forget, then cell and out
    size = weights[0].shape[0] // 4
    shut = torch.cat([torch.full((size * count, 1), value, dtype=x.dtype) for value, count in gates])
    kept = layer(
        torch.cat([x, (~inside)[..., None].to(x.dtype)], -1),
        start,
        [torch.cat([weights[0], shut], 1), *weights[1:]],
        *how,
    )
    return layer(x, start, weights, *how)[0], [kept[2]]


def _in_turn(x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
    """The rows of (T, B, H) at the time steps (*, B)."""
    return x if time is None else x.gather(0, time[..., None].expand(-1, -1, x.shape[-1]))
