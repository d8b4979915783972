"""Evaluates a MIL program op by op with PyTorch.

Requirements:
* Dtype and shape of every value, and the bounds of every input, are checked against the program's declarations,
  so that a file that Core ML would refuse does not pass here.
* float16 is kept as storage: an op computes in float32 and its result is rounded to float16 where the program says so.
  A device may accumulate in float16 and be less exact; this is the best case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyexport.coreml.ops import OPS
from polyexport.coreml.program import Block, Name, Operation, Port, Program, Value, read
from polyexport.errors import CannotRun
from polyexport.spec import Arrays

Values = dict[str, Any]
"""Values by name: tensors, strings, and lists of tensors."""

DTYPES = {
    "BOOL": torch.bool,
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
}


def evaluator(package: Path, observe: Callable[[Arrays], None] | None = None) -> Callable[[Arrays], Arrays]:
    """Open a package as a function of named arrays.

    `observe` receives all float tensors of its main block, inputs and outputs too, at each call.

    Raises:
        CannotRun: it has ops that are not supported here; the message names them.
    """
    program, run = _opened(package)

    def outputs(inputs: Arrays) -> Arrays:
        values = run(inputs)
        if observe is not None:
            observe(_floats(values))
        return {name: _as_array(values[name]) for name in program.outputs}

    return outputs


def intermediates(package: Path) -> Callable[[Arrays], Arrays]:
    """Open a package as a function that returns every float tensor of its main block, inputs and outputs too.

    Raises:
        CannotRun: see `evaluator`.
    """
    _, run = _opened(package)
    return lambda inputs: _floats(run(inputs))


def _floats(values: Values) -> Arrays:
    """The float tensors that are not empty."""
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return {name: _as_array(each) for name, each in tensors.items() if each.is_floating_point() and each.numel()}


def _opened(package: Path) -> tuple[Program, Callable[[Arrays], Values]]:
    """The program, and a function that computes all values of its main block by name."""
    program = read(package)
    unknown = sorted(kinds(program.main) - OPS.keys() - _CONTROL.keys() - {"const"})
    if unknown:
        raise CannotRun(f"the MIL evaluator does not support {', '.join(unknown)}")
    constants: Values = {}
    main = _without_constants(program.main, constants)

    def run(inputs: Arrays) -> Values:
        values = dict(constants)
        for port in program.inputs:
            values[port.name] = _fed(port, inputs)
        with torch.inference_mode():
            evaluate(main, values)
        return values

    return program, run


def kinds(block: Block) -> set[str]:
    """The op types of a block and of those inside it."""
    own = {operation.kind for operation in block.operations}
    return own.union(*(kinds(inner) for operation in block.operations for inner in operation.blocks))


def evaluate(block: Block, values: Values) -> list[Any]:
    """Run a block's operations in order; returns its outputs. `values` is what is visible to it, and grows."""
    for operation in block.operations:
        results = _CONTROL.get(operation.kind, _compute)(operation, values)
        for output, result in zip(operation.outputs, results, strict=True):
            values[output.name] = _declared(operation, output, result)
    return [values[name] for name in block.outputs]


def _without_constants(block: Block, constants: Values) -> Block:
    """Evaluate the program's constants once, instead of in each call."""
    left = []
    for operation in block.operations:
        if operation.kind == "const":
            constants[operation.outputs[0].name] = _literal(operation.arguments["val"])
        elif operation.kind.startswith("constexpr_"):
            (constants[operation.outputs[0].name],) = _compute(operation, constants)
        else:
            left.append(operation)
    return Block(block.inputs, tuple(left), block.outputs)


def _fed(port: Port, inputs: Arrays) -> torch.Tensor:
    array = inputs[port.name]
    tensor = torch.from_numpy(array)
    if tensor.dtype != DTYPES[port.dtype]:
        raise ValueError(f"input {port.name} is {array.dtype}, but the package takes {port.dtype}")
    fits = len(port.sizes) == array.ndim and all(
        low <= size and (high < 0 or size <= high) for size, (low, high) in zip(array.shape, port.sizes, strict=True)
    )
    if not fits:
        raise ValueError(f"input {port.name} has shape {array.shape}, but the package takes {port.sizes}")
    return tensor


def _as_array(value: torch.Tensor) -> np.ndarray:
    array: np.ndarray = value.contiguous().numpy()
    return array


# --- one operation ----------------------------------------------------------------------------------------------------


def _compute(operation: Operation, values: Values) -> Sequence[Any]:
    if operation.kind == "const":  # inside a nested block
        return (_literal(operation.arguments["val"]),)
    arguments = {name: _wide(_resolve(value, values)) for name, value in operation.arguments.items()}
    result = OPS[operation.kind](**arguments)
    return result if isinstance(result, tuple) else (result,)


def _resolve(argument: Any, values: Values) -> Any:
    if isinstance(argument, Name):
        return values[argument.name]
    if isinstance(argument, list):
        return [_resolve(item, values) for item in argument]
    return _literal(argument)


def _literal(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _wide(value: Any) -> Any:
    """Half precision is computed in float32."""
    if isinstance(value, list):
        return [_wide(item) for item in value]
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value


def _declared(operation: Operation, output: Value, result: Any) -> Any:
    """The result in the dtype and of the shape that the program declares.

    Raises:
        ValueError: it has another dtype or shape.
    """
    if not isinstance(result, torch.Tensor) or output.dtype not in DTYPES:
        return result
    sizes = zip(result.shape, output.shape, strict=False)
    if result.ndim != len(output.shape) or any(there is not None and here != there for here, there in sizes):
        shape = tuple(result.shape)
        raise ValueError(f"{operation.kind} returns {output.name} with shape {shape}, but {output.shape} is declared")
    dtype = DTYPES[output.dtype]
    if _kind(result.dtype) != _kind(dtype):
        raise ValueError(f"{operation.kind} returns {output.name} as {result.dtype}, but {output.dtype} is declared")
    return result.to(dtype)


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "integer"


# --- control flow -----------------------------------------------------------------------------------------------------


def _cond(operation: Operation, values: Values) -> Sequence[Any]:
    chosen = operation.blocks[0 if bool(_resolve(operation.arguments["pred"], values)) else 1]
    return evaluate(chosen, dict(values))


def _while_loop(operation: Operation, values: Values) -> Sequence[Any]:
    condition, body = operation.blocks
    given = operation.arguments["loop_vars"]
    state = _resolve(given if isinstance(given, list) else [given], values)
    while bool(evaluate(condition, values | dict(zip(condition.inputs, state, strict=True)))[0]):
        state = evaluate(body, values | dict(zip(body.inputs, state, strict=True)))
    return tuple(state)


_CONTROL: Mapping[str, Callable[[Operation, Values], Sequence[Any]]] = {"cond": _cond, "while_loop": _while_loop}
