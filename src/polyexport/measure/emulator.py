"""A further processor that an artifact is for, which an emulator has: a few rows are verified there too."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polyexport.errors import CannotRun, line
from polyexport.measure.dynamic_axes import first_rows
from polyexport.measure.parity import compare
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays, Batch, ExportSpec, read_arrays

_ROWS = 2


@dataclass(frozen=True, slots=True)
class Emulated:
    """What an emulated processor made of an artifact.

    Attributes:
        outputs: Its outputs.
        took: What the artifact takes there, such as memory, and by which tools that is known, in a line.
    """

    outputs: Arrays
    took: str


@dataclass(frozen=True, slots=True)
class Emulator:
    """A further processor that an artifact is for; verification runs a few rows on it.

    Attributes:
        processor: What is emulated, and by what: `Cortex-M4 in QEMU`.
        run: Runs the artifact on inputs under PyTorch's names. It raises `CannotRun` if that is too large for this
            processor or its emulator, or a program is missing, and anything else if the artifact is wrong there.
    """

    processor: str
    run: Callable[[Arrays], Emulated]


def tried(
    emulator: Emulator, folder: Path, batch: Batch, spec: ExportSpec, limits: Tolerance, noise: str
) -> tuple[str, str]:
    """Compare the first rows of the validation batch on a further processor.

    Returns:
        How the artifact disagrees there, empty if it agrees or could not be tried; and what else is known, in a line.
    """
    inputs = read_arrays(folder / batch.path, spec.input_names)
    few = first_rows(inputs, spec, _ROWS) or inputs
    try:
        found = emulator.run(few)
    except CannotRun as error:
        return "", f"not run on a {emulator.processor}: {error}"
    except Exception as error:  # the artifact may do anything there
        traceback.print_exc()
        return f"on a {emulator.processor}: {line(error, 500)}", ""
    whole = read_arrays(folder / batch.path, spec.output_names)
    reference = {name: array[: len(found.outputs[name])] if array.ndim else array for name, array in whole.items()}
    floors = read_arrays(folder / noise) if noise else {}
    parity = compare(found.outputs, reference, limits, floors, whole)
    if not parity.passed:
        return f"on a {emulator.processor}: {parity.reason}", ""
    rows = max((len(array) for array in few.values() if array.ndim), default=1)
    agree = "the first row agrees" if rows == 1 else f"the first {rows} rows agree"
    return "", f"{agree} on a {emulator.processor} too: {found.took}"
