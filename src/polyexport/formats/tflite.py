"""TensorFlow Lite, now LiteRT: one file for phones and small devices; in float32, in float16 and in int8.

https://ai.google.dev/edge/litert

Requirements:
* Only LiteRT's own operators. What needs TensorFlow's besides (`SELECT_TF_OPS`) fails and says so: a device that has
  the interpreter alone could not run it.
* The artifact's own dtypes stand in the report: a route may narrow int64 to int32, and int8 takes quantized numbers.
  The runner takes PyTorch's and converts.
* Quantized ranges come from real batches, `spec.calibration`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile, ZipInfo

import numpy as np

from polyexport.format import Format, Loaded, OnDevice, Route, Snippet
from polyexport.formats.saved_model import SIGNATURE
from polyexport.measure.weights import counted, in_float, is_weight
from polyexport.spec import Arrays, ExportSpec, Precision, TensorSpec, calibration
from polyexport.tracing.exported_program import in_float32, load_program

if TYPE_CHECKING:
    import torch

URL = "https://ai.google.dev/edge/litert"
ARTIFACT = "model.tflite"

# --- conversion -------------------------------------------------------------------------------------------------------


def convert_program(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program of `torch.export` with litert-torch, which takes fixed shapes only."""
    lower(load_program(source).module(), target, spec)


def lower(
    module: Any,
    target: Path,
    spec: ExportSpec,
    *,
    channels_last: bool = False,
    narrow: Callable[[str], str] = lambda dtype: dtype,
) -> None:
    """Write a module with the signature `spec`, whose shapes are fixed, under its own names; float64 becomes float32.

    Args:
        module: A program's; takes tensors in forward's order, returns one or a tuple.
        target: The file.
        spec: Of the module, not of the artifact.
        channels_last: Whether tensors of four axes, read as images, have their channels last in the artifact.
        narrow: The type of a tensor in the artifact, for its type in PyTorch.
    """
    import litert_torch
    import torch

    if all(tensor.dtype != "float64" for tensor in spec.outputs):
        module = in_float32(module)

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            self.training = False  # not eval(), which a program of torch.export refuses

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
    litert_torch.convert(Named(), (), inputs).export(str(target))


TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def _as(tensor: torch.Tensor, dtype: str, narrow: str) -> torch.Tensor:
    import torch

    return tensor if narrow == dtype else tensor.to(getattr(torch, narrow))


def _permuted(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    return tensor.permute(order) if tensor.ndim == 4 else tensor


def convert_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Convert the SavedModel with TensorFlow's own converter, dynamic axes included."""
    target.write_bytes(_converted(_converter(source)))


def halve_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """The same with its weights in float16."""
    import tensorflow as tf

    converter = _converter(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    target.write_bytes(_converted(converter))


def quantize_weights_of_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """The same with its weights in int8; the runtime quantizes activations while it runs."""
    import tensorflow as tf

    converter = _converter(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    target.write_bytes(_converted(converter))


def quantize_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """The same with weights and activations in int8, inputs and outputs too."""
    import tensorflow as tf

    converter = _converter(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ((SIGNATURE, arrays) for arrays in calibration(spec))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if all(np.dtype(tensor.dtype).kind == "f" for tensor in spec.inputs):
        converter.inference_input_type = tf.int8
    if all(np.dtype(tensor.dtype).kind == "f" for tensor in spec.outputs):
        converter.inference_output_type = tf.int8
    target.write_bytes(_converted(converter))


def _converter(source: Path) -> Any:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(source), signature_keys=[SIGNATURE])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter


def _converted(converter: Any) -> bytes:
    """What TensorFlow's converter writes.

    Raises:
        RuntimeError: operators that LiteRT has not, by name; the converter says it in a page.
    """
    try:
        return bytes(converter.convert())
    except Exception as error:  # it has a class of its own for this, deep inside
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
    _apply(manager.get_quantization_recipe(), source, target)


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights of a float32 file in int8; the runtime quantizes activations while it runs."""
    from ai_edge_quantizer import recipe

    _apply(recipe.dynamic_wi8_afp32(), source, target)


_BLOCK = 32
"""How many weights in four bits share a scale."""


def quantize_weights_to_four_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store what fully connected layers and embeddings hold in four bits, all else as `quantize_weights` does.

    So it is of those, too, whose rows do not divide into blocks.

    Raises:
        RuntimeError: no row does.
    """
    from ai_edge_quantizer import recipe
    from ai_edge_quantizer.qtyping import TFLOperationName

    rules = [
        rule
        for kind in (TFLOperationName.FULLY_CONNECTED, TFLOperationName.EMBEDDING_LOOKUP)
        for name in _in_blocks(source, kind.value)
        for rule in recipe.dynamic_wi4b32_afp32(operation_name=kind, regex=f"^{re.escape(name)};")
    ]
    if not rules:
        raise RuntimeError(
            f"LiteRT takes four bits in fully connected layers and embeddings whose rows are a multiple of {_BLOCK} "
            "long, and the model has none; take tflite-w8"
        )
    _apply([*recipe.dynamic_wi8_afp32(), *rules], source, target)


def _in_blocks(path: Path, kind: str) -> list[str]:
    """The outputs of those operations of a kind whose weights are rows of whole blocks."""
    return [
        each.tensors[-1]["name"]
        for each in operations(path)
        if each.kind == kind and any(len(w["shape"]) == 2 and w["shape"][-1] % _BLOCK == 0 for w in each.constants)
    ]


def _apply(recipe: Any, source: Path, target: Path) -> None:
    """Quantize a file by a recipe that needs no number ranges."""
    from ai_edge_quantizer import quantizer

    quantizer.Quantizer(str(source), recipe).quantize().export_model(str(target), overwrite=True)


def quantize(
    source: Path, target: Path, spec: ExportSpec, *, prepare: Callable[[Arrays], Arrays] = lambda arrays: arrays
) -> None:
    """Quantize weights and activations of a float32 file to int8, as far as there are int8 operators.

    `prepare` brings a batch into the artifact's layout.
    """
    from ai_edge_quantizer import quantizer, recipe, recipe_manager
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    interpreter = _interpreter(source, threads=1)
    (signature,) = interpreter.get_signature_list()
    details = interpreter.get_signature_runner(signature).get_input_details()
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe.static_wi8_ai8())
    # the range of all batches; by default it is a moving average, which one row after another leaves far too narrow
    ranges = Calibrator(str(source), num_threads=1, qsv_update_func=min_max_update)
    batches = [_to_artifact(prepare(arrays), details) for arrays in calibration(spec)]
    ranges.calibrate({signature: batches}, manager)
    work = quantizer.Quantizer(str(source), manager.get_quantization_recipe())
    work.quantize(ranges.get_model_qsvs()).export_model(str(target), overwrite=True)
    _settle_outputs(target)


def _settle_outputs(path: Path) -> None:
    """Let the graph return the tensors that its signature names.

    The quantizer returns a float32 copy instead where the model reads its own output, as for an argmax beside the
    logits; an interpreter with a delegate then finds nothing under the signature's name.
    """
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    model = flatbuffers.read_model(str(path))
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        copy_of = {each.outputs[0]: each.inputs[0] for each in graph.operators}
        named = {each.tensorIndex for each in signature.outputs}
        graph.outputs = [index if index in named else copy_of[index] for index in graph.outputs]
    flatbuffers.write_model(model, str(path))


# --- running ----------------------------------------------------------------------------------------------------------

Detail = Mapping[str, Any]
"""What the interpreter tells of a tensor."""


class Interpreted:
    """A file in LiteRT's interpreter, on the CPU but for what a `delegate` takes, the library of an accelerator.

    Attributes:
        signature: The artifact's own.
    """

    def __init__(self, path: Path, spec: ExportSpec, *, threads: int, delegate: Any = None) -> None:
        self._runner = _interpreter(path, threads=threads, delegate=delegate).get_signature_runner()
        self._in: Mapping[str, Detail] = self._runner.get_input_details()
        self._out: Mapping[str, Detail] = self._runner.get_output_details()
        self._spec = spec
        self.signature = ExportSpec(
            tuple(_described(tensor, self._in) for tensor in spec.inputs),
            tuple(_described(tensor, self._out) for tensor in spec.outputs),
        )

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run it on PyTorch's inputs; an output that is quantized comes back as float32."""
        answer = self._runner(**_to_artifact(inputs, self._in))
        return {
            tensor.name: _from_artifact(answer[tensor.name], self._out[tensor.name], tensor.dtype)
            for tensor in self._spec.outputs
        }


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with LiteRT's interpreter on the CPU."""
    run = Interpreted(path, spec, threads=threads)
    return Loaded(run, run.signature)


def load_int8(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """The same, and tell which of its operators are not in int8."""
    return _telling(load(path, spec, threads=threads), path, float_operations(path))


def load_weights(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """The same, and tell which of its weights are not in integers."""
    return _telling(load(path, spec, threads=threads), path)


def _telling(loaded: Loaded, path: Path, *also: str) -> Loaded:
    """With what stayed in float as a remark, or where that is most of it as a shortfall."""
    weights, total, kinds = float_weights(path)
    left = in_float(weights, total, f"since there is no int8 for them: {kinds}", *also)
    return replace(loaded, remark=left.remark, shortfall=left.shortfall)


class Operation(NamedTuple):
    """One operation of a file's main graph: what it computes with and what it gives, and its constants."""

    kind: str
    tensors: list[Detail]
    constants: list[Detail]


def operations(path: Path) -> list[Operation]:
    """The operations of a file's main graph in order."""
    interpreter = _interpreter(path, threads=1)
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    listed = interpreter._get_ops_details()  # the interpreter tells it nowhere else
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
    """What each operation gives in LiteRT's own kernels, without XNNPACK, which keeps its tensors to itself."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(path),
        num_threads=threads,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    runner = interpreter.get_signature_runner()
    runner(**_to_artifact(inputs, runner.get_input_details()))
    given = {detail["index"] for detail in interpreter.get_input_details()}
    tensors = {detail["index"]: detail for each in operations(path) for detail in each.tensors}
    return {
        f"{detail['name']}:{index}": array
        for index, detail in tensors.items()
        if index not in given
        and (array := _from_artifact(interpreter.get_tensor(index), detail, "float32")).dtype.kind == "f"
    }


_COMPUTE_NOTHING = ("DEQUANTIZE", "QUANTIZE", "SHAPE")


def float_operations(path: Path) -> str:
    """Which operators compute in float32, in words; empty where none does."""
    found = Counter(
        each.kind
        for each in operations(path)
        if each.kind not in _COMPUTE_NOTHING and any(tensor["dtype"] == np.float32 for tensor in each.tensors)
    )
    return f"in float32, since there is no int8 for it: {counted(found)}" if found else ""


def float_weights(path: Path) -> tuple[int, int, str]:
    """How many numbers of its weights are in float32, how many there are, and which operators have those in float32."""
    weights = [
        (each.kind, int(np.prod(weight["shape"])), weight["dtype"] == np.float32)
        for each in operations(path)
        for weight in each.constants
        if is_weight(weight["shape"])
    ]
    found = Counter(kind for kind, _, is_float in weights if is_float)
    return sum(size for _, size, is_float in weights if is_float), sum(size for _, size, _ in weights), counted(found)


def _interpreter(path: Path, *, threads: int, delegate: Any = None) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path), num_threads=threads, experimental_delegates=[delegate] if delegate else None)


def _described(tensor: TensorSpec, details: Mapping[str, Detail]) -> TensorSpec:
    """As the artifact has it; an input that the artifact does not read stays as it is."""
    found = details.get(tensor.name)
    return replace(tensor, dtype=np.dtype(found["dtype"]).name) if found else tensor


def _to_artifact(inputs: Arrays, details: Mapping[str, Detail]) -> Arrays:
    """PyTorch's arrays as the artifact takes them: narrowed, or quantized with its own scale."""
    given = {}
    for name, detail in details.items():
        array, dtype, scales = inputs[name], np.dtype(detail["dtype"]), _scales(detail)
        if scales.size and array.dtype.kind == "f":
            limits = np.iinfo(detail["dtype"])
            array = np.clip(np.round(array / scales) + _zeros(detail), limits.min, limits.max)
        given[name] = np.ascontiguousarray(array, dtype)
    return given


def _from_artifact(array: np.ndarray, detail: Detail, dtype: str) -> np.ndarray:
    """An output in PyTorch's dtype; one of another kind stays as it is, for parity to see."""
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
batch = np.load("validation_batch.npz")


def quantized(x, detail):  # int8 counts steps of a scale from a zero point
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
    """The route, with labels and metadata as files in an archive behind the model, where TensorFlow's tools look.

    https://ai.google.dev/edge/litert/conversion/tensorflow/metadata (associated files)
    """

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        route.convert(source, target, spec)
        with ZipFile(target, "a") as archive:
            for name, text in spec.extra_files.items():
                archive.writestr(ZipInfo(name), text)

    return replace(route, convert=convert)


def _format(name: str, precision: Precision, description: str, *routes: Route, **more: Any) -> Format:
    defaults: dict[str, Any] = {"load": load, "intermediates": intermediates, "targets": ("phone",)}
    return Format(
        name=name,
        aliases=(name.replace("tflite", "litert"),),
        description=description,
        url=URL,
        artifact=ARTIFACT,
        precision=precision,
        routes=tuple(map(packed, routes)),
        runtime="tflite",
        snippets=SNIPPETS,
        on_device=OnDevice(("ai-edge-litert",)),
        **(defaults | more),
    )


FORMATS = (
    _format(
        "tflite",
        "float32",
        "TensorFlow Lite (LiteRT) model, for phones and small devices",
        Route("litert-torch", "pt2", "litert", convert_program, static=True),
        Route("tensorflow", "saved_model", "tensorflow", convert_saved_model),
    ),
    _format(
        "tflite-fp16",
        "float16",
        "TensorFlow Lite model with its weights in float16, half the size",
        Route("quantizer", "tflite", "tflite", halve),
        Route("tensorflow", "saved_model", "tensorflow", halve_saved_model),
    ),
    _format(
        "tflite-w8",
        "w8",
        "TensorFlow Lite model with int8 weights, for phones' CPUs and GPUs",
        Route("quantizer", "tflite", "tflite", quantize_weights),
        Route("tensorflow", "saved_model", "tensorflow", quantize_weights_of_saved_model),
        load=load_weights,
    ),
    _format(
        "tflite-w4",
        "w4",
        "TensorFlow Lite model with fully connected layers in four bits, for large transformers on phones",
        Route("quantizer", "tflite", "tflite", quantize_weights_to_four_bits),
        load=load_weights,
    ),
    _format(
        "tflite-int8",
        "int8",
        "TensorFlow Lite model in int8, calibrated with validation batches",
        Route("quantizer", "tflite", "tflite", quantize),
        Route("tensorflow", "saved_model", "tensorflow", quantize_saved_model),
        load=load_int8,
        calibrated=True,
        slow_because="LiteRT advises static int8 for NPUs, and int8 weights alone for CPUs",
        targets=("phone", "microcontroller"),
    ),
)
