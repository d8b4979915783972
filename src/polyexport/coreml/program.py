"""Reads a saved `.mlpackage` as plain records: functions, operations, constants.

Only the package's own files are read, with the protobuf classes and the blob reader that coremltools ships.

https://github.com/apple/coremltools/blob/main/mlmodel/format/MIL.proto
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.errors import CannotRun

_READERS = {
    "FLOAT16": ("read_fp16_data", np.float16),
    "FLOAT32": ("read_float_data", np.float32),
    "INT32": ("read_int32_data", np.int32),
    "UINT32": ("read_uint32_data", np.uint32),
    "INT16": ("read_int16_data", np.int16),
    "UINT16": ("read_uint16_data", np.uint16),
    "INT8": ("read_int8_data", np.int8),
    "UINT8": ("read_uint8_data", np.uint8),
    **{f"INT{bits}": (f"read_int{bits}_data", np.int8) for bits in (4,)},
    **{f"UINT{bits}": (f"read_uint{bits}_data", np.uint8) for bits in (1, 2, 3, 4, 6)},
}
"""By MIL's name of a type: the blob reader's method and numpy's dtype."""

_IMMEDIATE = {"BOOL": np.bool_, "FLOAT64": np.float64, "INT64": np.int64} | {n: d for n, (_, d) in _READERS.items()}


@dataclass(frozen=True, slots=True)
class Operation:
    """One step. An argument is the name of a value, a constant, or a list of those (`concat` takes one)."""

    kind: str
    arguments: Mapping[str, Any]
    outputs: tuple[Value, ...]
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """A named result; `dtype` is MIL's name of its type, empty if it is not a tensor; None is a dynamic size."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """An argument that refers to a value by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Block:
    """Operations in order, with the names of the block's inputs and outputs."""

    inputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """An input of the model: MIL's name of its dtype, and the least and greatest size of each axis (-1: no bound)."""

    name: str
    dtype: str
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A model: its inputs and outputs, its main function, and the metadata that its maker added."""

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    main: Block
    metadata: Mapping[str, str]


def read(package: Path) -> Program:
    """Read a `.mlpackage`.

    Raises:
        CannotRun: it is not a single ML Program.
    """
    from coremltools.proto import MIL_pb2, Model_pb2

    folder = package / "Data"
    manifest = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    model = Model_pb2.Model()
    model.ParseFromString((folder / root).read_bytes())
    if model.WhichOneof("Type") != "mlProgram":
        raise CannotRun(f"the package has a {model.WhichOneof('Type')}, not an ML Program")
    function = model.mlProgram.functions["main"]
    (block,) = function.block_specializations.values()
    reader = _Reader((folder / root).parent, MIL_pb2.DataType)
    return Program(
        inputs=tuple(_port(feature) for feature in model.description.input),
        outputs=tuple(feature.name for feature in model.description.output),
        main=reader.block(block, tuple(named.name for named in function.inputs)),
        metadata=dict(model.description.metadata.userDefined),
    )


def weights(program: Program) -> dict[int, list[int]]:
    """The numbers of elements of the main function's weights, by bits: 4, 8, or 32 for those in float."""
    found: dict[int, list[int]] = {4: [], 8: [], 32: []}
    for operation in program.main.operations:
        (value, *_) = operation.outputs
        size = math.prod(length or 0 for length in value.shape)
        if operation.kind == "const" and value.dtype in ("FLOAT16", "FLOAT32") and len(value.shape) > 1:
            found[32].append(size)
        elif operation.kind.startswith("constexpr_"):
            found[4 if operation.kind == "constexpr_lut_to_dense" else 8].append(size)
    return found


def _port(feature: Any) -> Port:
    array = feature.type.multiArrayType
    dtype = {65568: "FLOAT32", 65552: "FLOAT16", 131104: "INT32", 65600: "FLOAT64"}[array.dataType]
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        sizes = tuple((int(size.lowerBound), int(size.upperBound)) for size in array.shapeRange.sizeRanges)
    elif array.WhichOneof("ShapeFlexibility") == "enumeratedShapes":
        shapes = [tuple(shape.shape) for shape in array.enumeratedShapes.shapes]
        sizes = tuple((min(along), max(along)) for along in zip(*shapes, strict=True))
    else:
        sizes = tuple((int(size), int(size)) for size in array.shape)
    return Port(feature.name, dtype, sizes)


class _Reader:
    """Reads blocks, and keeps the weight files open."""

    def __init__(self, folder: Path, types: Any) -> None:
        self._folder = folder
        self._types = types
        self._files: dict[str, Any] = {}

    def block(self, block: Any, inputs: Sequence[str] = ()) -> Block:
        operations = tuple(self._operation(operation) for operation in block.operations)
        return Block(tuple(inputs) or tuple(n.name for n in block.inputs), operations, tuple(block.outputs))

    def _operation(self, operation: Any) -> Operation:
        arguments = {name: self._argument(argument) for name, argument in operation.inputs.items()}
        arguments |= {name: self._constant(value) for name, value in operation.attributes.items() if name != "name"}
        outputs = tuple(self._value(output) for output in operation.outputs)
        return Operation(operation.type, arguments, outputs, tuple(self.block(block) for block in operation.blocks))

    def _value(self, named: Any) -> Value:
        if named.type.WhichOneof("type") != "tensorType":
            return Value(named.name, "", ())
        tensor = named.type.tensorType
        return Value(named.name, self._types.Name(tensor.dataType), _shape(tensor))

    def _argument(self, argument: Any) -> Any:
        bound = [
            Name(binding.name) if binding.WhichOneof("binding") == "name" else self._constant(binding.value)
            for binding in argument.arguments
        ]
        return bound if len(bound) != 1 else bound[0]

    def _constant(self, value: Any) -> Any:
        """A constant: an array of the declared type and shape, a string, or a list of such."""
        if value.type.WhichOneof("type") == "listType":
            return [self._constant(item) for item in value.immediateValue.list.values]
        tensor = value.type.tensorType
        dtype = self._types.Name(tensor.dataType)
        shape = tuple(size or 0 for size in _shape(tensor))
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue, dtype).reshape(shape)
        immediate = value.immediateValue.tensor
        values = getattr(immediate, immediate.WhichOneof("value")).values
        if dtype == "STRING":
            return values[0] if len(values) == 1 else list(values)
        if dtype not in _IMMEDIATE:
            raise CannotRun(f"the MIL evaluator does not support constants of type {dtype}")
        if isinstance(values, bytes):
            return np.frombuffer(values, _IMMEDIATE[dtype])[: int(np.prod(shape))].reshape(shape).copy()
        return np.array(values, _IMMEDIATE[dtype]).reshape(shape)

    def _blob(self, blob: Any, dtype: str) -> np.ndarray:
        from coremltools.libmilstoragepython import _BlobStorageReader

        if dtype not in _READERS:
            raise CannotRun(f"the MIL evaluator does not support weights of type {dtype}")
        path = str(self._folder / blob.fileName.removeprefix("@model_path/"))
        if path not in self._files:
            self._files[path] = _BlobStorageReader(path)
        method, numpy_dtype = _READERS[dtype]
        read = np.asarray(getattr(self._files[path], method)(blob.offset))
        # half precision is read as its bits
        return read.view(np.float16) if dtype == "FLOAT16" else read.astype(numpy_dtype, copy=True)


def _shape(tensor: Any) -> tuple[int | None, ...]:
    return tuple(
        int(size.constant.size) if size.WhichOneof("dimension") == "constant" else None for size in tensor.dimensions
    )
