"""ONNX in eight bits, by ONNX Runtime's quantizer: `onnx-int8`, for convolutional networks on CPUs, and `onnx-w8`.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

Requirements:
* int8 is written as QuantizeLinear and DequantizeLinear around float operators (Q/DQ), with weights per channel, which
  every runtime of ONNX supports. It is calibrated with real batches in three ways, of which the one with the smallest
  error of the outputs on those batches is kept. If all errors are large, as for most transformers, only matrices are
  quantized, and the costliest of those stay in float.
* Weights have seven bits if this machine's processor adds int8 products in 16 bits, which eight would overflow.
* w8 multiplies matrices in int8 with ranges taken at run time; weights of convolutions and recurrent layers are stored
  in int8, and the layers compute in float. So do recurrent layers in int8, for which there is no integer operator.
* Models trained with fake quantization keep their scales, and are not calibrated.
* The file's metadata lists what stays in float. That is not a fault as long as most weights are in int8.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir
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
"""Calibration methods by ONNX Runtime's names: all values, all but the rarest, or the least loss of information."""

_MASK = 1e9
"""Larger values stand for infinity, as in attention masks; a range with one would leave no steps for others."""


def quantize(
    source: Path, target: Path, spec: ExportSpec, *, methods: Iterable[str] = METHODS, symmetric: bool = False
) -> None:
    """Quantize weights and activations, in the way with the smallest error of the outputs.

    Args:
        source: The graph in float32.
        target: The file.
        spec: Its signature, with batches to calibrate with.
        methods: The calibration methods to choose from.
        symmetric: Whether all zero points are 0, biases are float, and only products are in int8, as TensorRT needs it.
    """
    import onnx

    expected = list(map(opened(source, threads=1), calibration(spec)))
    with tempfile.TemporaryDirectory() as folder:
        prepared, draft = _prepared(source, Path(folder)), Path(folder, "draft.onnx")
        found = dict(_all_ranges(prepared, spec, methods))

        def make(how: str, operators: Sequence[str], kept: Sequence[str] = (), alone: Sequence[str] = ()) -> Draft:
            model = _with_ranges(prepared, found[how], operators, kept, alone, symmetric)
            most = 1 if alone else len(expected)
            save(model, draft, {})
            return Draft(model, how, _error(draft, expected[:most], spec), tuple(kept))

        drafts = [make(how, _MATRICES if symmetric else _every_operator()) for how in found]
        if best(drafts).error > NEAR and not symmetric:
            drafts += [make(how, _MATRICES) for how in found]
        for each in drafts:
            print(f"ranges by {each.how}: relative error {each.error:.3g}")
        whole = onnx.load(prepared)
        chosen, mending = mended(drafts, _layers(whole), partial(make, best(drafts).how, _MATRICES), spec.in_float)
    stored = _stored(chosen.model, _RECURRENT)
    left = in_float(*float_weights(chosen.model), "", float_operators(chosen.model), stored)
    remarks = (f"ranges by {chosen.how.lower()}", seven_bits(), mending, left.remark)
    save(chosen.model, target, spec.embedded, *remarks, shortfall=left.shortfall)


def _error(draft: Path, expected: Sequence[Arrays], spec: ExportSpec) -> float:
    """The error of a draft's outputs; infinite if ONNX Runtime refuses what its own optimizers make of the draft."""
    try:
        run = opened(draft, threads=1)
    except Exception as error:  # it has a type for each of its codes, without a common base
        print(f"ONNX Runtime does not load a draft: {error}")
        return math.inf
    return distance(expected, map(run, islice(calibration(spec), len(expected))))


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
    """Store the bias of each integer product in int32 with the scale of its sum, else runtimes compute it in float."""
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
    """Replace int8 by uint8, shifted by 128, since products of two uint8 are not added in 16 bits."""
    from onnx import TensorProto, numpy_helper

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            steps = numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(numpy_helper.from_array(steps.astype(np.uint8), tensor.name))
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.UINT8


TRAINED = "with the scales from training"


def _layers(prepared: onnx.ModelProto) -> dict[str, str]:
    """The nodes that multiply by weights, and the names of those."""
    constants = {tensor.name for tensor in prepared.graph.initializer}
    nodes = [node for node in named(prepared).graph.node if node.op_type in _MATRICES]
    return {node.name: node.input[1] for node in nodes if node.input[1] in constants}


def float_weights(model: onnx.ModelProto) -> tuple[int, int]:
    """The number of elements of a quantized model's weights in float, and of all weights."""
    weights = [each for each in model.graph.initializer if is_weight(each.dims)]
    sizes = [(math.prod(each.dims), each.data_type == _FLOAT) for each in weights if each.data_type in (_FLOAT, *_INT8)]
    return sum(size for size, is_float in sizes if is_float), sum(size for size, _ in sizes)


_FLOAT, _INT8 = 1, (2, 3)  # onnx.TensorProto.FLOAT, UINT8 and INT8


def quantize_min_max(source: Path, target: Path, spec: ExportSpec) -> None:
    """`quantize` by minimum and maximum only, which takes a fraction of the time and memory."""
    quantize(source, target, spec, methods=METHODS[:1])


def _prepared(source: Path, folder: Path) -> Path:
    """The model with constants folded and shapes inferred, as the quantizer needs it."""
    from onnxruntime.quantization import quant_pre_process

    source, prepared = source.absolute(), folder / "prepared.onnx"
    try:
        with chdir(folder):  # where symbolic inference gives up, it writes the model into the current folder
            quant_pre_process(str(source), str(prepared))
    except Exception as error:  # symbolic inference lacks some operators, and raises many types
        print(f"symbolic shapes are left out: {error}")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def ranges(source: Path, spec: ExportSpec, method: str = "MinMax") -> Any:
    """The `TensorsData` of ONNX Runtime: minimum and maximum of each float tensor over all batches."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder, "augmented.onnx")
        calibrator = create_calibrator(source, None, str(beside), CalibrationMethod[method])
        wanted = {given.name for given in calibrator.infer_session.get_inputs()}
        for arrays in calibration(spec):
            # one by one, since batches of different sizes cannot be one array
            calibrator.collect_data(_Once({name: array for name, array in arrays.items() if name in wanted}))
        return calibrator.compute_data()


def _all_ranges(prepared: Path, spec: ExportSpec, methods: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Ranges by each method that works: histograms fail on the infinities of attention masks."""
    for method in methods:
        try:
            yield method, ranges(prepared, spec, method)
        except ValueError as error:
            if method == METHODS[0]:
                raise
            print(f"no ranges by {method}: {error}")


class _Once:
    """A batch as a `CalibrationDataReader`."""

    def __init__(self, batch: Arrays) -> None:
        self._left: list[Arrays] = [batch]

    def get_next(self) -> Arrays | None:
        return self._left.pop() if self._left else None


_MATRICES = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _every_operator() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def _with_ranges(
    prepared: Path, found: Any, operators: Sequence[str], kept: Sequence[str], alone: Sequence[str], symmetric: bool
) -> onnx.ModelProto:
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    model = onnx.load(prepared)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=overflows(),
        weight_qType=QuantType.QInt8,
        # processors have instructions for uint8
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=found,
        nodes_to_quantize=list(alone),
        nodes_to_exclude=[*kept, *(node.name for node in beyond(model, found, _MASK))],
        op_types_to_quantize=operators,
        extra_options={"ActivationSymmetric": True, "QuantizeBias": False} if symmetric else {},
    )
    quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    return made


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give each node of the model a name, in place, the same ones each time; returns the model."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    return model


def beyond(model: onnx.ModelProto, found: Any, greatest: float) -> list[onnx.NodeProto]:
    """The nodes that read or write a value above `greatest`, on the batches of `ranges` or in their weights."""
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
    """Whether this processor adds int8 products in 16 bits: x86 without VNNI, or x86 where that is unknown."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    told = Path("/proc/cpuinfo")
    return not (told.exists() and "vnni" in told.read_text(encoding="utf-8"))


def seven_bits() -> str:
    """A remark on weights of seven bits; empty if they have eight."""
    return "weights in 7 bits, since this processor has no VNNI" if overflows() else ""


_COMPUTE_NOTHING = (
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Shape", "Gather", "Slice", "Split", "Concat"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Pad", "Where"),
)


def float_operators(model: onnx.ModelProto) -> str:
    """A remark on operators of a Q/DQ graph that compute in float32; empty if there are none."""
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
"""Operators whose weights are quantized."""

_CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}
_RECURRENT = {"LSTM": 1, "GRU": 1, "RNN": 1}
"""Operators whose weights are stored in int8, and the weights' axis of output channels."""

_OVERHEAD = 256
"""Bytes that a further node, its name and the names of its inputs take in the file, at most."""


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Quantize the weights; matrices are multiplied in int8, with ranges of the inputs taken at run time."""
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
    stored = _stored(model, _CONVOLUTIONS | _RECURRENT)
    left = in_float(*float_weights(model), "", stored)
    save(model, target, spec.embedded, seven_bits(), left.remark, shortfall=left.shortfall)


def _stored(model: onnx.ModelProto, axes: Mapping[str, int]) -> str:
    """Store the weights of operators in int8, per channel, under the same names; returns a remark on them, or nothing.

    `axes` has the axis of output channels for each type of operator. Weights that would take no fewer bytes are left.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    readers = {name: node for node in graph.node if node.op_type in axes for name in node.input[1:3]}
    kinds = set()
    for tensor in [each for each in graph.initializer if each.name in readers and is_weight(each.dims)]:
        node, array = readers[tensor.name], numpy_helper.to_array(tensor)
        axis = axes[node.op_type]
        if array.dtype != np.float32 or 3 * array.size <= 4 * array.shape[axis] + _OVERHEAD:
            continue
        others = tuple(index for index in range(array.ndim) if index != axis)
        scale = np.maximum(np.abs(array).max(others), np.finfo(np.float32).tiny) / np.float32(127)
        steps = np.round(array / np.expand_dims(scale, others)).astype(np.int8)
        parts = [f"{tensor.name}_int8", f"{tensor.name}_scale"]
        graph.initializer.remove(tensor)
        graph.initializer.extend(map(numpy_helper.from_array, (steps, scale), parts))
        graph.node.insert(0, helper.make_node("DequantizeLinear", parts, [tensor.name], axis=axis))
        kinds.add("convolutions" if node.op_type in _CONVOLUTIONS else "recurrent layers")
    return f"{' and '.join(sorted(kinds))} compute in float32, with weights stored in int8" if kinds else ""


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
        slow_because="numbers are quantized and dequantized where an operator has no int8 kernel, and in a small model "
        "that, and additions in int8, cost more than its products gain",
    ),
    onnx_format(
        "onnx-int8-symmetric",
        "ONNX graph in int8 (Q/DQ) with zero points of 0, as TensorRT reads it",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
        Route("onnxruntime", "onnx", "onnx", partial(quantize, symmetric=True), mends=True),
        precision="int8",
        calibrated=True,
        targets=("GPU",),
    ),
    onnx_format(
        "onnx-w8",
        "ONNX graph with its weights in int8, for transformers and recurrent networks on CPUs",
        _URL,
        Route("onnxruntime", "onnx", "onnx", quantize_weights),
        precision="w8",
        slow_because="ONNX Runtime dequantizes the weights of convolutions at each call and cannot arrange them in "
        "advance, and it takes the ranges of activations of linear layers at each call",
    ),
)
