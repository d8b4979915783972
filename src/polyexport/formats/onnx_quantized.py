"""ONNX in eight bits, by ONNX Runtime's quantizer: `onnx-int8`, for CPUs that convolve, and `onnx-w8`, for the others.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

Requirements:
* int8 is written as QuantizeLinear and DequantizeLinear around float operators (Q/DQ), with weights per channel, which
  every runtime of ONNX reads. Number ranges come from real batches; of three ways to take them that one is kept whose
  outputs are the nearest to the float model's on those batches. Where all are far, as for most transformers, matrices
  alone are quantized, and of those the costliest go back to float.
* Weights have seven bits where this machine's processor adds products of int8 in 16 bits, which eight would overflow.
* w8 multiplies matrices in int8 with ranges taken while it runs; weights of convolutions are stored in int8, and the
  convolution is float.
* What was trained with fake quantization has its scales, and takes none from batches.
* The file tells what in it stays float, in its metadata. That is no fault as long as most weights are in int8.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.format import Route
from polyexport.formats.onnx import onnx_format, opened, save, translate
from polyexport.measure.drafts import NEAR, Draft, best, distance, mended
from polyexport.measure.weights import counted, in_float, is_weight
from polyexport.spec import Arrays, ExportSpec, calibration
from polyexport.tracing.fake_quantization import with_trained_scales

if TYPE_CHECKING:
    import onnx

METHODS = ("MinMax", "Percentile", "Entropy")
"""How a range is taken, by ONNX Runtime's names: all values, all but the rarest, or those that lose the least."""

_MASK = 1e9
"""Numbers as great stand for infinity, as attention masks have them; a range with one has no steps left for others."""


def quantize(source: Path, target: Path, spec: ExportSpec, *, methods: Iterable[str] = METHODS) -> None:
    """Quantize weights and activations, in the way whose outputs are the nearest to the float model's."""
    import onnx

    expected = list(map(opened(source, threads=1), calibration(spec)))
    with tempfile.TemporaryDirectory() as folder:
        prepared, draft = _prepared(source, Path(folder)), Path(folder, "draft.onnx")
        found = dict(_all_ranges(prepared, spec, methods))

        def make(how: str, operators: Sequence[str], kept: Sequence[str] = (), alone: Sequence[str] = ()) -> Draft:
            model, most = _with_ranges(prepared, found[how], operators, kept, alone), 1 if alone else len(expected)
            save(model, draft, {})
            answers = map(opened(draft, threads=1), islice(calibration(spec), most))
            return Draft(model, how, distance(expected[:most], answers), tuple(kept))

        drafts = [make(how, _every_operator()) for how in found]
        if best(drafts).error > NEAR:
            drafts += [make(how, _MATRICES) for how in found]
        for each in drafts:
            print(f"ranges by {each.how}: relative error {each.error:.3g}")
        whole = onnx.load(prepared)
        chosen, mending = mended(drafts, _layers(whole), partial(make, best(drafts).how, _MATRICES), spec.in_float)
    left = in_float(*float_weights(chosen.model), "", float_operators(chosen.model))
    remarks = (f"ranges by {chosen.how.lower()}", seven_bits(), mending, left.remark)
    save(chosen.model, target, spec.embedded, *remarks, shortfall=left.shortfall)


def keep_trained_scales(source: Path, target: Path, spec: ExportSpec) -> None:
    """Translate the traced program with the scales of the fake quantization that it was trained with, as Q/DQ."""
    import onnx

    translate(with_trained_scales(source, spec), target, spec)
    model = onnx.load(target)
    _round_biases(model)
    if overflows():
        _count_from_zero(model)
    left = in_float(*float_weights(model), "", float_operators(model))
    save(model, target, spec.embedded, TRAINED, left.remark, shortfall=left.shortfall)


def _round_biases(model: onnx.ModelProto) -> None:
    """Store the bias of each product of integers in int32, in steps of its sums: else runtimes compute it in float."""
    from onnx import helper, numpy_helper

    constants = {each.name: each for each in model.graph.initializer}
    scales = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in [each for each in model.graph.node if each.op_type in _MATRICES and len(each.input) == 3]:
        names = (node.input[2], *(scales.get(name, "") for name in node.input[:2]))
        if not constants.keys() >= set(names):
            continue
        bias, x, weight = (numpy_helper.to_array(constants[name]) for name in names)
        scale = np.asarray(x * weight, np.float32)
        limits = np.iinfo(np.int32)
        steps = np.clip(np.round(bias / scale), limits.min, limits.max).astype(np.int32)
        parts = [f"{node.output[0]}_bias_{part}" for part in ("int32", "scale")]
        model.graph.initializer.extend(map(numpy_helper.from_array, (steps, scale), parts))
        node.input[2] = f"{node.output[0]}_bias"
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", parts, [node.input[2]], axis=0))
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [each for each in model.graph.initializer if each.name not in read]:
        model.graph.initializer.remove(tensor)


def _count_from_zero(model: onnx.ModelProto) -> None:
    """Put uint8 in the place of int8, all steps 128 higher: products of two uint8 are not added in 16 bits."""
    from onnx import TensorProto, numpy_helper

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            steps = numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(numpy_helper.from_array(steps.astype(np.uint8), tensor.name))
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.UINT8


TRAINED = "with the scales that it was trained with"


def _layers(prepared: onnx.ModelProto) -> dict[str, str]:
    """The nodes that multiply by weights, and the names of those."""
    constants = {tensor.name for tensor in prepared.graph.initializer}
    nodes = [node for node in named(prepared).graph.node if node.op_type in _MATRICES]
    return {node.name: node.input[1] for node in nodes if node.input[1] in constants}


def float_weights(model: onnx.ModelProto) -> tuple[int, int]:
    """How many numbers of a quantized model's weights are in float, and how many there are."""
    weights = [each for each in model.graph.initializer if is_weight(each.dims)]
    sizes = [(math.prod(each.dims), each.data_type == _FLOAT) for each in weights if each.data_type in (_FLOAT, *_INT8)]
    return sum(size for size, is_float in sizes if is_float), sum(size for size, _ in sizes)


_FLOAT, _INT8 = 1, (2, 3)  # onnx.TensorProto.FLOAT, UINT8 and INT8


def quantize_min_max(source: Path, target: Path, spec: ExportSpec) -> None:
    """The same by the least and the greatest values alone, which takes a fraction of the time and memory."""
    quantize(source, target, spec, methods=METHODS[:1])


def _prepared(source: Path, folder: Path) -> Path:
    """The model with constants folded and every shape inferred, as the quantizer wants it."""
    from onnxruntime.quantization import quant_pre_process

    prepared = folder / "prepared.onnx"
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception as error:  # symbolic inference lacks some operators, and raises whatever comes to its mind
        print(f"symbolic shapes are left out: {error}")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def ranges(source: Path, spec: ExportSpec, method: str = "MinMax") -> Any:
    """The `TensorsData` of ONNX Runtime: least and greatest value of each float tensor over all batches."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder, "augmented.onnx")
        calibrator = create_calibrator(source, None, str(beside), CalibrationMethod[method])
        wanted = {given.name for given in calibrator.infer_session.get_inputs()}
        for arrays in calibration(spec):
            # one after another: batches of different sizes make no array
            calibrator.collect_data(_Once({name: array for name, array in arrays.items() if name in wanted}))
        return calibrator.compute_data()


def _all_ranges(prepared: Path, spec: ExportSpec, methods: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """By each method that can: a histogram cannot have the infinities of an attention mask."""
    for method in methods:
        try:
            yield method, ranges(prepared, spec, method)
        except ValueError as error:
            if method == METHODS[0]:
                raise
            print(f"no ranges by {method}: {error}")


class _Once:
    """A batch in the shape of a `CalibrationDataReader`."""

    def __init__(self, batch: Arrays) -> None:
        self._left: list[Arrays] = [batch]

    def get_next(self) -> Arrays | None:
        return self._left.pop() if self._left else None


_MATRICES = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _every_operator() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def _with_ranges(
    prepared: Path, found: Any, operators: Sequence[str], kept: Sequence[str], alone: Sequence[str]
) -> onnx.ModelProto:
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    model = onnx.load(prepared)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=overflows(),
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,  # what processors have instructions for
        tensors_range=found,
        nodes_to_quantize=list(alone),
        nodes_to_exclude=[*kept, *(node.name for node in beyond(model, found, _MASK))],
        op_types_to_quantize=operators,
        extra_options={},
    )
    quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    return made


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, each of whose nodes has a name from now on, the same ones each time."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    return model


def beyond(model: onnx.ModelProto, found: Any, greatest: float) -> list[onnx.NodeProto]:
    """The nodes that read or write a number above `greatest`, on the batches of `ranges` or among their weights."""
    from onnx import numpy_helper

    magnitude = {name: float(np.abs(tensor.range_value).max()) for name, tensor in found.items()}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size:
            magnitude[tensor.name] = float(np.abs(array).max())
    return [
        node
        for node in named(model).graph.node
        if any(magnitude.get(name, 0.0) > greatest for name in (*node.input, *node.output))
    ]


def overflows() -> bool:
    """Whether this processor adds products of int8 in 16 bits: x86 without VNNI, or x86 that does not tell."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    told = Path("/proc/cpuinfo")
    return not (told.exists() and "vnni" in told.read_text(encoding="utf-8"))


def seven_bits() -> str:
    """What a report says of weights that have a bit less; empty where they have eight."""
    return "weights in 7 bits, since this processor has no VNNI" if overflows() else ""


_COMPUTE_NOTHING = (
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Shape", "Gather", "Slice", "Split", "Concat"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Pad", "Where"),
)


def float_operators(model: onnx.ModelProto) -> str:
    """Which operators of a Q/DQ graph compute in float32, in words; empty where none does."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    float32 = {
        value.name
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    quantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found = Counter(
        node.op_type
        for node in graph.node
        if node.op_type not in _COMPUTE_NOTHING
        and any(name in float32 and name not in quantized for name in node.input)
    )
    return f"in float32: {counted(found)}" if found else ""


# --- weights alone ----------------------------------------------------------------------------------------------------

_DYNAMIC = ("MatMul", "LSTM", "Attention", "Gather", "EmbedLayerNormalization")
"""Those whose weights are quantized."""

_CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}
"""Those whose weights are stored in int8, and the axis of the weight that the channels of the output lie on."""

_FEW = 256
"""Elements below which a weight stays float: scales and what computes with them cost more."""


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Quantize the weights; matrices are multiplied in int8, with the ranges of what comes in taken while it runs."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        prepared, draft = _prepared(source, Path(folder)), Path(folder, "draft.onnx")
        quantize_dynamic(
            prepared,
            draft,
            op_types_to_quantize=list(_DYNAMIC),
            per_channel=True,
            reduce_range=overflows(),
        )
        model = onnx.load(draft)
    stored = _store_convolutions(model)
    kept = "convolutions compute in float32, of weights that are stored in int8" if stored else ""
    left = in_float(*float_weights(model), "", kept)
    save(model, target, spec.embedded, seven_bits(), left.remark, shortfall=left.shortfall)


def _store_convolutions(model: onnx.ModelProto) -> int:
    """Store the weights of convolutions in int8, per channel, under the names that they have; tells how many."""
    from onnx import helper, numpy_helper

    graph = model.graph
    axes = {node.input[1]: _CONVOLUTIONS[node.op_type] for node in graph.node if node.op_type in _CONVOLUTIONS}
    weights = [each for each in graph.initializer if each.name in axes and np.prod(each.dims) >= _FEW]
    for tensor in weights:
        array, axis = numpy_helper.to_array(tensor), axes[tensor.name]
        others = tuple(index for index in range(array.ndim) if index != axis)
        scale = np.maximum(np.abs(array).max(others), np.finfo(np.float32).tiny) / np.float32(127)
        steps = np.round(array / np.expand_dims(scale, others)).astype(np.int8)
        parts = [f"{tensor.name}_int8", f"{tensor.name}_scale"]
        graph.initializer.remove(tensor)
        graph.initializer.extend(map(numpy_helper.from_array, (steps, scale), parts))
        graph.node.insert(0, helper.make_node("DequantizeLinear", parts, [tensor.name], axis=axis))
    return len(weights)


_URL = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"

FORMATS = (
    onnx_format(
        "onnx-int8",
        "ONNX graph in int8 (Q/DQ), calibrated with validation batches",
        _URL,
        Route("trained scales", "pt2", "onnx", keep_trained_scales, trained=True),
        Route("onnxruntime", "onnx", "onnx", quantize, mends=True),
        Route("onnxruntime-minmax", "onnx", "onnx", quantize_min_max, mends=True),
        precision="int8",
        calibrated=True,
    ),
    onnx_format(
        "onnx-w8",
        "ONNX graph with its weights in int8, for transformers and recurrent networks on CPUs",
        _URL,
        Route("onnxruntime", "onnx", "onnx", quantize_weights),
        precision="w8",
    ),
)
