"""OpenVINO in eight and in four bits, by Intel's NNCF.

https://docs.openvino.ai/2025/openvino-workflow/model-optimization.html

`openvino-int8` has weights and activations in int8, for CPUs and NPUs; `openvino-w8` and `openvino-w4` have only the
weights in 8 and in 4 bits, for transformers, which are limited by memory bandwidth. NNCF has 4 bits for matrices and
embeddings; convolutions and recurrent layers, which it leaves in more, are stored in them here, for a smaller file. So
are the recurrent layers that it leaves in float in int8; they compute in float.

Requirements:
* Ranges come from real batches. Of NNCF's two schemes, the general one and the one for transformers, the one with the
  smaller error of the outputs on those batches is kept. If both errors are large, the costliest layers stay in float.
* Telemetry is off.
* The file's metadata lists what stays in float.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyexport.format import Loaded, Route
from polyexport.formats.onnx_quantized import TRAINED, overflows, seven_bits
from polyexport.formats.openvino import compiled, load, openvino_format, save, without_telemetry
from polyexport.measure.drafts import Draft, best, distance, mended, partly
from polyexport.measure.weights import InFloat, counted, in_float, in_four_bits, is_weight
from polyexport.spec import Arrays, ExportSpec, calibration

URL = "https://docs.openvino.ai/2025/openvino-workflow/model-optimization.html"

# --- weights and activations ------------------------------------------------------------------------------------------


def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
    """Quantize weights and activations to int8, by the scheme with the smaller error of the outputs."""
    core = without_telemetry().Core()
    model = core.read_model(source)
    expected, layers = list(_answers(model, spec)), _layers(model)

    def make(scheme: str, kept: Sequence[str] = (), alone: Sequence[str] = ()) -> Draft:
        ignored = [name for name in layers if name not in alone] if alone else kept
        taken = replace(spec, calibration=spec.calibration[:1]) if alone else spec
        made = _quantized(core.read_model(source), taken, ignored, transformer=scheme == "transformer")
        return Draft(made, scheme, distance(expected[: 1 if alone else None], _answers(made, taken)), tuple(kept))

    drafts = [make(scheme) for scheme in ("general", "transformer")]
    for each in drafts:
        print(f"{each.how} scheme: relative error {each.error:.3g}")
    chosen, mending = mended(drafts, layers, partial(make, best(drafts).how), spec.in_float)
    made = _with_stored(chosen.model, _RECURRENT, 8, computed=True)
    save(made, target, spec, f"{chosen.how} scheme", seven_bits(), mending, float_operators(made))


def convert_trained(source: Path, target: Path, spec: ExportSpec) -> None:
    """Read the ONNX graph with trained scales."""
    model = without_telemetry().convert_model(str(source))
    save(model, target, spec, TRAINED, float_operators(model))


_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_MATRICES = ("MatMul", *_CONVOLUTIONS)


def _layers(model: Any) -> dict[str, str]:
    """The nodes that multiply by weights, and the names of those."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in _MATRICES]
    weights = {node.get_friendly_name(): node.input_value(1).get_node() for node in nodes}
    return {name: by.get_friendly_name() for name, by in weights.items() if by.get_type_name() == "Constant"}


def _answers(model: Any, spec: ExportSpec) -> Iterator[Arrays]:
    return map(compiled(model, spec, threads=1), calibration(spec))


def _quantized(model: Any, spec: ExportSpec, ignored: Sequence[str], *, transformer: bool) -> Any:
    nncf, batches = _nncf(), _batches(model, spec)
    fix = nncf.OverflowFix.ENABLE if overflows() else nncf.OverflowFix.DISABLE
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        ignored_scope=nncf.IgnoredScope(names=list(ignored)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )


def _batches(model: Any, spec: ExportSpec) -> list[Arrays]:
    """The batches, without inputs that the model does not read."""
    known = set().union(*(port.get_names() for port in model.inputs))
    return [{name: array for name, array in arrays.items() if name in known} for arrays in calibration(spec)]


def _nncf() -> Any:
    """NNCF without its telemetry."""
    without_telemetry()
    import nncf

    return nncf


_COMPUTE_NOTHING = ("Input", "Output", "Const", "Reorder", "Reshape", "Convert", "ShapeOf", "FakeQuantize", "Subgraph")


def float_operators(model: Any) -> str:
    """A remark on operators that compute in float32; empty if there are none."""
    nodes = without_telemetry().Core().compile_model(model, "CPU").get_runtime_model().get_ops()
    about = [{key: value.astype(str) for key, value in node.get_rt_info().items()} for node in nodes]
    found = Counter(
        each["layerType"]
        for each in about
        if each["layerType"] not in _COMPUTE_NOTHING and each["runtimePrecision"] in ("f32", "f16", "bf16")
    )
    return f"in float32: {counted(found)}" if found else ""


# --- weights alone ----------------------------------------------------------------------------------------------------


def store_in_8_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights in int8, per channel."""
    save(_with_stored(_compressed(_read(source), "INT8_ASYM"), _RECURRENT, 8), target, spec)


def store_in_4_bits(
    source: Path, target: Path, spec: ExportSpec, *, convolutions: bool = False, every: bool = False
) -> None:
    """Store the weights of matrices and recurrent layers in 4 bits, by groups along a channel, and the others in int8.

    Scales of matrices are fitted to the layers' outputs on the calibration batches.

    Args:
        source: The model in float32.
        target: The file.
        spec: Its signature, with batches to calibrate with.
        convolutions: Whether convolutions are in 4 bits too, but for the first.
        every: Whether all weights are: embeddings, the last matrix and the first convolution too.
    """
    nncf, model = _nncf(), _read(source)
    batches = nncf.Dataset(_batches(model, spec))
    weights = _float_weights(model)
    for_nncf = {"MatMul", "Gather"} if convolutions else {"MatMul", "Gather", *_CONVOLUTIONS}
    own = [
        each for each in weights if not each.kinds <= for_nncf or (each.width % _LEAST_GROUP and "MatMul" in each.kinds)
    ]
    ignored = [layer.get_friendly_name() for weight in own for layer in weight.layers]
    options = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_LEAST_GROUP
    )
    if len(own) < len(weights):
        model = _compressed(
            model,
            "INT4_ASYM",
            group_size=_GROUP,
            dataset=batches,
            scale_estimation=True,
            all_layers=every,
            ignored_scope=nncf.IgnoredScope(names=ignored),
            advanced_parameters=options,
        )
    save(_with_stored(model, _MULTIPLIES, 4, every=every), target, spec)


def store_some_in_4_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the cheapest weights in 4 bits, at least half of them, and the costliest in int8."""
    expected, found = list(_answers(_read(source), spec)), _float_weights(_read(source))
    sizes = {each.constant.get_friendly_name(): math.prod(each.shape) for each in found}

    def make(names: Collection[str]) -> Draft:
        model = _with_stored(_read(source), _MULTIPLIES, 4, names=names)
        return Draft(model, "", distance(expected, _answers(model, spec)))

    save(partly(sizes, sum(_bits(source)), make).model, target, spec)


_GROUP, _LEAST_GROUP = 64, 8
"""Weights per scale, at most and at least; the greatest power of two that divides a channel's number of weights."""


def _read(source: Path) -> Any:
    return without_telemetry().Core().read_model(source)


def _compressed(model: Any, mode: str, **options: Any) -> Any:
    nncf = _nncf()
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **options)


_RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell")
"""Layers of which NNCF leaves most in float. OpenVINO reads their weights into float32 when it loads the model."""

_MULTIPLIES = (*_MATRICES, *_RECURRENT, "Gather")

_PASSED = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Convert")


class _FloatWeight(NamedTuple):
    """A constant of float32 and the layers that read it, perhaps reshaped."""

    constant: Any
    layers: tuple[Any, ...]

    @property
    def kinds(self) -> set[str]:
        """The types of the layers."""
        return {layer.get_type_name() for layer in self.layers}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.constant.get_output_shape(0))

    @property
    def width(self) -> int:
        """The number of weights of one output channel, or of one row of an embedding."""
        if self.kinds & {*_CONVOLUTIONS}:
            return math.prod(self.shape[1:])
        attributes = self.layers[0].get_attributes()
        return self.shape[-1 if attributes.get("transpose_b", True) else -2]


def _float_weights(model: Any) -> list[_FloatWeight]:
    """The weights in float32 of layers that multiply by them."""
    constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    found = [
        _FloatWeight(node, tuple(_reading(node)))
        for node in constants
        if node.get_element_type().to_string() == "f32" and is_weight(node.get_output_shape(0))
    ]
    return [each for each in found if each.layers and each.kinds <= {*_MULTIPLIES}]


def _reading(node: Any) -> Iterator[Any]:
    """The nodes that read a constant, themselves or reshaped."""
    for given in node.output(0).get_target_inputs():
        reader = given.get_node()
        if reader.get_type_name() in _PASSED:
            yield from _reading(reader)
        else:
            yield reader


def _with_stored(
    model: Any,
    kinds: Sequence[str],
    bits: int,
    *,
    every: bool = True,
    computed: bool = False,
    names: Collection[str] | None = None,
) -> Any:
    """The model with the float weights of these kinds of layers, which NNCF left, in 8 or 4 bits.

    Args:
        model: The model, which is changed.
        kinds: The layers' types.
        bits: How many.
        every: Whether the first convolution's weights are in so few bits too; else they are in 8.
        computed: Whether the weights must not look like those of integer kernels, which OpenVINO takes them for in a
            model with quantized activations, and then computes other values.
        names: The weights in so few bits, and others are in 8; all by default.
    """
    weights = [weight for weight in _float_weights(model) if weight.kinds <= {*kinds}]
    first = next((weight.constant for weight in weights if weight.kinds & {*_CONVOLUTIONS}), None)
    for weight in weights:
        is_named = names is None or weight.constant.get_friendly_name() in names
        in_bits = bits if is_named and (every or weight.constant is not first) else 8
        readers = list(weight.constant.output(0).get_target_inputs())
        stored = _in_groups(weight, in_bits, computed=computed)
        for reader in readers:
            reader.replace_source_output(stored.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _in_groups(weight: _FloatWeight, bits: int, *, computed: bool) -> Any:
    """A subgraph that computes the weights from integers, with a scale and a zero point for each group."""
    openvino = without_telemetry()
    from openvino import opset13

    row = math.prod(weight.shape[1:]) if weight.kinds & {*_CONVOLUTIONS} else weight.shape[-1]
    size = group_size(row) if bits == 4 else row
    groups = weight.constant.get_data().reshape(-1, size)
    levels = 2**bits - 1
    least, most = np.minimum(groups.min(1, keepdims=True), 0), np.maximum(groups.max(1, keepdims=True), 0)
    exact = np.maximum((most - least) / levels, np.finfo(np.float32).tiny).astype(np.float32)
    halves = np.finfo(np.float16)
    is_half = halves.tiny <= exact.min() <= exact.max() <= halves.max
    scales = exact.astype(np.float16 if is_half else np.float32)
    zeros = np.clip(np.round(-least / scales.astype(np.float32)), 0, levels)
    steps = np.clip(np.round(groups / scales.astype(np.float32)) + zeros, 0, levels)
    kind = openvino.Type.u4 if bits == 4 else openvino.Type.u8

    def integers(numbers: np.ndarray, name: str) -> Any:
        tensor = openvino.Tensor(kind, openvino.Shape(numbers.shape))
        numbers = numbers.astype(np.uint8).reshape(-1)
        if bits == 4:
            numbers = np.append(numbers, [0] * (len(numbers) % 2)).astype(np.uint8)
            numbers = numbers[0::2] | numbers[1::2] << 4
        tensor.data.reshape(-1)[:] = numbers
        stored = opset13.constant(tensor, name=name)
        return opset13.convert(opset13.convert(stored, "i32") if computed else stored, "f32")

    name = weight.constant.get_friendly_name()
    shifted = opset13.subtract(integers(steps, name), integers(zeros, f"{name}/zero_point"))
    scaled = opset13.multiply(shifted, opset13.convert(opset13.constant(scales, name=f"{name}/scale"), "f32"))
    return opset13.reshape(scaled, opset13.constant(np.array(weight.shape, np.int64)), special_zero=False)


def group_size(row: int) -> int:
    """The number of weights per scale: the greatest divisor of a row's length up to 32, or all of the row."""
    most = max(size for size in range(1, 32 + 1) if row % size == 0)
    return most if most >= _LEAST_GROUP else row


def load_quantized(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the CPU, with a remark on weights in float."""
    sizes, loaded = _bits(path), load(path, spec, threads=threads)
    return _telling(loaded, in_float(sizes[-1], sum(sizes), "which NNCF does not quantize", loaded.remark))


def load_w4(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the CPU, with a remark on the shares of the weights in 4 and 8 bits."""
    loaded = load(path, spec, threads=threads)
    return _telling(loaded, in_four_bits(*_bits(path), "", loaded.remark))


def _telling(loaded: Loaded, left: InFloat) -> Loaded:
    return replace(loaded, remark=left.remark, shortfall=left.shortfall)


def _bits(path: Path) -> tuple[int, int, int]:
    """The number of elements of weights in 4 bits, in 8, and in float."""
    sizes: Counter[str] = Counter()
    for node in _read(path).get_ordered_ops():
        is_scale = str(node.get_friendly_name()).rpartition("/")[2].startswith(("zero_point", "scale"))
        if node.get_type_name() == "Constant" and is_weight(node.get_output_shape(0)) and not is_scale:
            sizes[node.get_element_type().to_string()] += math.prod(node.get_output_shape(0))
    four, eight = (sizes[f"i{bits}"] + sizes[f"u{bits}"] for bits in (4, 8))
    return four, eight, sizes["f32"] + sizes["f16"]


FORMATS = (
    openvino_format(
        "openvino-int8",
        "OpenVINO IR in int8, calibrated with validation batches, for Intel CPUs and NPUs",
        URL,
        Route("trained scales", "onnx-int8", "openvino", convert_trained, trained=True),
        Route("nncf", "openvino", "nncf", quantize, mends=True),
        precision="int8",
        slow_because="most of a small model's call is OpenVINO's own work, and converting numbers to int8 and back",
        load=load_quantized,
        runtime="openvino",
        calibrated=True,
    ),
    openvino_format(
        "openvino-w8",
        "OpenVINO IR with its weights in 8 bits, for transformers",
        URL,
        Route("nncf", "openvino", "nncf", store_in_8_bits),
        precision="w8",
        slow_because="OpenVINO makes float weights of them when it compiles a small model, and computes in float32",
        load=load_quantized,
        runtime="openvino",
    ),
    openvino_format(
        "openvino-w4",
        "OpenVINO IR with its weights in 4 bits, for language models",
        URL,
        Route("nncf", "openvino", "nncf", store_in_4_bits),
        Route("convolutions too", "openvino", "nncf", partial(store_in_4_bits, convolutions=True)),
        Route("every weight", "openvino", "nncf", partial(store_in_4_bits, convolutions=True, every=True)),
        Route("some in 8 bits", "openvino", "nncf", store_some_in_4_bits),
        precision="w4",
        load=load_w4,
        runtime="openvino",
        calibrated=True,
    ),
)
