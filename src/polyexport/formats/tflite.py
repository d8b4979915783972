"""TensorFlow Lite, now LiteRT: one file for phones and small devices; in float32, float16 and lower precisions.

https://ai.google.dev/edge/litert

Requirements:
* Only LiteRT's own operators are used. A model that needs TensorFlow's too (`SELECT_TF_OPS`) fails, since a device with
  only the interpreter could not run it.
* The report shows the artifact's own dtypes: a route may narrow int64 to int32, and int8 takes quantized inputs. The
  runner takes PyTorch's and converts.
* Ranges for quantization come from real batches, `spec.calibration`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile, ZipInfo

import numpy as np

from polyexport.format import Format, Loaded, OnDevice, Route, Snippet
from polyexport.formats.saved_model import SIGNATURE
from polyexport.measure.weights import counted, in_float, in_four_bits, is_weight
from polyexport.spec import Arrays, ExportSpec, Precision, Runner, TensorSpec, calibration
from polyexport.tracing.exported_program import in_float32, load_program
from polyexport.tracing.fake_quantization import quantize_in_graph, quantized_module

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


def keep_trained_scales(source: Path, target: Path, spec: ExportSpec, *, channels_last: bool = False) -> None:
    """Lower the program with the scales of the fake quantization that it was trained with; static shapes only."""
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    module = quantized_module(source)
    quantize_in_graph(module)
    settings = QuantConfig(PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    lower(module, target, spec, channels_last=channels_last, quantized=settings)


def convert_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Convert the SavedModel with TensorFlow's own converter, dynamic axes included."""
    target.write_bytes(_converted(_converter(source)))


def halve_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `convert_saved_model`, with weights in float16."""
    import tensorflow as tf

    converter = _converter(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    target.write_bytes(_converted(converter))


def quantize_weights_of_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `convert_saved_model`, with weights in int8; the runtime quantizes activations at run time."""
    import tensorflow as tf

    converter = _converter(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    target.write_bytes(_converted(converter))


def quantize_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `convert_saved_model`, with weights and activations in int8, and inputs and outputs."""
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
    _apply(manager.get_quantization_recipe(), source, target)


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights of a float32 file in int8; the runtime quantizes activations at run time."""
    from ai_edge_quantizer import recipe

    _apply(recipe.dynamic_wi8_afp32(), source, target)
    _store_tables(target)


_BLOCK = 32
"""The number of four-bit weights per scale, where a row is divisible into blocks."""

_LEAST_SCALE = 2.0**-17
"""Scales of blocks are in half precision, which has less than 7 bits of smaller ones."""


def quantize_weights_to_four_bits(
    source: Path, target: Path, spec: ExportSpec, *, rows: bool = False, convolutions: bool = False
) -> None:
    """Store weights of fully connected layers and embeddings in four bits, in blocks; all others in int8.

    Args:
        source: The file in float32.
        target: The file.
        spec: Its signature.
        rows: Whether to store those that are not divisible into blocks in four bits too, with a scale for each row.
        convolutions: Whether to store those of convolutions so too, except depthwise ones.

    Raises:
        RuntimeError: there are no such weights.
    """
    from ai_edge_quantizer import recipe
    from ai_edge_quantizer.qtyping import TFLOperationName

    kinds = [TFLOperationName.FULLY_CONNECTED, TFLOperationName.EMBEDDING_LOOKUP]
    if convolutions:
        kinds.append(TFLOperationName.CONV_2D)
    by_name, in_blocks, rules = {kind.value: kind for kind in kinds}, _in_blocks(source), []
    for each in (each for each in operations(source) if each.constants and each.kind in by_name):
        name = each.tensors[-1]["name"]
        if name in in_blocks or rows:
            rule = recipe.dynamic_wi4b32_afp32 if name in in_blocks else recipe.dynamic_wi4c_afp32
            rules += rule(operation_name=by_name[each.kind], regex=f"^{re.escape(name)};")
    if not rules:
        raise RuntimeError(
            f"LiteRT supports four bits in {', '.join(by_name)}, and the model has none"
            f"{'' if rows else f' with rows of blocks of {_BLOCK}'}; use tflite-w8"
        )
    _apply([*recipe.dynamic_wi8_afp32(), *rules], source, target)
    _store_tables(target)


def _in_blocks(path: Path) -> list[str]:
    """The outputs of operations whose weights are divisible into blocks, each with a scale that its type can have."""
    interpreter = _interpreter(path, threads=1)
    found = []
    for each in operations(path):
        for weight in each.constants:
            if len(weight["shape"]) == 2 and weight["shape"][-1] % _BLOCK == 0:
                blocks = np.abs(interpreter.get_tensor(weight["index"])).reshape(-1, _BLOCK)
                if blocks.max(1).min() / 7 >= _LEAST_SCALE:
                    found.append(each.tensors[-1]["name"])
    return found


def _store_tables(path: Path) -> None:
    """Store the tables that GATHER reads rows of, such as embeddings, in int8, and dequantize the rows.

    The quantizer has no rule for GATHER. A table has one scale, as the operator needs it.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    model = flatbuffers.read_model(str(path))
    (graph, *_), codes = model.subgraphs, model.operatorCodes
    gathers = [each for each in graph.operators if _code(codes[each.opcodeIndex]) == schema.BuiltinOperator.GATHER]
    others = {index for each in graph.operators if each not in gathers for index in each.inputs}
    known: set[int] = set()
    for each in gathers:
        table = graph.tensors[each.inputs[0]]
        data = model.buffers[table.buffer].data
        if each.inputs[0] not in known:
            if table.type != schema.TensorType.FLOAT32 or data is None or not is_weight(table.shape):
                continue
            if each.inputs[0] in others:
                continue
            numbers = np.frombuffer(bytes(data), np.float32)
            scale = max(float(np.abs(numbers).max()), float(np.finfo(np.float32).tiny)) / 127
            model.buffers[table.buffer].data = np.round(numbers / scale).astype(np.int8).view(np.uint8)
            table.type, table.quantization = schema.TensorType.INT8, schema.QuantizationParametersT()
            table.quantization.scale, table.quantization.zeroPoint = [scale], [0]
            known.add(each.inputs[0])
        rows = copy(graph.tensors[each.outputs[0]])
        rows.name, rows.type, rows.quantization = rows.name + b"_int8", table.type, table.quantization
        graph.tensors.append(rows)
        dequantize = schema.OperatorT()
        dequantize.opcodeIndex = _opcode(codes, schema.BuiltinOperator.DEQUANTIZE)
        dequantize.inputs, dequantize.outputs = [len(graph.tensors) - 1], list(each.outputs)
        each.outputs = dequantize.inputs
        graph.operators.insert(graph.operators.index(each) + 1, dequantize)
    flatbuffers.write_model(model, str(path))


def _code(code: Any) -> int:
    """The number of an operator, which older files have in a field of one byte."""
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def _opcode(codes: list[Any], number: int) -> int:
    """The index of an operator in a file's list of operators, to which it is added if it is not there."""
    from ai_edge_litert import schema_py_generated as schema

    for index, code in enumerate(codes):
        if _code(code) == number:
            return index
    added = schema.OperatorCodeT()
    added.builtinCode, added.deprecatedBuiltinCode, added.version = number, min(number, 127), 2
    codes.append(added)
    return len(codes) - 1


def _apply(recipe: Any, source: Path, target: Path) -> None:
    """Quantize a file by a recipe without calibration."""
    from ai_edge_quantizer import quantizer

    quantizer.Quantizer(str(source), recipe).quantize().export_model(str(target), overwrite=True)


def quantize(
    source: Path, target: Path, spec: ExportSpec, *, prepare: Callable[[Arrays], Arrays] = lambda arrays: arrays
) -> None:
    """Quantize weights and activations of a float32 file to int8, as far as there are int8 operators.

    `prepare` converts a batch to the artifact's layout.
    """
    from ai_edge_quantizer import quantizer, recipe, recipe_manager
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    interpreter = _interpreter(source, threads=1)
    (signature,) = interpreter.get_signature_list()
    details = interpreter.get_signature_runner(signature).get_input_details()
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe.static_wi8_ai8())
    # the range over all batches; the default is a moving average, which is far too narrow for single rows
    ranges = Calibrator(str(source), num_threads=1, qsv_update_func=min_max_update)
    batches = [_to_artifact(prepare(arrays), details) for arrays in calibration(spec)]
    ranges.calibrate({signature: batches}, manager)
    work = quantizer.Quantizer(str(source), manager.get_quantization_recipe())
    work.quantize(ranges.get_model_qsvs()).export_model(str(target), overwrite=True)
    _settle_outputs(target)


def _settle_outputs(path: Path) -> None:
    """Make the graph return the tensors that its signature names.

    If the model reads its own output, as for an argmax besides the logits, the quantizer returns a float32 copy
    instead; an interpreter with a delegate then finds no tensor under the signature's name.
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
"""The interpreter's details of a tensor."""


class Interpreted:
    """A file in LiteRT's interpreter, on the CPU, except operations that a `delegate` (an accelerator's library) runs.

    Attributes:
        signature: The artifact's own signature.
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
        """Run it on PyTorch's inputs; quantized outputs are returned as float32."""
        return self._answered(self._runner, inputs)

    def compiled(self, path: Path, *, threads: int) -> Runner:
        """The same by LiteRT's `CompiledModel`; the interpreter runs too, since only it knows the outputs' shapes."""
        return partial(self._answered, partial(_run_compiled, _compiled(path, threads=threads), self._runner))

    def _answered(self, runner: Callable[..., Arrays], inputs: Arrays) -> Arrays:
        answer = runner(**_to_artifact(inputs, self._in))
        return {
            tensor.name: _from_artifact(answer[tensor.name], self._out[tensor.name], tensor.dtype)
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


def load_int8(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a remark on operators that are not in int8."""
    return _telling(load(path, spec, threads=threads), path, float_operations(path))


def load_weights(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a remark on weights that are not in integers."""
    return _telling(load(path, spec, threads=threads), path)


def load_w4(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a remark on the shares of the weights in 4 and 8 bits."""
    loaded, in_4_bits = load(path, spec, threads=threads), _in_4_bits(path)
    weights = (weight for each in operations(path) for weight in each.constants if is_weight(weight["shape"]))
    four = sum(int(np.prod(weight["shape"])) for weight in weights if weight["index"] in in_4_bits)
    in_floats, total, kinds = float_weights(path)
    why = f"since int8 is not supported for them: {kinds}"
    left = in_four_bits(four, total - in_floats - four, in_floats, why)
    return replace(loaded, remark=left.remark, shortfall=left.shortfall)


def _in_4_bits(path: Path) -> set[int]:
    """The indices of the main graph's tensors in 4 bits, which the interpreter shows as int8."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.Model.GetRootAs(path.read_bytes()).Subgraphs(0)
    return {index for index in range(graph.TensorsLength()) if graph.Tensors(index).Type() == schema.TensorType.INT4}


def _telling(loaded: Loaded, path: Path, *also: str) -> Loaded:
    """Add what stays in float as a remark, or as a shortfall if that is most of it."""
    weights, total, kinds = float_weights(path)
    left = in_float(weights, total, f"since int8 is not supported for them: {kinds}", *also)
    return replace(loaded, remark=left.remark, shortfall=left.shortfall)


class Operation(NamedTuple):
    """One operation of a file's main graph: its inputs, outputs and constants."""

    kind: str
    tensors: list[Detail]
    constants: list[Detail]


def operations(path: Path) -> list[Operation]:
    """The operations of a file's main graph in order."""
    interpreter = _interpreter(path, threads=1)
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
    """A remark on operators that compute in float32; empty if there are none."""
    found = Counter(
        each.kind
        for each in operations(path)
        if each.kind not in _COMPUTE_NOTHING and any(tensor["dtype"] == np.float32 for tensor in each.tensors)
    )
    return f"in float32, since int8 is not supported for it: {counted(found)}" if found else ""


def float_weights(path: Path) -> tuple[int, int, str]:
    """The number of elements of weights in float32, of all weights, and the operators of those in float32."""
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
    """The artifact's signature of a tensor; unchanged for an input that the artifact does not read."""
    found = details.get(tensor.name)
    return replace(tensor, dtype=np.dtype(found["dtype"]).name) if found else tensor


def _to_artifact(inputs: Arrays, details: Mapping[str, Detail]) -> Arrays:
    """PyTorch's arrays in the artifact's dtypes: narrowed, or quantized with its scale."""
    given = {}
    for name, detail in details.items():
        array, dtype, scales = inputs[name], np.dtype(detail["dtype"]), _scales(detail)
        if scales.size and array.dtype.kind == "f":
            limits = np.iinfo(detail["dtype"])
            array = np.clip(np.round(array / scales) + _zeros(detail), limits.min, limits.max)
        given[name] = np.asarray(array, dtype, order="C")
    return given


def _from_artifact(array: np.ndarray, detail: Detail, dtype: str) -> np.ndarray:
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


def _format(name: str, precision: Precision, description: str, *routes: Route, **more: Any) -> Format:
    defaults: dict[str, Any] = {"load": load, "intermediates": intermediates, "targets": ("phone",)}
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
        Route("each row", "tflite", "tflite", partial(quantize_weights_to_four_bits, rows=True)),
        Route(
            *("convolutions too", "tflite", "tflite"),
            partial(quantize_weights_to_four_bits, rows=True, convolutions=True),
        ),
        load=load_w4,
    ),
    _format(
        "tflite-int8",
        "int8",
        "TensorFlow Lite model in int8, calibrated with validation batches",
        Route("trained scales", "pt2", "litert", keep_trained_scales, static=True, trained=True),
        Route("quantizer", "tflite", "tflite", quantize),
        Route("tensorflow", "saved_model", "tensorflow", quantize_saved_model),
        load=load_int8,
        calibrated=True,
        slow_because="LiteRT recommends static int8 for NPUs, and int8 weights only for CPUs",
        targets=("phone", "microcontroller"),
    ),
)
