"""Low precisions that are made wrong on purpose, by the real converters: what has to be judged a mismatch.

A channel that is swapped with another, a zero point that is off, a layer whose range is far too narrow.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport import ExportSpec, Format, Route
from polyexport.formats import known
from polyexport.spec import calibration, write_arrays

if TYPE_CHECKING:
    import torch

Convert = Callable[[Path, Path, ExportSpec], None]


def wrong(name: str, error: str, convert: Convert, upstream: str, toolchain: str) -> Format:
    """The format `name` under another name, made by `convert`."""
    route = Route(error, upstream, toolchain, convert)
    return replace(known()[name], name=f"{name}-{error}", aliases=(), routes=(route,), lacks=lambda: "")


def narrow(spec: ExportSpec, folder: str) -> ExportSpec:
    """The same with batches of an eighth of the numbers to calibrate with."""
    paths = []
    for index, arrays in enumerate(calibration(spec)):
        paths.append(Path(folder, f"{index}.npz"))
        write_arrays(paths[-1], {name: array / np.asarray(8, array.dtype) for name, array in arrays.items()})
    return replace(spec, calibration=tuple(paths))


# --- MNN --------------------------------------------------------------------------------------------------------------


def _of_mnn(name: str) -> Convert:
    """The first conversion of a model of MNN to the format `name`."""
    return next(route.convert for route in known()[name].routes if route.upstream == "mnn")


def mnn_swapped(name: str) -> Convert:
    """The format `name`, which is made of a model of MNN, with two channels of the last layer swapped."""

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load(source)
        tensor = [each for each in model.graph.initializer if len(each.dims) == 2][-1]
        rows = numpy_helper.to_array(tensor)
        axis = int(np.argmin(rows.shape))  # that of the outputs
        changed = np.take(rows, [1, 0, *range(2, rows.shape[axis])], axis)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(model, Path(folder, "model.onnx"))
            known()["mnn"].routes[0].convert(Path(folder, "model.onnx"), Path(folder, "model.mnn"), spec)
            _of_mnn(name)(Path(folder, "model.mnn"), target, spec)

    return convert


def mnn_saturated(source: Path, target: Path, spec: ExportSpec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _of_mnn("mnn-int8")(source, target, narrow(spec, folder))


def mnn_zero_points(source: Path, target: Path, spec: ExportSpec) -> None:
    """Shift the numbers that are computed, behind the input, by a quarter of their range."""
    from polyexport.formats import mnn

    _of_mnn("mnn-int8")(source, target, spec)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "model.json")
        words = ("--framework", "MNN", "--modelFile", str(target), "--JsonFile", str(text))
        mnn._run("mnnconvert", *words, writes=target)
        model = json.loads(text.read_text())
        for each in model["extraTensorDescribe"][2:]:
            each["quantInfo"]["zero"] += 64
        text.write_text(json.dumps(model))
        target.unlink()
        mnn._run_converter("JSON", text, target)


# --- TensorFlow.js ----------------------------------------------------------------------------------------------------


def tfjs_changed(change: Callable[[dict[str, Any]], None]) -> Convert:
    """With the quantization of each weight changed; it has `min` and `scale`."""

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        known()["tfjs-w8"].routes[0].convert(source, target, spec)
        model = json.loads(target.read_text())
        for each in (weight for group in model["weightsManifest"] for weight in group["weights"]):
            if "quantization" in each:
                change(each["quantization"])
        target.write_text(json.dumps(model))

    return convert


def off_by_a_quarter(quantization: dict[str, Any]) -> None:
    quantization["min"] += 64 * quantization["scale"]


def of_half_the_scale(quantization: dict[str, Any]) -> None:
    quantization["scale"] /= 2


def tfjs_swapped(source: Path, target: Path, spec: ExportSpec) -> None:
    """The weights of the last matrix, whose channels lie in its last axis, with two of them swapped."""
    known()["tfjs-w8"].routes[0].convert(source, target, spec)
    (group,) = json.loads(target.read_text())["weightsManifest"]
    (path,) = group["paths"]
    data, start, found = bytearray((target.parent / path).read_bytes()), 0, None
    for each in group["weights"]:
        quantized = each.get("quantization", {}).get("dtype") == "uint8"
        count = int(np.prod(each["shape"], dtype=int)) * (1 if quantized else 4)
        if quantized and len(each["shape"]) == 2:
            found = (start, start + count, each["shape"])
        start += count
    assert found is not None
    begin, end, shape = found
    steps = np.frombuffer(bytes(data[begin:end]), np.uint8).reshape(shape)
    axis = int(np.argmin(shape))
    data[begin:end] = np.take(steps, [1, 0, *range(2, shape[axis])], axis).tobytes()
    (target.parent / path).write_bytes(data)


# --- ExecuTorch -------------------------------------------------------------------------------------------------------


def executorch_changed(change: Callable[[torch.fx.GraphModule], None], *, dynamic: bool = False) -> Convert:
    """The quantized module is changed before it is lowered."""

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        from polyexport.formats.executorch import lower
        from polyexport.formats.executorch_quantized import calibrated
        from polyexport.tracing.exported_program import load_program

        module = calibrated(load_program(source).module(), spec, dynamic=dynamic)
        change(module)
        module.recompile()
        lower(module, target, spec)

    return convert


def first_two_outputs(module: torch.fx.GraphModule) -> None:
    """Swap the first two channels of the last layer's weights, which are in int8."""
    weights = [each for _, each in module.named_buffers() if each.element_size() == 1 and each.ndim == 2]
    last = min(weights, key=len)
    last[[0, 1]] = last[[1, 0]].clone()


def activations(module: torch.fx.GraphModule, *names: str) -> list[torch.fx.Node]:
    """The nodes of these kinds about numbers that are computed, in their order; each has a scale and a zero point."""
    ends = tuple(f"{name}_per_tensor.default" for name in names)
    return [node for node in module.graph.nodes if str(node.target).removeprefix("quantized_decomposed.") in ends]


def scales(module: torch.fx.GraphModule) -> None:
    """Leave an eighth of their range to the numbers that are computed, behind the input."""
    for node in activations(module, "quantize", "dequantize")[2:]:
        x, scale, *rest = node.args
        node.args = (x, scale / 8, *rest)  # type: ignore[operator]  # a number


def zero_points(module: torch.fx.GraphModule) -> None:
    """Shift the numbers that are computed, behind the input, by a quarter of their range, to where int8 has it."""
    for node in activations(module, "quantize", "dequantize")[2:]:
        x, scale, zero, *rest = node.args
        node.args = (x, scale, zero + 64 if zero < 0 else zero - 64, *rest)  # type: ignore[operator]  # numbers


def executorch_in_4_bits(change: Callable[[Any], None]) -> Convert:
    """With the last layer's weights in 4 bits changed; they have `qdata` and, for each group of 32, `scale`."""

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        from polyexport.formats import executorch_quantized as executorch
        from polyexport.tracing.exported_program import load_program
        from polyexport.tracing.products import as_products

        module = as_products(load_program(source))
        names = executorch._read_by_linear(module)
        module = executorch._in_groups(
            module, [each for each in names if module.get_parameter(each).shape[1] % 32 == 0]
        )
        change(min((each for each in module.parameters() if hasattr(each, "qdata")), key=len))
        executorch._lower_weights(module, target, spec)

    return convert


def first_two_rows(weight: Any) -> None:
    for numbers in (weight.qdata, weight.scale):
        numbers[[0, 1]] = numbers[[1, 0]].clone()


def half_the_scales(weight: Any) -> None:
    weight.scale /= 2


def saturated(weight: Any) -> None:
    """Clip the weights to a seventh of their range."""
    weight.qdata.clamp_(-1, 1)


# --- IMX500 -----------------------------------------------------------------------------------------------------------


def imx500_saturated(source: Path, target: Path, spec: ExportSpec) -> None:
    """The graph before compilation, which is what is verified."""
    from polyexport.formats import imx500

    with tempfile.TemporaryDirectory() as folder:
        imx500.quantize(source, target.with_name(imx500.GRAPH), narrow(spec, folder).one_row())
    memory = {"Memory Usage": "1KB", "Total Memory Available On Chip": "8.00MB"}
    target.with_name(imx500.MEMORY).write_text(json.dumps({"Memory Report": memory}))
    target.touch()


WRONG = (
    wrong("executorch-int8", "swapped", executorch_changed(first_two_outputs), "pt2", "executorch"),
    wrong("executorch-int8", "saturated", executorch_changed(scales), "pt2", "executorch"),
    wrong("executorch-w8", "swapped", executorch_changed(first_two_outputs, dynamic=True), "pt2", "executorch"),
    wrong("executorch-int8", "zero-point", executorch_changed(zero_points), "pt2", "executorch"),
    *(
        wrong("executorch-w4", error, executorch_in_4_bits(change), "pt2", "executorch")
        for error, change in (("swapped", first_two_rows), ("scale", half_the_scales), ("saturated", saturated))
    ),
    wrong("imx500", "saturated", imx500_saturated, "pt2", "imx500"),
    wrong("mnn-w8", "swapped", mnn_swapped("mnn-w8"), "onnx", "mnn"),
    wrong("mnn-w4", "swapped", mnn_swapped("mnn-w4"), "onnx", "mnn"),
    wrong("mnn-int8", "swapped", mnn_swapped("mnn-int8"), "onnx", "mnn"),
    wrong("mnn-int8", "saturated", mnn_saturated, "mnn", "mnn"),
    wrong("mnn-int8", "zero-point", mnn_zero_points, "mnn", "mnn"),
    wrong("tfjs-w8", "swapped", tfjs_swapped, "tfjs", "tensorflow"),
    wrong("tfjs-w8", "zero-point", tfjs_changed(off_by_a_quarter), "tfjs", "tensorflow"),
    wrong("tfjs-w8", "saturated", tfjs_changed(of_half_the_scale), "tfjs", "tensorflow"),
)
