"""Runs an artifact on every recorded batch, and compares it with PyTorch's outputs; used by workers and by kits."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyexport.errors import CannotRun, line
from polyexport.measure.parity import Parity, compare, merge
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Batch, ExportSpec, Runner, read_arrays


def verified(
    run: Runner,
    folder: Path,
    batches: Sequence[Batch],
    spec: ExportSpec,
    limits: Tolerance,
    noise: str,
    others: Mapping[str, Callable[[], Runner]],
) -> tuple[Parity, str, str]:
    """Compare the outputs of `run` with the batches in `folder`, the validation batch first.

    `noise` is the file with the noise floor of each element of the validation batch, empty where it is unknown.
    `others` are the artifact's other runtimes (see `Loaded`).

    Returns:
        The result; if the artifact disagrees only on batches of other values, on which and how, else empty; and if it
        agrees, which of its other runtimes disagree or refuse it, and how.

    Raises:
        CannotRun: PyTorch's outputs are all NaN or infinite, so nothing can be verified.
    """

    def compared(run: Runner) -> tuple[Parity, str]:
        return _verified(run, folder, batches, spec, limits, noise)

    parity, elsewhere = compared(run)
    lost = [] if parity.reason or elsewhere else [_refuted(name, opens, compared) for name, opens in others.items()]
    return parity, elsewhere, "; ".join(filter(None, lost))


def _refuted(name: str, opens: Callable[[], Runner], compared: Callable[[Runner], tuple[Parity, str]]) -> str:
    """How a runtime disagrees with PyTorch or refuses an artifact; empty if it agrees."""
    try:
        parity, elsewhere = compared(opens())
    except Exception as error:  # a runtime may refuse an artifact with any exception
        traceback.print_exc()
        return f"{name} refuses it: {line(error, 500)}"
    wrong = parity.reason or elsewhere
    return f"{name} disagrees with PyTorch: {wrong}" if wrong else ""


def _verified(
    run: Runner, folder: Path, batches: Sequence[Batch], spec: ExportSpec, limits: Tolerance, noise: str
) -> tuple[Parity, str]:
    floors = read_arrays(folder / noise) if noise else {}
    whole = read_arrays(folder / batches[0].path, spec.output_names)

    def compared(batch: Batch) -> Parity:
        inputs = read_arrays(folder / batch.path, spec.input_names)
        there = read_arrays(folder / batch.path)  # not every output says something at other values
        reference = {name: there[name] for name in whole if name in there}
        if not any(_says_something(array) for array in reference.values()):
            raise CannotRun("PyTorch itself returns only NaN or infinity, which proves nothing")
        answer = {name: array for name, array in run(inputs).items() if name in reference or name not in whole}
        return compare(answer, reference, limits, floors, None if batch is batches[0] else whole)

    sized = [batch for batch in batches if not batch.label]
    parity = merge([compared(batch) for batch in sized], [batch.sizes for batch in sized])
    others = [batch for batch in batches if batch.label and parity.passed]
    elsewhere = next(filter(None, (_apart(compared, batch) for batch in others)), "")
    sizes = tuple(dict(pairs) for pairs in dict.fromkeys(tuple(batch.sizes.items()) for batch in batches))
    return replace(parity, batches=sizes), elsewhere


def _apart(compared: Callable[[Batch], Parity], batch: Batch) -> str:
    """How an artifact disagrees with PyTorch on a batch of other values; empty if it agrees."""
    try:
        why = compared(batch).reason
    except Exception as error:  # a runtime may refuse sizes with any exception
        traceback.print_exc()
        why = line(error, 500)
    where = ", ".join([batch.label, *(f"{name}={size}" for name, size in batch.sizes.items())])
    return f"on {where}: {why}" if why else ""


def _says_something(array: np.ndarray) -> bool:
    return not np.issubdtype(array.dtype, np.inexact) or not array.size or bool(np.isfinite(array).any())


def fingerprint(folder: Path, without: str) -> tuple[int, str]:
    """Size in bytes and SHA-256 of all files of a folder, names included, except the file named `without`."""
    digest, count = hashlib.sha256(), 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / without):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(bytes.fromhex(sha256(file)))
        count += file.stat().st_size
    return count, digest.hexdigest()


def sha256(file: Path) -> str:
    """SHA-256 of a file; `hashlib.file_digest` is not in Python 3.10, which some devices have."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
