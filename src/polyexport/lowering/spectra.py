"""Constants of signal operators, computed by numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyexport.lowering.windows import spans

LARGEST_TABLE = 1 << 22
"""The largest matrix in elements; a larger Fourier transform is left to the framework's own."""


def fourier_table(have: int, points: int, wanted: int, *, parts: int, inverse: bool = False) -> np.ndarray | None:
    """What `have` entries of `parts` parts (real, imaginary) are multiplied with, as a matrix, for their transform.

    Shape `(have * parts, wanted * 2)`: `wanted` frequencies of a transform of `points`, each real and imaginary; None
    where that is too large.
    """
    if have * parts * wanted * 2 > LARGEST_TABLE:
        return None
    angle = 2 * np.pi * (np.outer(np.arange(have), np.arange(wanted)) % points) / points
    cos, sin = np.cos(angle), np.sin(angle) * (-1 if inverse else 1)
    table = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], 1)[:, :parts]
    return table.reshape(have * parts, wanted * 2) / (points if inverse else 1)


def block_positions(
    sizes: Sequence[int],
    kernel: Sequence[int],
    dilations: Sequence[int] | None,
    pads: Sequence[int],
    strides: Sequence[int] | None,
) -> tuple[np.ndarray, list[int]]:
    """The flat index in the padded image of each block's entries, `(*kernel, *blocks)`; and that image's sizes."""
    count = len(kernel)
    dilations, strides = dilations or [1] * count, strides or [1] * count
    wide = [size + pads[i] + pads[i + count] for i, size in enumerate(sizes)]
    whole = np.arange(np.prod(wide)).reshape(wide)
    windows = np.lib.stride_tricks.sliding_window_view(whole, spans(kernel, dilations))  # (*starts, *window)
    blocks = windows[tuple(slice(None, None, step) for step in (*strides, *dilations))]
    return blocks.transpose([*range(count, 2 * count), *range(count)]), wide
