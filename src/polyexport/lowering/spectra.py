"""Constants of signal operators, computed by numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def mel_triangles(count: int, points: int, rate: int, low: float, high: float) -> np.ndarray:
    """Triangles on the mel scale, `(points // 2 + 1, count)`, for a transform of `points` at a sampling rate in Hz."""
    # ONNX leaves the last edge out: it divides the range by the number of edges
    start, end = (2595 * np.log10(1 + edge / 700) for edge in (low, high))
    mels = start + np.arange(count + 2) * (end - start) / (count + 2)
    edges = ((points + 1) * (700 * (10 ** (mels / 2595) - 1)) // rate).astype(np.int64)
    found = np.zeros((points // 2 + 1, count), np.float64)
    for i in range(count):
        first, peak, final = edges[i : i + 3]
        found[peak, i] = 1
        for j in range(first, peak):
            found[j, i] = (j - first) / (peak - first)
        for j in range(peak, final):
            found[j, i] = (final - j) / (final - peak)
    return found


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
    steps = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(wide, kernel, dilations, strides, strict=True)]
    positions = np.zeros((*kernel, *steps), np.int64)
    for i in range(count):
        line = np.arange(kernel[i]).reshape([-1] + [1] * (count - i - 1) + [1] * count) * dilations[i]
        line = line + np.arange(steps[i]).reshape([-1] + [1] * (count - i - 1)) * strides[i]
        positions = positions * wide[i] + line
    return positions, wide
