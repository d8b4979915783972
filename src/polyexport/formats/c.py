"""C: one function of portable C without libraries, for microcontrollers and anything else with a C compiler.

https://github.com/emmtrix/emx-onnx-cgen

Requirements:
* It takes one row at a time, since microcontrollers have no batches, and C has no arrays of unknown size. Other dynamic
  axes have the sizes of the validation batch. If rows are not independent, the whole batch is static instead.
* Weights are constants in the source; those above 4 MiB are in `model.bin`, which `model_load` reads. Buffers above
  64 KiB, which exceed a microcontroller's stack, are on the heap.
* It is verified and timed as compiled by this machine's C compiler with `-O2`; the report says how much flash and stack
  that takes. Where `arm-none-eabi-gcc` and QEMU are, the first rows are verified on a Cortex-M4 too, with the flash and
  RAM that it takes there.
"""

from __future__ import annotations

import ctypes
import math
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polyexport.errors import CannotRun, ToolMissing
from polyexport.format import Format, Loaded, Route, Snippet
from polyexport.measure.emulator import Emulated, Emulator
from polyexport.spec import Arrays, ExportSpec, Runner, TensorSpec, in_rows, row_remark
from polyexport.workers import compiler, cortex_m

if TYPE_CHECKING:
    import onnx

_WEIGHTS = "model.bin"
_IN_SOURCE_BYTES = 4 * 2**20
_ON_STACK_BYTES = 64 * 2**10


def lacks() -> str:
    """What is missing if there is no C compiler, in a line."""
    return compiler.missing("C")


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Fix the shapes of the ONNX graph, and write it as C, with a header and a file of weights if they are large.

    Raises:
        ToolMissing: there is no C compiler to verify it with.
    """
    if why := lacks():
        raise ToolMissing(why)
    from emx_onnx_cgen.compiler import Compiler, CompilerOptions

    _read_directions()
    options = CompilerOptions(large_weight_threshold=_IN_SOURCE_BYTES, large_temp_threshold_bytes=_ON_STACK_BYTES)
    code, weights = Compiler(options).compile_with_weight_data(_fixed(source, spec))
    code = code.replace("[step][dir][b][h] = h_new;", "[t][dir][b][h] = h_new;")  # in the order of the inputs
    target.write_text(code, encoding="utf-8")
    target.with_suffix(".h").write_text(_header(code), encoding="utf-8")
    if weights:
        target.with_name(_WEIGHTS).write_bytes(weights)


def _fixed(source: Path, spec: ExportSpec) -> onnx.ModelProto:
    """The ONNX graph for one row, including inputs that forward never reads."""
    from polyexport.onnx_graph.reversals import without_reversals
    from polyexport.onnx_graph.static_shapes import set_values, with_sizes

    one = spec.one_row()
    model = without_reversals(with_sizes(source, spec, one))
    read = {value.name: value for value in model.graph.input}
    set_values(model.graph.input, [read.get(tensor.name) or _unread(tensor) for tensor in one.inputs])
    return model


def _read_directions() -> None:
    """Give the generator the direction of a GRU or RNN as text, the only type in which it reads it."""
    from emx_onnx_cgen import onnx_import

    read = onnx_import._node_attrs

    def in_text(node: onnx.NodeProto) -> dict[str, object]:
        return {
            name: value.decode() if name == "direction" and isinstance(value, bytes) else value
            for name, value in read(node).items()
        }

    onnx_import._node_attrs = in_text


def _unread(tensor: TensorSpec) -> onnx.ValueInfoProto:
    import onnx

    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return onnx.helper.make_tensor_value_info(tensor.name, element, tensor.shape)


# --- what was written -------------------------------------------------------------------------------------------------

_DTYPES = {"float": "float32", "double": "float64", "_Float16": "float16"}
"""numpy's names of C types that are not `bool` or integers without their `_t`."""

_SIGNATURE = re.compile(r"^void model\((.*?)\) \{$", re.MULTILINE | re.DOTALL)
_PARAMETER = re.compile(r"(const )?(\w+) (\w+)((?:\[(?:restrict )?\d+\])*)")


def _header(code: str) -> str:
    """Declarations for C and C++, which lacks `restrict`."""
    signature = _signature(code).replace("restrict ", "")
    return f"""\
#pragma once
#include <stdbool.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {{
#endif
bool model_load(const char *path);  // call it first, with the path of {_WEIGHTS} if there is one
void model({signature});
#ifdef __cplusplus
}}
#endif
"""


def _signature(code: str) -> str:
    found = _SIGNATURE.search(code)
    if found is None:
        raise ValueError("emx-onnx-cgen wrote no function with the expected signature: void model(…) {")
    return found[1]


def _parameters(code: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of the C function."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for constant, kind, name, axes in _PARAMETER.findall(_signature(code)):
        shape = tuple(map(int, re.findall(r"\d+", axes)))
        tensor = TensorSpec(name, _DTYPES.get(kind, kind.removesuffix("_t")), shape)
        (inputs if constant else outputs).append(tensor)
    return tuple(inputs), tuple(outputs)


def _compiled(source: Path, folder: Path) -> tuple[ctypes.CDLL, str]:
    """The shared library, and the flash and stack that it takes, in a line.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    compiled, library = folder / "model.o", folder / "model.so"
    flags = ("-std=c11", "-O2", "-fPIC", "-fstack-usage", "-w")
    _run(compiler.program("C"), *flags, "-c", str(source), "-o", str(compiled))
    _run(compiler.program("C"), "-shared", str(compiled), "-o", str(library), "-lm")
    flash = sum(map(int, _run("size", str(compiled)).splitlines()[1].split()[:2]))
    functions = (line.split("\t") for line in compiled.with_suffix(".su").read_text(encoding="utf-8").splitlines())
    stack = max(int(size) for name, size, _ in functions if name.endswith(":model"))
    heap = ", and buffers from the heap" if "malloc(" in source.read_text(encoding="utf-8") else ""
    took = f"{flash:,} bytes of flash and {stack:,} of stack{heap}, by {compiler.version('C')} for {platform.machine()}"
    return ctypes.CDLL(str(library)), took


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"{words[0]} fails: {next((line for line in said if ' error: ' in line), ' '.join(said))}")
    return done.stdout


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Compile it as a shared library, and run that row by row.

    Raises:
        RuntimeError: it cannot be compiled, with the compiler's words, or its weights cannot be read.
    """
    code = path.read_text(encoding="utf-8")
    inputs, outputs = _parameters(code)
    with tempfile.TemporaryDirectory() as folder:
        library, took = _compiled(path, Path(folder))
    weights = path.with_name(_WEIGHTS)
    if weights.exists() and not library.model_load(str(weights).encode()):
        raise RuntimeError(f"{weights.name} cannot be read")

    def call(given: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> None:
        library.model(*(array.ctypes.data_as(ctypes.c_void_p) for array in (*given, *made)))

    own = replace(spec, inputs=inputs, outputs=outputs)
    remark = "; ".join(filter(None, (row_remark(spec), took)))
    return Loaded(_by_row(call, own, spec), own, remark=remark, emulator=_cortex_m(path, own, spec))


Call = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], None]
"""Calls the C function with the arrays of its inputs, and fills those of its outputs."""


def _by_row(call: Call, own: ExportSpec, spec: ExportSpec) -> Runner:
    """A runner of the C function, whose signature is `own`; `spec` is PyTorch's."""

    def run(arrays: Arrays) -> Arrays:
        given = [
            np.asarray(arrays[our.name], its.dtype, order="C") for our, its in zip(spec.inputs, own.inputs, strict=True)
        ]
        made = [np.empty(tensor.sized(int), tensor.dtype) for tensor in own.outputs]
        call(given, made)
        return {
            our.name: array.reshape(array.shape if our.shape else ())
            for our, array in zip(spec.outputs, made, strict=True)
        }

    return in_rows(run, spec.one_row())


def _cortex_m(path: Path, own: ExportSpec, spec: ExportSpec) -> Emulator:
    """The artifact on a Cortex-M, which is compiled for it when it runs."""

    def run(inputs: Arrays) -> Emulated:
        if why := cortex_m.missing():
            raise CannotRun(why)
        if path.with_name(_WEIGHTS).exists():
            raise CannotRun(f"its weights are in {_WEIGHTS}, and it has no file system")
        taken: list[cortex_m.Memory] = []
        with tempfile.TemporaryDirectory() as folder:
            program = cortex_m.compiled(path, Path(folder), _sizes(own.inputs), _sizes(own.outputs))
            outputs = _by_row(lambda given, made: taken.append(program.call(given, made)), own, spec)(inputs)
        most = max(taken, key=lambda memory: memory.ram)
        return Emulated(outputs, f"{most}, by {cortex_m.tools()}")

    return Emulator(cortex_m.PROCESSOR, run)


def _sizes(tensors: Sequence[TensorSpec]) -> list[int]:
    """The size of each tensor of the C function, in bytes."""
    return [math.prod(tensor.sized(int)) * np.dtype(tensor.dtype).itemsize for tensor in tensors]


_SNIPPETS = (
    Snippet(
        "C",
        """\
#include "model.h"
{% macro tensor(name, dtype, shape) -%}
{% set kinds = {"float32": "float", "float64": "double", "float16": "_Float16", "bool": "bool"} %}
{{- kinds.get(dtype, dtype ~ "_t") }} {{ name }}{% for size in shape %}[{{ size }}]{% endfor %}
{%- endmacro %}
{%- for input in inputs %}
static {{ tensor(input.name, input.dtype, input.shape) }};  // your data here
{%- endfor %}
{%- for name in outputs %}
static {{ tensor(name, output_dtypes[loop.index0], output_shapes[loop.index0]) }};
{%- endfor %}

// cc -std=c11 -O2 -I{{ path | replace("/model.c", "") }} main.c {{ path }} -lm
int main(void) {
  if (!model_load("{{ path | replace("model.c", "model.bin") }}")) return 1;  // needs no file where there is none
  model({% for input in inputs %}{{ input.name }}, {% endfor %}{{ outputs | join(", ") }});
}
""",
    ),
)


FORMAT = Format(
    name="c",
    description="Portable C without libraries, for microcontrollers and whatever else has a compiler",
    url="https://github.com/emmtrix/emx-onnx-cgen",
    artifact="model.c",
    routes=(Route("emx-onnx-cgen", upstream="onnx", toolchain="c", convert=convert),),
    load=load,
    lacks=lacks,
    could_use=cortex_m.missing,
    targets=("microcontroller",),
    snippets=_SNIPPETS,
    slow_because="it is portable C of plain loops, on one thread",
)
