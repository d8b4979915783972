"""TensorFlow Lite, now LiteRT: one file for phones and small devices; in float32 and float16.

https://ai.google.dev/edge/litert

Requirements:
* Only LiteRT's own operators are used. A model that needs TensorFlow's too (`SELECT_TF_OPS`) fails, since a device with
  only the interpreter could not run it.
* The report shows the artifact's own dtypes: a route may narrow int64 to int32, and the int8 of `tflite_quantized.py`
  takes quantized inputs. The runner takes PyTorch's and converts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile, ZipInfo

import numpy as np

from polyexport.format import Format, Loaded, OnDevice, Route, Snippet
from polyexport.formats.saved_model import SIGNATURE
from polyexport.spec import Arrays, ExportSpec, Precision, Runner, TensorSpec
from polyexport.tracing.exported_program import in_float32, load_program

if TYPE_CHECKING:
    import torch

URL = "https://ai.google.dev/edge/litert"
ARTIFACT = "model.tflite"

# --- conversion -------------------------------------------------------------------------------------------------------


def convert_program(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program of `torch.export` with litert-torch, which supports static shapes only."""
    lower(load_program(source).module(), target, spec)


def lower(
    module: Any,
    target: Path,
    spec: ExportSpec,
    *,
    channels_last: bool = False,
    narrow: Callable[[str], str] = lambda dtype: dtype,
    quantized: Any = None,
) -> None:
    """Write a module with the static signature `spec`, under its own names; float64 becomes float32.

    Args:
        module: The module of a program; takes tensors in forward's order, returns one or a tuple.
        target: The file.
        spec: The module's signature, not the artifact's.
        channels_last: Whether tensors of four axes, taken as images, have channels last in the artifact.
        narrow: The type of a tensor in the artifact, for its type in PyTorch.
        quantized: A `QuantConfig` of litert-torch, if layers between `dequantize` and `quantize` become integer ones.
    """
    import litert_torch
    import torch

    module = in_float32(module, torch.float64)  # which LiteRT's operators and small devices lack

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            self.training = False  # eval() is not supported by a program of torch.export

        def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            given = (_as(tensors[t.name], narrow(t.dtype), t.dtype) for t in spec.inputs)
            found = self.inner(*(_permuted(t, TO_FIRST) if channels_last else t for t in given))
            listed = (found,) if isinstance(found, torch.Tensor) else tuple(found)
            outputs = zip(spec.outputs, listed, strict=True)
            narrowed = {tensor.name: _as(t, tensor.dtype, narrow(tensor.dtype)) for tensor, t in outputs}
            return {name: _permuted(t, TO_LAST) if channels_last else t for name, t in narrowed.items()}

    inputs = {
        tensor.name: torch.zeros([int(size) for size in tensor.shape], dtype=getattr(torch, narrow(tensor.dtype)))
        for tensor in spec.inputs
    }
    if channels_last:
        inputs = {name: _permuted(tensor, TO_LAST).contiguous() for name, tensor in inputs.items()}
    litert_torch.convert(Named(), (), inputs, quant_config=quantized).export(str(target))


TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def _as(tensor: torch.Tensor, dtype: str, narrow: str) -> torch.Tensor:
    import torch

    return tensor if narrow == dtype else tensor.to(getattr(torch, narrow))


def _permuted(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    return tensor.permute(order) if tensor.ndim == 4 else tensor


def convert_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Convert the SavedModel with TensorFlow's own converter, dynamic axes included."""
    target.write_bytes(converted(converter_of(source)))


def halve_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `convert_saved_model`, with weights in float16."""
    import tensorflow as tf

    converter = converter_of(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    target.write_bytes(converted(converter))


def converter_of(source: Path) -> Any:
    """TensorFlow's converter for a SavedModel."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(source), signature_keys=[SIGNATURE])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter


def converted(converter: Any) -> bytes:
    """The output of TensorFlow's converter.

    Raises:
        RuntimeError: LiteRT lacks operators; the message has their names, the log the converter's full message.
    """
    try:
        return bytes(converter.convert())
    except Exception as error:  # the converter's own exception class is private
        if lacking := sorted(set(re.findall(_LACKING, str(error)))):
            raise RuntimeError(f"LiteRT's own operators lack TensorFlow's {', '.join(lacking)}") from error
        raise


_LACKING = r"'tf\.(\w+)' op is neither a custom op nor a flex op"


def halve(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights of a float32 file in float16."""
    from ai_edge_quantizer import recipe_manager
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName

    manager = recipe_manager.RecipeManager()
    manager.add_weight_only_config(
        regex=".*",
        operation_name=TFLOperationName.ALL_SUPPORTED,
        num_bits=16,
        algorithm_key=AlgorithmName.FLOAT_CASTING,
    )
    apply_recipe(manager.get_quantization_recipe(), source, target)


def apply_recipe(recipe: Any, source: Path, target: Path) -> None:
    """Quantize a file by a recipe without calibration."""
    from ai_edge_quantizer import quantizer

    made = quantizer.Quantizer(str(source), recipe).quantize()
    target.write_bytes(made.quantized_model)  # its own writer makes the file executable


# --- running ----------------------------------------------------------------------------------------------------------

Detail = Mapping[str, Any]
"""The interpreter's details of a tensor."""


class Interpreted:
    """A file in LiteRT's interpreter, on the CPU, except operations that a `delegate` (an accelerator's library) runs.

    Attributes:
        signature: The artifact's own signature.
    """

    def __init__(self, path: Path, spec: ExportSpec, *, threads: int, delegate: Any = None) -> None:
        self._runner = interpreter_of(path, threads=threads, delegate=delegate).get_signature_runner()
        self._in: Mapping[str, Detail] = self._runner.get_input_details()
        self._out: Mapping[str, Detail] = self._runner.get_output_details()
        self._spec = spec
        self.signature = ExportSpec(
            tuple(_described(tensor, self._in) for tensor in spec.inputs),
            tuple(_described(tensor, self._out) for tensor in spec.outputs),
        )

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run it on PyTorch's inputs; quantized outputs are returned as float32."""
        return self._answered(self._runner, inputs)

    def compiled(self, path: Path, *, threads: int) -> Runner:
        """The same by LiteRT's `CompiledModel`; the interpreter runs too, since only it knows the outputs' shapes."""
        return partial(self._answered, partial(_run_compiled, _compiled(path, threads=threads), self._runner))

    def _answered(self, runner: Callable[..., Arrays], inputs: Arrays) -> Arrays:
        answer = runner(**to_artifact(inputs, self._in))
        return {
            tensor.name: from_artifact(answer[tensor.name], self._out[tensor.name], tensor.dtype)
            for tensor in self._spec.outputs
        }


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with LiteRT's interpreter on the CPU; its `CompiledModel` has to agree, which applications use."""
    run = Interpreted(path, spec, threads=threads)
    others = {"LiteRT's CompiledModel": partial(run.compiled, path, threads=threads)}
    return Loaded(run, run.signature, others=others if find_spec("ai_edge_litert.compiled_model") else {})


def _compiled(path: Path, *, threads: int) -> Any:
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.options import CpuOptions, Options

    return CompiledModel.from_file(str(path), options=Options(cpu_options=CpuOptions(num_threads=threads)))


def _run_compiled(model: Any, like: Any, **inputs: np.ndarray) -> Arrays:
    """Run a `CompiledModel` on inputs in the artifact's own dtypes, as the interpreter's runner `like` does.

    The buffers that it makes for its outputs may be for one row where the batch is dynamic, and it writes beyond their
    end; so they are made here. All are made of bytes, since buffers know only some dtypes by name. Of the names of one
    tensor it knows one.
    """
    from ai_edge_litert.tensor_buffer import TensorBuffer

    ((signature, names),) = model.get_signature_list().items()
    details = model.get_input_tensor_details(signature)
    for name in (name for name, array in inputs.items() if tuple(details[name]["shape"]) != array.shape):
        model.resize_input_tensor_by_name(signature, name, inputs[name].shape)
    given = {name: model.create_input_buffer_by_name(signature, name) for name in names["inputs"]}
    for name, array in inputs.items():
        given[name].write(array.reshape(-1).view(np.uint8))
    expected = like(**inputs)
    content = {name: _aligned(expected[name].nbytes) for name in names["outputs"]}
    made = {name: TensorBuffer.create_from_host_memory(array) for name, array in content.items()}
    model.run_by_name(signature, given, made)
    read = {name: made[name].read(len(array), np.uint8) for name, array in content.items()}
    outputs = like.get_output_details()
    bytes_of = {outputs[name]["index"]: array for name, array in read.items()}
    return {
        name: bytes_of[output["index"]].view(expected[name].dtype).reshape(expected[name].shape)
        for name, output in outputs.items()
    }


def _aligned(count: int) -> np.ndarray:
    """So many bytes in memory that begins where LiteRT asks for it, at a multiple of 64."""
    raw = np.zeros(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count]


class Operation(NamedTuple):
    """One operation of a file's main graph: its inputs, outputs and constants."""

    kind: str
    tensors: list[Detail]
    constants: list[Detail]


def operations(path: Path) -> list[Operation]:
    """The operations of a file's main graph in order."""
    interpreter = interpreter_of(path, threads=1)
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    listed = interpreter._get_ops_details()  # there is no public way to list operations
    computed = {detail["index"] for detail in interpreter.get_input_details()}
    computed |= {index for each in listed for index in each["outputs"]}

    def read(each: Mapping[str, Any]) -> Operation:
        used = [index for index in (*each["inputs"], *each["outputs"]) if index in tensors]
        return Operation(
            each["op_name"],
            [tensors[index] for index in used if index in computed],
            [tensors[index] for index in used if index not in computed],
        )

    return [read(each) for each in listed]


def intermediates(path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
    """The output of each operation in LiteRT's own kernels, without XNNPACK, whose tensors cannot be read."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(path),
        num_threads=threads,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    runner = interpreter.get_signature_runner()
    runner(**to_artifact(inputs, runner.get_input_details()))
    given = {detail["index"] for detail in interpreter.get_input_details()}
    tensors = {detail["index"]: detail for each in operations(path) for detail in each.tensors}
    return {
        f"{detail['name']}:{index}": array
        for index, detail in tensors.items()
        if index not in given
        and (array := from_artifact(interpreter.get_tensor(index), detail, "float32")).dtype.kind == "f"
    }


def interpreter_of(path: Path, *, threads: int, delegate: Any = None) -> Any:
    """LiteRT's interpreter of a file."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path), num_threads=threads, experimental_delegates=[delegate] if delegate else None)


def _described(tensor: TensorSpec, details: Mapping[str, Detail]) -> TensorSpec:
    """The artifact's signature of a tensor; unchanged for an input that the artifact does not read."""
    found = details.get(tensor.name)
    return replace(tensor, dtype=np.dtype(found["dtype"]).name) if found else tensor


def to_artifact(inputs: Arrays, details: Mapping[str, Detail]) -> Arrays:
    """PyTorch's arrays in the artifact's dtypes: narrowed, or quantized with its scale."""
    given = {}
    for name, detail in details.items():
        array, dtype, scales = inputs[name], np.dtype(detail["dtype"]), _scales(detail)
        if scales.size and array.dtype.kind == "f":
            limits = np.iinfo(detail["dtype"])
            array = np.clip(np.round(array / scales) + _zeros(detail), limits.min, limits.max)
        given[name] = np.asarray(array, dtype, order="C")
    return given


def from_artifact(array: np.ndarray, detail: Detail, dtype: str) -> np.ndarray:
    """An output in PyTorch's dtype; one of another kind is returned unchanged, for parity to see."""
    scales = _scales(detail)
    if scales.size and array.dtype.kind in "iu":
        return np.asarray((array - _zeros(detail)) * scales, np.float32)
    return array.astype(dtype) if array.dtype.kind == np.dtype(dtype).kind else array


def _scales(detail: Detail) -> np.ndarray:
    return np.asarray(detail["quantization_parameters"]["scales"])


def _zeros(detail: Detail) -> np.ndarray:
    return np.asarray(detail["quantization_parameters"]["zero_points"])


SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
from ai_edge_litert.interpreter import Interpreter

runner = Interpreter("{{ path }}").get_signature_runner()
batch = np.load("{{ batch }}")


def quantized(x, detail):  # int8 values are steps of a scale from a zero point
    scale, zero = detail["quantization"]
    if scale:
        x = np.clip(np.round(x / scale) + zero, np.iinfo(detail["dtype"]).min, np.iinfo(detail["dtype"]).max)
    return x.astype(detail["dtype"])


def dequantized(y, detail):
    scale, zero = detail["quantization"]
    return (y.astype(np.float32) - zero) * np.float32(scale) if scale else y


answers = runner(**{name: quantized(batch[name], detail) for name, detail in runner.get_input_details().items()})
outputs = {name: dequantized(answers[name], detail) for name, detail in runner.get_output_details().items()}
""",
    ),
    Snippet(
        "Kotlin",
        """\
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel

val model = CompiledModel.create("{{ path }}", CompiledModel.Options(Accelerator.CPU))
val inputs = model.createInputBuffers()
val outputs = model.createOutputBuffers()
{%- for input in inputs %}
{%- set kind = {"float32": "Float", "int8": "Byte", "bool": "Boolean", "int64": "Long"}.get(input.dtype, "Int") %}
inputs[{{ loop.index0 }}].write{{ "Int8" if kind == "Byte" else kind }}(
    {{- kind }}Array({{ input.shape | join(" * ") or 1 }}))  // {{ input.name }}, your data here
{%- endfor %}
model.run(inputs, outputs)
{%- for name in outputs %}
{%- set kinds = {"float32": "Float", "int8": "Int8", "bool": "Boolean", "int64": "Long"} %}
val output{{ loop.index0 }} = outputs[{{ loop.index0 }}].read
    {{- kinds.get(output_dtypes[loop.index0], "Int") }}()  // {{ name }}
{%- endfor %}
""",
    ),
)


def packed(route: Route) -> Route:
    """The route, with labels and metadata in a zip archive appended to the model, where TensorFlow's tools read them.

    https://ai.google.dev/edge/litert/conversion/tensorflow/metadata (associated files)
    """

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        route.convert(source, target, spec)
        with ZipFile(target, "a") as archive:
            for name, text in spec.extra_files.items():
                archive.writestr(ZipInfo(name), text)

    return replace(route, convert=convert)


def tflite_format(name: str, precision: Precision, description: str, *routes: Route, **more: Any) -> Format:
    """A format whose artifact is such a file."""
    defaults: dict[str, Any] = {"load": load, "intermediates": intermediates, "targets": ("phone",)}
    defaults |= {"slow_because": "a recurrent layer is many small operators in it"}
    return Format(
        name=name,
        aliases=(name.replace("tflite", "litert"),),
        description=description,
        url=URL,
        artifact=ARTIFACT,
        graph=ARTIFACT,
        precision=precision,
        routes=tuple(map(packed, routes)),
        runtime="tflite",
        snippets=SNIPPETS,
        on_device=OnDevice(("ai-edge-litert",)),
        **(defaults | more),
    )


FORMATS = (
    tflite_format(
        "tflite",
        "float32",
        "TensorFlow Lite (LiteRT) model, for phones and small devices",
        Route("litert-torch", "pt2", "litert", convert_program, static=True),
        Route("tensorflow", "saved_model", "tensorflow", convert_saved_model),
    ),
    tflite_format(
        "tflite-fp16",
        "float16",
        "TensorFlow Lite model with its weights in float16, half the size",
        Route("quantizer", "tflite", "tflite", halve),
        Route("tensorflow", "saved_model", "tensorflow", halve_saved_model),
    ),
)
