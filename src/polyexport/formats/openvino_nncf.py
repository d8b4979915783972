"""OpenVINO in eight and in four bits, by Intel's NNCF.

https://docs.openvino.ai/2025/openvino-workflow/model-optimization.html

`openvino-int8` has weights and activations in int8, for CPUs and NPUs; `openvino-w8` and `openvino-w4` have only the
weights in 8 and in 4 bits, for transformers, which are limited by memory bandwidth.

Requirements:
* Ranges come from real batches. Of NNCF's two schemes, the general one and the one for transformers, the one with the
  smaller error of the outputs on those batches is kept. If both errors are large, the costliest layers stay in float.
* Telemetry is off.
* The file's metadata lists what stays in float.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from polyexport.format import Loaded, Route
from polyexport.formats.onnx_quantized import TRAINED, overflows, seven_bits
from polyexport.formats.openvino import compiled, load, openvino_format, save, without_telemetry
from polyexport.measure.drafts import Draft, best, distance, mended
from polyexport.measure.weights import counted, in_float, is_weight
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
    save(chosen.model, target, spec, f"{chosen.how} scheme", seven_bits(), mending, float_operators(chosen.model))


def convert_trained(source: Path, target: Path, spec: ExportSpec) -> None:
    """Read the ONNX graph with trained scales."""
    model = without_telemetry().convert_model(str(source))
    save(model, target, spec, TRAINED, float_operators(model))


_MATRICES = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")


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
    save(_stored(source, "INT8_ASYM"), target, spec)


def store_in_4_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights of matrices in 4 bits, by groups along a channel, and the others in int8.

    Scales are fitted to the layers' outputs on the calibration batches.
    """
    nncf = _nncf()
    batches = nncf.Dataset(_batches(without_telemetry().Core().read_model(source), spec))
    fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    options = {"group_size": _GROUP, "dataset": batches, "scale_estimation": True, "advanced_parameters": fallback}
    save(_stored(source, "INT4_ASYM", **options), target, spec)


_GROUP = 64
"""Weights per scale; fewer if a channel's number of weights is not divisible."""


def _stored(source: Path, mode: str, **options: Any) -> Any:
    nncf = _nncf()
    model = without_telemetry().Core().read_model(source)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **options)


def load_quantized(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the CPU, with a remark on weights in float."""
    return _telling(load(path, spec, threads=threads), _weights(path))


def load_w4(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the CPU, with a remark on weights in 4 bits."""
    weights = _weights(path)
    kinds = Counter(kind for kind, _ in weights)
    four, eight = (kinds[f"i{bits}"] + kinds[f"u{bits}"] for bits in (4, 8))
    loaded = _telling(load(path, spec, threads=threads), weights, f"{four} weights in 4 bits, {eight} in 8")
    if not four:
        why = "no weight is in 4 bits: convolutions, embeddings and the last layer are stored in 8"
        return replace(loaded, remark="", shortfall=why)
    return loaded


def _telling(loaded: Loaded, weights: Sequence[tuple[str, int]], *also: str) -> Loaded:
    in_floats = sum(size for kind, size in weights if kind.startswith("f"))
    left = in_float(in_floats, sum(size for _, size in weights), "which NNCF does not quantize", loaded.remark, *also)
    return replace(loaded, remark=left.remark, shortfall=left.shortfall)


def _weights(path: Path) -> list[tuple[str, int]]:
    """Element type and size of each weight."""
    nodes = without_telemetry().Core().read_model(str(path)).get_ops()
    found = [node for node in nodes if node.get_type_name() == "Constant" and is_weight(node.get_output_shape(0))]
    weights = [node for node in found if "zero_point" not in str(node.get_friendly_name())]
    return [(node.get_element_type().to_string(), math.prod(node.get_output_shape(0))) for node in weights]


FORMATS = (
    openvino_format(
        "openvino-int8",
        "OpenVINO IR in int8, calibrated with validation batches, for Intel CPUs and NPUs",
        URL,
        Route("trained scales", "onnx-int8", "openvino", convert_trained, trained=True),
        Route("nncf", "openvino", "nncf", quantize, mends=True),
        precision="int8",
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
        load=load_quantized,
        runtime="openvino",
    ),
    openvino_format(
        "openvino-w4",
        "OpenVINO IR with its weights in 4 bits, for language models",
        URL,
        Route("nncf", "openvino", "nncf", store_in_4_bits),
        precision="w4",
        load=load_w4,
        runtime="openvino",
        calibrated=True,
    ),
)
