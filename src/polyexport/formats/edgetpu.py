"""Edge TPU: an int8 TensorFlow Lite model, compiled for Coral's accelerator.

https://coral.ai/docs/edgetpu/compiler/

Requirements:
* It is compiled from a format of its own, `tflite-int8-nhwc`: all in int8, channels last, one row at a time, since the
  accelerator supports nothing else. That is made and verified on the CPU, with or without the compiler.
* The compiler is a program for Linux on x86-64 in the vendor's package repository. If it is not on PATH, the
  outcome is `skipped`, with what Coral's table of operations predicts.
* An operation that is not mapped runs on the CPU, and so does all that follows it; with more than a tenth of them
  there, the outcome is `degraded`.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.errors import CannotRun, ToolMissing, line
from polyexport.format import Format, Loaded, Observed, OnDevice, Route, Snippet, trained_routes
from polyexport.formats import tflite, tflite_quantized
from polyexport.measure.weights import counted
from polyexport.spec import Arrays, ExportSpec, TensorSpec, in_rows, row_remark
from polyexport.tracing.exported_program import load_program
from polyexport.workers import programs

COMPILER = "edgetpu_compiler"
URL = "https://coral.ai/docs/edgetpu/compiler/"

_ON_CPU_AT_MOST = 0.1
_MODEL = "model.tflite"
_LOG = "model_edgetpu.log"

# --- the model before compilation -------------------------------------------------------------------------------------


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program of `torch.export` again, for one row and channels last, and quantize it."""
    one = spec.one_row()
    precise = target.with_name("float32.tflite")
    tflite.lower(load_program(source).module(), precise, one, channels_last=True)
    tflite_quantized.quantize(precise, target, one, prepare=_channels_last)
    precise.unlink()
    print(prediction(target))


def keep_trained_scales(source: Path, target: Path, spec: ExportSpec, *, calibrated: bool = False) -> None:
    """Lower the program for one row and channels last, with the scales that it was trained with."""
    tflite_quantized.keep_trained_scales(source, target, spec.one_row(), calibrated=calibrated, channels_last=True)
    print(prediction(target))


def _channels_last(arrays: Arrays) -> Arrays:
    return {name: array.transpose(tflite.TO_LAST) if array.ndim == 4 else array for name, array in arrays.items()}


def _last(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        replace(tensor, shape=tuple(tensor.shape[axis] for axis in tflite.TO_LAST))
        if len(tensor.shape) == 4
        else tensor
        for tensor in tensors
    )


def load_int8(path: Path, spec: ExportSpec, *, threads: int, delegate: Any = None) -> Loaded:
    """Run it with LiteRT's interpreter, row by row; on the CPU, except operations that a `delegate` runs."""
    interpreted = tflite.Interpreted(path, spec.one_row(), threads=threads, delegate=delegate)
    own = interpreted.signature

    def run(inputs: Arrays) -> Arrays:
        answers = interpreted(_channels_last(inputs)).items()
        return {name: array.transpose(tflite.TO_FIRST) if array.ndim == 4 else array for name, array in answers}

    signature = replace(own, inputs=_last(own.inputs), outputs=_last(own.outputs))
    return Loaded(in_rows(run, spec.one_row()), signature, remark=row_remark(spec))


# --- what would map ---------------------------------------------------------------------------------------------------

SUPPORTED = frozenset(
    {
        "ADD",
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "EXPAND_DIMS",
        "FULLY_CONNECTED",
        "L2_NORMALIZATION",
        "LOGISTIC",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MEAN",
        "MINIMUM",
        "MUL",
        "PACK",
        "PAD",
        "PRELU",
        "QUANTIZE",
        "REDUCE_MAX",
        "REDUCE_MIN",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "RSQRT",
        "SLICE",
        "SOFTMAX",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SQUARED_DIFFERENCE",
        "SQUEEZE",
        "STRIDED_SLICE",
        "SUB",
        "SUM",
        "TANH",
        "TRANSPOSE",
        "TRANSPOSE_CONV",
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
    }
)
"""The operations of Coral's table, for the runtime of its newest compiler (16), by TensorFlow Lite's names.

https://coral.ai/docs/edgetpu/models-intro/#supported-operations
"""


@dataclass(frozen=True, slots=True)
class Placement:
    """How many operations run where. `on_cpu` counts those on the CPU by name, with the reason if it is known."""

    total: int
    on_cpu: Counter[str]
    accelerator: str = "the Edge TPU"

    def __str__(self) -> str:
        mapped = f"{self.total - self.on_cpu.total()} of {self.total} operations"
        kept = counted(self.on_cpu)
        return f"{mapped} on {self.accelerator}" + (f", on the CPU {kept}" if kept else "")


def predict(path: Path) -> Placement:
    """The placement of a file's operations by Coral's table.

    It checks the table's limits on types and shapes: int8, no dynamic axis, and size 1 for all axes before the last
    three. Limits on strides, sizes and so on are left to the compiler.
    """
    on_cpu: Counter[str] = Counter()
    operations = tflite.operations(path)
    for name, tensors, _ in operations:
        if name not in SUPPORTED:
            on_cpu[f"{name} (not supported)"] += 1
        elif any(tensor["dtype"] not in (np.int8, np.uint8, np.int32) for tensor in tensors):
            on_cpu[f"{name} (not int8)"] += 1
        elif any(-1 in tensor["shape_signature"] for tensor in tensors):
            on_cpu[f"{name} (a dynamic axis)"] += 1
        elif any(max(tensor["shape"][:-3], default=1) > 1 for tensor in tensors):
            on_cpu[f"{name} (more than three axes)"] += 1
    return Placement(len(operations), on_cpu)


def prediction(path: Path) -> str:
    """`predict` in words."""
    return f"Coral's table of operations predicts {predict(path)}"


# --- compilation ------------------------------------------------------------------------------------------------------


def lacks() -> str:
    """What is missing if there is no compiler, in a line."""
    return "" if shutil.which(COMPILER) else f"{COMPILER} is not on PATH; it is at {URL} (Linux, x86-64)"


def compile_int8(source: Path, target: Path, spec: ExportSpec) -> None:
    """Run the compiler, and write its model and its log next to a copy of the int8 model.

    Raises:
        ToolMissing: there is no compiler.
    """
    if why := lacks():
        agrees = "The int8 model to be compiled agrees with PyTorch on the CPU"
        raise ToolMissing(f"{why}. {agrees}; {prediction(source)}")
    model = target.with_name(_MODEL)
    shutil.copyfile(source, model)
    done = programs.run([COMPILER, "-s", "-a", "-o", str(target.parent), str(model)])
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise RuntimeError(f"{COMPILER} ended with exit code {done.returncode}: {said}")
    print(f"{prediction(source)}; {COMPILER} says: {read_log(target.with_name(_LOG).read_text(encoding='utf-8'))}")


def read_log(text: str) -> Placement:
    """The table at the end of the compiler's log: an operator, how often, and its status.

    Raises:
        ValueError: there is no such table.
    """
    rows = re.findall(r"^([A-Za-z][\w-]*)[ \t]+(\d+)[ \t]+(\S.*?)[ \t]*$", text, re.MULTILINE)
    if not rows:
        raise ValueError(f"no operator is listed in the log of {COMPILER}")
    on_cpu: Counter[str] = Counter()
    for name, count, status in rows:
        if status != "Mapped to Edge TPU":
            on_cpu[f"{name} ({status})"] += int(count)
    return Placement(sum(int(count) for _, count, _ in rows), on_cpu)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run the int8 model before compilation on the CPU, since there is no Edge TPU."""
    placed = read_log(path.with_name(_LOG).read_text(encoding="utf-8"))
    return before_compilation(path.with_name(_MODEL), spec, threads=threads, compiler=COMPILER, placed=placed)


def before_compilation(
    path: Path, spec: ExportSpec, *, threads: int, compiler: str, placed: Placement, remark: str = ""
) -> Loaded:
    """Run the int8 model in place of the compiled one, with a remark on where operations would run."""
    int8 = load_int8(path, spec, threads=threads)
    mostly_on_cpu = placed.on_cpu.total() > _ON_CPU_AT_MOST * placed.total
    return replace(
        int8,
        shortfall=str(placed) if mostly_on_cpu else "",
        remark="; ".join(filter(None, (int8.remark, remark))),
        stand_in="what ran is the int8 model before compilation, on the CPU, which says nothing about the speed of "
        f"{placed.accelerator}",
        observed=lambda: Observed(
            verified_by=f"the int8 model before compilation, on the CPU; {compiler} has {placed}"
        ),
    )


def load_on_coral(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run the compiled model on the first Edge TPU.

    Raises:
        CannotRun: there is no Edge TPU, or its library is not installed.
    """
    from ai_edge_litert.interpreter import load_delegate

    try:
        delegate = load_delegate(_LIBRARY)
    except (OSError, ValueError) as error:  # ValueError if the library finds no device
        raise CannotRun(
            f"there is no Edge TPU here, or no {_LIBRARY} (see https://coral.ai/docs/accelerator/get-started/): "
            f"{line(error, 200)}"
        ) from error
    found = load_int8(path, spec, threads=threads, delegate=delegate)
    return replace(found, observed=lambda: Observed(device="edgetpu"))


_LIBRARY = "libedgetpu.so.1"

_CODE = """\
import numpy as np
from MODULE import MAKE

interpreter = MAKE("{{ path }}")
interpreter.allocate_tensors()
batch = np.load("{{ batch }}")
for detail in interpreter.get_input_details():
    name = next(name for name in {{ names | tojson }} if name in detail["name"])
    rows = batch[name][: detail["shape"][0]]
    rows = np.moveaxis(rows, 1, -1) if rows.ndim == 4 else rows
    scale, zero = detail["quantization"]
    interpreter.set_tensor(detail["index"], np.clip(np.round(rows / scale) + zero, -128, 127).astype(np.int8))
interpreter.invoke()
outputs = []
for detail in interpreter.get_output_details():
    y, (scale, zero) = interpreter.get_tensor(detail["index"]), detail["quantization"]
    y = (y.astype(np.float32) - zero) * np.float32(scale) if scale else y
    outputs.append(np.moveaxis(y, -1, 1) if y.ndim == 4 else y)
"""


def _snippets(module: str, make: str) -> tuple[Snippet, ...]:
    return (Snippet("Python", _CODE.replace("MODULE", module).replace("MAKE", make)),)


def _format(name: str, description: str, artifact: str, load: Any, *routes: Route, **more: Any) -> Format:
    return Format(
        name=name,
        description=description,
        url=URL,
        artifact=artifact,
        graph=artifact,
        precision="int8",
        routes=routes,
        load=load,
        runtime="tflite",
        calibrated=True,
        targets=("camera",),
        **more,
    )


FORMATS = (
    _format(
        "tflite-int8-nhwc",
        "TensorFlow Lite model in int8, channels last, one row at a time, as an Edge TPU needs it",
        _MODEL,
        load_int8,
        *map(tflite.packed, trained_routes("litert", keep_trained_scales)),
        tflite.packed(Route("litert-torch", "pt2", "litert", convert)),
        on_device=OnDevice(("ai-edge-litert",)),
        snippets=_snippets("ai_edge_litert.interpreter", "Interpreter"),
    ),
    _format(
        "edgetpu",
        "TensorFlow Lite model compiled for Coral's Edge TPU",
        "model_edgetpu.tflite",
        load,
        Route(COMPILER, "tflite-int8-nhwc", "tflite", compile_int8),
        aliases=("coral",),
        lacks=lacks,
        on_device=OnDevice(("ai-edge-litert",), load_on_coral),
        snippets=_snippets("pycoral.utils.edgetpu", "make_interpreter"),
    ),
)
