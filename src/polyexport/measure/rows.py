"""Artifacts that take one row at a time: their signature, and a batch fed to them in rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from polyexport.spec import Arrays, ExportSpec, Runner


def one_row(spec: ExportSpec) -> ExportSpec:
    """With every dynamic leading axis of an input at one, and all other dynamic axes as in the validation batch."""
    leading = {tensor.dynamic[0] for tensor in spec.inputs if 0 in tensor.dynamic}
    return replace(spec, sizes={**spec.sizes, **dict.fromkeys(leading, 1)}).static()


def by_row(run: Runner, one: ExportSpec) -> Runner:
    """A runner of batches of any size, for `run`, which takes inputs of the shapes in `one`."""
    rows = {tensor.name: int(tensor.shape[0]) if tensor.shape else 0 for tensor in one.inputs}

    def piece(name: str, array: np.ndarray, index: int, pieces: int) -> np.ndarray:
        size = rows[name]
        return array[index * size : (index + 1) * size] if size and len(array) == pieces * size else array

    def run_rows(inputs: Arrays) -> Arrays:
        pieces = max(len(array) // rows[name] for name, array in inputs.items() if rows[name])
        answers = [
            run({name: piece(name, array, index, pieces) for name, array in inputs.items()}) for index in range(pieces)
        ]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    return run_rows
