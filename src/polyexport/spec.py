"""What every converter and every runtime must agree on: names, dtypes and shapes of inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args
from zipfile import ZipFile

import numpy as np

S = TypeVar("S")

Arrays = dict[str, np.ndarray]
"""Named arrays: the inputs or outputs of a model."""

Runner = Callable[[Arrays], Arrays]
"""Runs a model: named arrays in, named arrays out. The only interface to a runtime."""

Precision = Literal["float32", "float16", "bfloat16", "int8", "w8", "w4"]
"""The precision that an artifact computes in, by its name in numpy and PyTorch.

`w8` and `w4` have only the weights in 8 and 4 bits; activations are float, or quantized at run time.
"""

LABELS = "labels.txt"
"""File of the labels, one per line, inside an artifact and next to it."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

LOW: tuple[Precision, ...] = ("int8", "w8", "w4")
"""Precisions in which single elements may be far off although the model is as good."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    `shape` holds an `int` for a fixed axis and a name for a dynamic one: `("batch", 3, 224, 224)`.
    `dtype` is numpy's name: `"float32"`, `"int64"`, `"bool"`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dynamic(self) -> dict[int, str]:
        """The dynamic axes: `{0: "batch"}`."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def sized(self, size_of: Callable[[str], S]) -> tuple[int | S, ...]:
        """The shape with `size_of(name)` for each dynamic axis."""
        return tuple(size_of(size) if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """The signature of the exported model, and what else is to be written into the artifact.

    `sizes` is the size of each named axis in the validation batch. `metadata` is embedded if the format has a place for
    it, and so are `labels`, the names of an output's classes in order, which are also stored next to the artifact.
    `calibration` names `.npz` files with real inputs for formats that need calibration (see the function of that name).
    `has_trained_scales` is whether the model was trained with fake quantization. `in_float` is the share of its layers,
    the costliest first, that a quantizer keeps in float; 0 where it decides by the outputs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    calibration: tuple[Path, ...] = ()
    labels: tuple[str, ...] = ()
    has_trained_scales: bool = False
    in_float: float = 0.0

    @property
    def embedded(self) -> dict[str, str]:
        """Metadata as a mapping of strings, with the labels as a JSON list."""
        return {**self.metadata, **({"labels": json.dumps(self.labels, ensure_ascii=False)} if self.labels else {})}

    @property
    def extra_files(self) -> dict[str, str]:
        """Metadata as files by name: a JSON file, and the labels, one per line."""
        files = {"polyexport.json": json.dumps(dict(self.metadata))}
        return files | ({LABELS: self.label_lines} if self.labels else {})

    @property
    def label_lines(self) -> str:
        """The labels, one per line."""
        return "".join(f"{label}\n" for label in self.labels)

    @property
    def is_dynamic(self) -> bool:
        """Whether any input axis is dynamic."""
        return any(tensor.dynamic for tensor in self.inputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in forward's order."""
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order that forward returns them."""
        return tuple(tensor.name for tensor in self.outputs)

    def upper_bounds(self, least: int) -> dict[str, int]:
        """A maximum size for each dynamic axis, where a converter needs it: `least`, or twice the batch's if larger."""
        return {name: max(least, 2 * size) for name, size in self.sizes.items()}

    def one_row(self) -> ExportSpec:
        """The static signature with each dynamic leading axis of an input at 1, others as in the validation batch."""
        leading = {tensor.dynamic[0] for tensor in self.inputs if 0 in tensor.dynamic}
        return replace(self, sizes={**self.sizes, **dict.fromkeys(leading, 1)}).static()

    def static(self) -> ExportSpec:
        """The same signature with every dynamic axis fixed at its size in the validation batch."""

        def fix(tensor: TensorSpec) -> TensorSpec:
            return replace(tensor, shape=tensor.sized(self.sizes.__getitem__))

        return replace(self, inputs=tuple(map(fix, self.inputs)), outputs=tuple(map(fix, self.outputs)))


@dataclass(frozen=True, slots=True)
class Batch:
    """A file of named arrays, inputs and reference outputs together, and the sizes of its dynamic axes.

    Attributes:
        path: Relative to the export's folder.
        sizes: Size of each dynamic axis.
        label: What its values are, if they are not those of the validation batch: `rows negated`.
        real: Whether the values are original data, and not derived from it.
    """

    path: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    label: str = ""
    real: bool = True


def calibration(spec: ExportSpec) -> Iterator[Arrays]:
    """The inputs of `spec.calibration`, one batch after another, in the shapes of `spec`.

    If the first axis is static and shorter than a batch, the batch is split; what is too short is repeated.
    """
    for path in spec.calibration:
        with np.load(path) as arrays:
            batch = {tensor.name: arrays[tensor.name] for tensor in spec.inputs}
        fixed = {tensor.name: tensor.shape[0] for tensor in spec.inputs if tensor.shape}
        pieces = max((-(-len(batch[name]) // rows) for name, rows in fixed.items() if isinstance(rows, int)), default=1)
        for piece in range(pieces):
            yield {tensor.name: _fitted(batch[tensor.name], tensor.shape, piece) for tensor in spec.inputs}


def example(spec: ExportSpec) -> Arrays:
    """Inputs to trace with: the validation batch, with two rows or more, since tracers make an axis of size 1 static.

    Without a batch they are zeros.
    """
    sizes = {called: max(2, size) for called, size in spec.sizes.items()}
    batch = next(calibration(spec), None) or {own.name: np.zeros((), own.dtype) for own in spec.inputs}
    return {own.name: _repeated(batch[own.name], own.sized(sizes.__getitem__)) for own in spec.inputs}


def repeated(array: np.ndarray, axis: int, size: int, start: int = 0) -> np.ndarray:
    """`array` with that many rows along an axis, its own in turn; where it has none, zeros."""
    if not array.shape[axis]:
        return np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
    found: np.ndarray = np.take(array, (start + np.arange(size)) % array.shape[axis], axis)
    return found


def _repeated(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`array` in that shape, repeated along an axis that is too short."""
    for axis, size in enumerate(shape[: array.ndim]):
        array = repeated(array, axis, size)
    return np.array(np.broadcast_to(array, shape))


def _fitted(array: np.ndarray, shape: tuple[int | str, ...], piece: int) -> np.ndarray:
    for axis, size in enumerate(shape):
        if isinstance(size, int) and array.shape[axis] != size:
            array = repeated(array, axis, size, 0 if axis else piece * size)
    return array


def in_rows(run: Runner, spec: ExportSpec) -> Runner:
    """A runner for any number of rows, made from one that takes only as many rows as `spec` has.

    An input without axes, or with fewer rows than that, is passed whole each time.
    """
    rows = {tensor.name: int(tensor.shape[0]) for tensor in spec.inputs if tensor.shape}

    def call(inputs: Arrays) -> Arrays:
        count = max((len(inputs[name]) // size for name, size in rows.items()), default=1)

        def piece(name: str, index: int) -> np.ndarray:
            size, array = rows.get(name, 0), inputs[name]
            return array[index * size : (index + 1) * size] if size and len(array) == count * size else array

        answers = [run({name: piece(name, index) for name in inputs}) for index in range(count)]
        last = answers[-1]
        return {
            name: np.concatenate([each[name] for each in answers]) if last[name].ndim else last[name] for name in last
        }

    return call


ONE_ROW = "one row per call"
"""The remark on an artifact without a batch axis; when loaded, it takes any number of rows by `in_rows`."""


def row_remark(spec: ExportSpec) -> str:
    """`ONE_ROW`, unless the signature itself has only one row."""
    return ONE_ROW if spec.one_row() != spec else ""


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an `.npz`; unlike `numpy.savez` it takes any name, even `file`."""
    with ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)  # type: ignore[no-untyped-call]  # numpy.lib is untyped


def read_arrays(path: Path, names: Iterable[str] | None = None) -> Arrays:
    """Read arrays of an `.npz`, by default all.

    Raises:
        KeyError: one of them is not in it.
    """
    with np.load(path) as arrays:
        return {name: arrays[name] for name in (arrays.files if names is None else names)}
