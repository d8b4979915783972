"""TensorFlow Lite with int8 and 4-bit weights, and in int8, by AI Edge Quantizer or TensorFlow's own converter.

https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/post_training_quantization

Requirements:
* The weights of `w8` and `w4` are integers; the runtime quantizes activations at run time.
* int8 takes quantized inputs. Ranges come from real batches, `spec.calibration`: the widest, or averages, which are
  better for a transformer's rare large values. A model trained with fake quantization keeps its scales instead.
* A remark says which weights and operators stay in float.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.format import Loaded, Route, trained_routes
from polyexport.formats.saved_model import SIGNATURE
from polyexport.formats.tflite import (
    apply_recipe,
    converted,
    converter_of,
    from_artifact,
    interpreter_of,
    load,
    lower,
    operations,
    tflite_format,
    to_artifact,
)
from polyexport.measure.drafts import Draft, best, distance, partly
from polyexport.measure.ranges import Step, too_narrow
from polyexport.measure.weights import counted, in_float, in_four_bits, is_weight
from polyexport.spec import Arrays, ExportSpec, calibration
from polyexport.tracing.fake_quantization import quantize_in_graph
from polyexport.tracing.missing_scales import module_with_all_scales

# --- weights in integers ----------------------------------------------------------------------------------------------


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights of a float32 file in int8; the runtime quantizes activations at run time."""
    from ai_edge_quantizer import recipe

    apply_recipe(recipe.dynamic_wi8_afp32(), source, target)
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
    found = _quantizable(source, convolutions=convolutions)
    if not any(rows or each.in_blocks for each in found.values()):
        raise RuntimeError(
            f"LiteRT supports four bits in {', '.join(kind.value for kind in _kinds(convolutions))}, and the model has "
            f"none{'' if rows else f' with rows of blocks of {_BLOCK}'}; use tflite-w8"
        )
    _store(source, target, [name for name, each in found.items() if rows or each.in_blocks], found)


def quantize_some_weights_to_four_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the cheapest weights in four bits, at least half of them, and the costliest in int8.

    Raises:
        RuntimeError: fewer than half of the weights can be in four bits.
    """
    found = _quantizable(source, convolutions=True)
    sizes, batches = {name: each.size for name, each in found.items()}, list(calibration(spec))
    expected, (_, total, _) = _answers(source, batches), float_weights(source)
    if 2 * sum(sizes.values()) < total:
        raise RuntimeError("LiteRT supports four bits in fewer than half of the weights; use tflite-w8")

    def make(names: Collection[str]) -> Draft:
        _store(source, target, names, found)
        return Draft(target.read_bytes(), "", distance(expected, _answers(target, batches)))

    target.write_bytes(partly(sizes, total, make).model)


@dataclass(frozen=True, slots=True)
class _Quantizable:
    """The weight of an operation that LiteRT has in four bits, and whether it is divisible into blocks."""

    kind: str
    size: int
    in_blocks: bool


def _kinds(convolutions: bool) -> list[Any]:
    """The operations whose weights LiteRT has in four bits."""
    from ai_edge_quantizer.qtyping import TFLOperationName

    kinds = [TFLOperationName.FULLY_CONNECTED, TFLOperationName.EMBEDDING_LOOKUP]
    return [*kinds, TFLOperationName.CONV_2D] if convolutions else kinds


def _quantizable(source: Path, *, convolutions: bool) -> dict[str, _Quantizable]:
    """The weights that LiteRT has in four bits, by the first output of their operation; tables as one."""
    kinds, in_blocks = {kind.value for kind in _kinds(convolutions)}, _in_blocks(source)
    found, tables = {}, 0
    for each in (each for each in operations(source) if each.constants):
        size, name = max(int(np.prod(weight["shape"])) for weight in each.constants), each.tensors[-1]["name"]
        if each.kind in kinds:
            found[name] = _Quantizable(each.kind, size, name in in_blocks)
        elif each.kind == "GATHER" and each.constants[0]["dtype"] == np.float32:
            tables += size
    return found | ({_TABLES: _Quantizable("GATHER", tables, False)} if tables else {})


_TABLES = "the tables that GATHER reads"


def _store(source: Path, target: Path, names: Collection[str], found: Mapping[str, _Quantizable]) -> None:
    """Write the file with these weights in four bits, and all others in int8."""
    from ai_edge_quantizer import recipe

    kinds, rules = {kind.value: kind for kind in _kinds(True)}, []
    for name in (each for each in names if each != _TABLES):
        rule = recipe.dynamic_wi4b32_afp32 if found[name].in_blocks else recipe.dynamic_wi4c_afp32
        rules += rule(operation_name=kinds[found[name].kind], regex=f"^{re.escape(name)};")
    apply_recipe([*recipe.dynamic_wi8_afp32(), *rules], source, target)
    _store_tables(target, 4 if _TABLES in names else 8)


def _in_blocks(path: Path) -> list[str]:
    """The outputs of operations whose weights are divisible into blocks, each with a scale that its type can have."""
    interpreter = interpreter_of(path, threads=1)
    found = []
    for each in operations(path):
        for weight in each.constants:
            if len(weight["shape"]) == 2 and weight["shape"][-1] % _BLOCK == 0:
                blocks = np.abs(interpreter.get_tensor(weight["index"])).reshape(-1, _BLOCK)
                if blocks.max(1).min() / 7 >= _LEAST_SCALE:
                    found.append(each.tensors[-1]["name"])
    return found


def _store_tables(path: Path, bits: int = 8) -> None:
    """Store the tables that GATHER reads rows of, such as embeddings, in int8 or four bits, and dequantize the rows.

    The quantizer has no rule for GATHER. A table has one scale, as the operator needs it. In four bits a byte has two
    numbers, so rows of an odd number are in int8.
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
            is_packed = bits == 4 and table.shape[-1] % 2 == 0
            numbers = np.frombuffer(bytes(data), np.float32)
            scale = max(float(np.abs(numbers).max()), float(np.finfo(np.float32).tiny)) / (7 if is_packed else 127)
            stored = np.round(numbers / scale).astype(np.int8).view(np.uint8)
            model.buffers[table.buffer].data = stored[::2] & 15 | stored[1::2] << 4 if is_packed else stored
            table.type = schema.TensorType.INT4 if is_packed else schema.TensorType.INT8
            table.quantization = schema.QuantizationParametersT()
            table.quantization.scale, table.quantization.zeroPoint = [scale], [0]
            known.add(each.inputs[0])
        rows = copy(graph.tensors[each.outputs[0]])
        rows.name, rows.type, rows.quantization = rows.name + b"_in_integers", table.type, table.quantization
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


def quantize_weights_of_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `convert_saved_model`, with weights in int8; the runtime quantizes activations at run time."""
    import tensorflow as tf

    converter = converter_of(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    target.write_bytes(converted(converter))


# --- weights and activations in int8 ----------------------------------------------------------------------------------


def quantize(
    source: Path, target: Path, spec: ExportSpec, *, prepare: Callable[[Arrays], Arrays] = lambda arrays: arrays
) -> None:
    """Quantize weights and activations of a float32 file to int8, as far as there are int8 operators.

    Ranges are taken in two ways, of which the one with the smaller error of the outputs on the batches is kept.

    Args:
        source: The file in float32.
        target: The file.
        spec: Its signature, with batches to calibrate with.
        prepare: Converts a batch to the artifact's layout.
    """
    from ai_edge_quantizer.utils.qsv_utils import min_max_update, moving_average_update

    batches = [prepare(arrays) for arrays in calibration(spec)]
    expected = _answers(source, batches)
    drafts = []
    for how, update in (("of all batches", min_max_update), ("averaged", moving_average_update)):
        _quantize(source, target, batches, update)
        drafts.append(Draft(target.read_bytes(), how, distance(expected, _answers(target, batches))))
        print(f"ranges {how}: relative error {drafts[-1].error:.3g}")
    target.write_bytes(best(drafts).model)


def _quantize(source: Path, target: Path, batches: Sequence[Arrays], update: Any) -> None:
    """Quantize with the ranges of batches; `update` joins those of a batch to those of the batches before it."""
    from ai_edge_quantizer import quantizer, recipe, recipe_manager
    from ai_edge_quantizer.calibrator import Calibrator

    interpreter = interpreter_of(source, threads=1)
    (signature,) = interpreter.get_signature_list()
    details = interpreter.get_signature_runner(signature).get_input_details()
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe.static_wi8_ai8())
    ranges = Calibrator(str(source), num_threads=1, qsv_update_func=update)
    ranges.calibrate({signature: [to_artifact(arrays, details) for arrays in batches]}, manager)
    found = ranges.get_model_qsvs()
    _widen(found, source)
    work = quantizer.Quantizer(str(source), manager.get_quantization_recipe())
    target.write_bytes(work.quantize(found).quantized_model)  # its own writer makes it executable
    _settle_outputs(target)


def _widen(found: dict[str, Any], source: Path) -> None:
    """Widen the ranges of tensors that are 0 in all batches, whose scales XNNPACK refuses."""
    steps = [
        Step([tensor["name"] for tensor in each.tensors[:-1]], each.tensors[-1]["name"], each.kind in ("ADD", "SUB"))
        for each in operations(source)
        if each.tensors
    ]
    computed = {name for step in steps for name in (*step.inputs, step.output)} & found.keys()
    known = {name: (float(np.min(found[name]["min"])), float(np.max(found[name]["max"]))) for name in computed}
    for name, most in too_narrow(known, steps).items():
        found[name]["max"] = np.full_like(found[name]["max"], most)


def _answers(path: Path, batches: Sequence[Arrays]) -> list[Arrays]:
    """What a file answers to batches; quantized outputs as float32."""
    runner = interpreter_of(path, threads=1).get_signature_runner()
    taken, returned = runner.get_input_details(), runner.get_output_details()
    return [
        {
            name: from_artifact(array, returned[name], "float32")
            for name, array in runner(**to_artifact(arrays, taken)).items()
        }
        for arrays in batches
    ]


def _settle_outputs(path: Path) -> None:
    """Make the graph return the tensors that its signature names.

    If the model reads its own output, as for an argmax besides the logits, the quantizer returns a float32 copy
    instead; an interpreter with a delegate then finds no tensor under the signature's name.
    """
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    model = flatbuffers.read_model(str(path))
    _read_integers(model)
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        copy_of = {each.outputs[0]: each.inputs[0] for each in graph.operators}
        named = {each.tensorIndex for each in signature.outputs}
        graph.outputs = [index if index in named else copy_of[index] for index in graph.outputs]
    flatbuffers.write_model(model, str(path))


def _read_integers(model: Any) -> None:
    """Make ARG_MAX and ARG_MIN read integers instead of the floats that these become, of which the same is largest."""
    from ai_edge_litert import schema_py_generated as schema

    codes, kinds = model.operatorCodes, schema.BuiltinOperator
    for graph in model.subgraphs:
        dequantized = {
            each.outputs[0]: each.inputs[0]
            for each in graph.operators
            if _code(codes[each.opcodeIndex]) == kinds.DEQUANTIZE
        }
        for each in graph.operators:
            if _code(codes[each.opcodeIndex]) in (kinds.ARG_MAX, kinds.ARG_MIN):
                first, *rest = each.inputs
                each.inputs = [dequantized.get(first, first), *rest]
        used = {index for each in graph.operators for index in each.inputs} | {*graph.outputs}
        graph.operators = [
            each
            for each in graph.operators
            if _code(codes[each.opcodeIndex]) != kinds.DEQUANTIZE or each.outputs[0] in used
        ]


def keep_trained_scales(
    source: Path, target: Path, spec: ExportSpec, *, calibrated: bool = False, channels_last: bool = False
) -> None:
    """Lower the program with the scales of the fake quantization that it was trained with; static shapes only.

    Args:
        source: The program.
        target: The file.
        spec: Its signature, with batches to calibrate with.
        calibrated: Whether scales that training left out are calibrated.
        channels_last: Whether images have channels last in the artifact.
    """
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    module = module_with_all_scales(source, spec, calibrated=calibrated)
    quantize_in_graph(module)
    settings = QuantConfig(PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    lower(module, target, spec, channels_last=channels_last, quantized=settings)


def quantize_saved_model(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `convert_saved_model`, with weights and activations in int8, and inputs and outputs."""
    import tensorflow as tf

    converter = converter_of(source)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ((SIGNATURE, arrays) for arrays in calibration(spec))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if all(np.dtype(tensor.dtype).kind == "f" for tensor in spec.inputs):
        converter.inference_input_type = tf.int8
    if all(np.dtype(tensor.dtype).kind == "f" for tensor in spec.outputs):
        converter.inference_output_type = tf.int8
    target.write_bytes(converted(converter))


# --- running ----------------------------------------------------------------------------------------------------------


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


FORMATS = (
    tflite_format(
        "tflite-w8",
        "w8",
        "TensorFlow Lite model with int8 weights, for phones' CPUs and GPUs",
        Route("quantizer", "tflite", "tflite", quantize_weights),
        Route("tensorflow", "saved_model", "tensorflow", quantize_weights_of_saved_model),
        load=load_weights,
        slow_because="XNNPACK has no depthwise convolution with int8 weights alone, and takes the ranges of other "
        "layers' activations at each call",
    ),
    tflite_format(
        "tflite-w4",
        "w4",
        "TensorFlow Lite model with fully connected layers in four bits, for large transformers on phones",
        Route("quantizer", "tflite", "tflite", quantize_weights_to_four_bits),
        Route("each row", "tflite", "tflite", partial(quantize_weights_to_four_bits, rows=True)),
        Route(
            *("convolutions too", "tflite", "tflite"),
            partial(quantize_weights_to_four_bits, rows=True, convolutions=True),
        ),
        Route("some in 8 bits", "tflite", "tflite", quantize_some_weights_to_four_bits),
        load=load_w4,
        calibrated=True,
    ),
    tflite_format(
        "tflite-int8",
        "int8",
        "TensorFlow Lite model in int8, calibrated with validation batches",
        *trained_routes("litert", keep_trained_scales, static=True),
        Route("quantizer", "tflite", "tflite", quantize),
        Route("tensorflow", "saved_model", "tensorflow", quantize_saved_model),
        load=load_int8,
        calibrated=True,
        slow_because="its caller converts inputs and outputs, which takes longer than a small model, and what XNNPACK "
        "lacks in int8 interrupts it; LiteRT recommends it for NPUs, and int8 weights only for CPUs",
        targets=("phone", "microcontroller"),
    ),
)
