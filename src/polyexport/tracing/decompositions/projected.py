"""`torch.lstm` with a projection of its hidden state (`proj_size`), which ONNX lacks, by layers without one.

Where m is the output before the projection, h = W_hr m, and so W_hh h = (W_hh W_hr) m. The first hidden state is a part
of the input instead, at the first step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def lstm(
    x: torch.Tensor,
    states: Any,
    weights: Any,
    has_biases: Any,
    count: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """`torch.lstm`, each layer and direction by itself if it has a projection; dropout is for training only."""
    import torch

    ways = 2 if bidirectional else 1
    # of a sequence that was packed before the trace, the second argument is a tensor, and others follow
    each = 0 if isinstance(states, torch.Tensor) else len(weights) // (count * ways)
    if each % 2 == 0:  # matrices and biases, without a projection
        return torch.lstm(x, states, weights, has_biases, count, dropout, train, bidirectional, batch_first)
    rows = x.transpose(0, 1) if batch_first else x
    hidden, cells = [], []
    for depth in range(count):
        outputs = []
        for way in range(ways):
            at = depth * ways + way
            start = [state[at : at + 1] for state in states]
            y, cell = _one(rows.flip(0) if way else rows, start, weights[at * each :][:each])
            hidden.append(y[-1:])
            cells.append(cell)
            outputs.append(y.flip(0) if way else y)
        rows = torch.cat(outputs, -1)
    return rows.transpose(0, 1) if batch_first else rows, torch.cat(hidden), torch.cat(cells)


def _one(
    x: torch.Tensor, start: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (T, B, P) and the last cell state (1, B, H) of one layer."""
    import torch

    (hidden, cell), (of_input, of_hidden, *biases, projection) = start, weights
    first = (torch.arange(x.shape[0]) == 0).to(x.dtype)[:, None, None]
    plain = [torch.cat([of_input, of_hidden], 1), of_hidden @ projection, *biases]
    states = (torch.zeros_like(cell), cell)
    y, _, last = torch.lstm(
        torch.cat([x, first * hidden], -1), states, plain, bool(biases), 1, 0.0, False, False, False
    )
    return y @ projection.t(), last
