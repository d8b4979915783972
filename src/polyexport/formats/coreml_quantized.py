"""Core ML with int8 and 4-bit weights, and in int8, by coremltools, from packages in float16 or float32.

https://apple.github.io/coremltools/docs-guides/source/opt-overview.html

Requirements:
* Packages compute in float16, as the Neural Engine requires; if that disagrees, `w8` and `w4` use float32.
* Ranges for int8 come from evaluating the program on real batches, `spec.calibration`.
* A remark says which weights stay in float.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.coreml.program import Name, read, weights
from polyexport.format import Convert, Loaded, Route
from polyexport.formats.coreml import coreml_format, load, package, save
from polyexport.formats.onnx import REMARK
from polyexport.measure.drafts import Draft, distance, mended, partly
from polyexport.measure.ranges import Step, too_narrow
from polyexport.measure.weights import InFloat, in_float, in_four_bits
from polyexport.spec import Arrays, ExportSpec, calibration

# --- conversion -------------------------------------------------------------------------------------------------------

_FEWEST_WEIGHTS = 512
"""Smaller constants are not compressed, since the operator that reads them makes the package larger."""

_FEWEST_POSSIBLE = 9
"""coremltools stores constants up to this size in the program itself, and compresses none of those."""


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store weights in int8, one scale per channel."""
    save(_quantized_weights(_opened(source), _fewest(source)), target)


def palettize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store weights as indices of four bits into a table of sixteen numbers for each tensor."""
    save(_palettized(_opened(source), _fewest(source)), target)


def palettize_some_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `palettize_weights`, with the costliest weights in int8."""
    from coremltools.optimize.coreml import get_weights_metadata

    fewest, expected = _fewest(source), _answers(source, spec)
    sizes = {name: each.val.size for name, each in get_weights_metadata(_opened(source), fewest).items()}

    def make(names: Collection[str]) -> Draft:
        model = _quantized_weights(_palettized(_opened(source), fewest, names), fewest)
        save(model, target)
        return Draft(model, "", distance(expected, _answers(target, spec)))

    chosen = partly(sizes, sum(map(sum, weights(read(source)).values())), make)
    save(chosen.model, target)


def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
    """Quantize inputs and outputs of convolutions, products, sums and pools to int8, and weights too.

    coremltools cannot do this for a float32 package: it makes some of the scales float16.
    """
    from coremltools.optimize import coreml as optimize

    found, expected = ranges(source, spec)
    _widen(found, source)
    fewest = _fewest(source)
    layers = {
        operation.outputs[0].name: operation.outputs[0].name
        for operation in read(source).main.operations
        if operation.kind in _QUANTIZED
    }

    def make(kept: Sequence[str], alone: Sequence[str]) -> Draft:
        config = optimize.OpLinearQuantizerConfig("linear")
        names = dict.fromkeys(alone, config) if alone else dict.fromkeys(kept)
        with _known_ranges(found):
            model = optimize.linear_quantize_activations(
                _opened(source),
                optimize.OptimizationConfig(None if alone else config, op_name_configs=names),
                [],
            )
        model = _quantized_weights(model, fewest)
        save(model, target)
        taken = replace(spec, calibration=spec.calibration[:1]) if alone else spec
        error = distance(expected[: 1 if alone else None], _answers(target, taken))
        return Draft(model, "", error, tuple(kept))

    chosen, mending = mended([make((), ())], layers, make, spec.in_float)
    if mending:
        chosen.model.user_defined_metadata[REMARK] = mending
    save(chosen.model, target)


def _widen(found: dict[str, dict[str, float]], source: Path) -> None:
    """Widen the ranges of tensors that are 0 in all batches, whose scale would be 0."""
    steps = [
        Step(
            [value.name for value in operation.arguments.values() if isinstance(value, Name)],
            operation.outputs[0].name,
            operation.kind in ("add", "sub"),
        )
        for operation in read(source).main.operations
        if operation.outputs
    ]
    known = {name: (each["rmin"], each["rmax"]) for name, each in found.items()}
    for name, most in too_narrow(known, steps).items():
        found[name]["rmax"] = most


_QUANTIZED = ("conv", "linear", "add", "avg_pool", "max_pool")
"""The operations whose inputs coremltools quantizes."""


def _opened(package: Path) -> Any:
    import coremltools as ct

    return ct.models.MLModel(str(package), skip_model_load=True)


def _fewest(package: Path) -> int:
    """Constants of more numbers than this are compressed: the larger ones, if they are most of the weights."""
    sizes = weights(read(package))[32]
    is_most = 2 * sum(size for size in sizes if size > _FEWEST_WEIGHTS) > sum(sizes)
    return _FEWEST_WEIGHTS if is_most else _FEWEST_POSSIBLE


def _quantized_weights(model: Any, fewest: int) -> Any:
    from coremltools.optimize import coreml as optimize

    config = optimize.OpLinearQuantizerConfig("linear_symmetric", weight_threshold=fewest)
    return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(config))


def _palettized(model: Any, fewest: int, names: Collection[str] | None = None) -> Any:
    """The model with a palette for each weight, or for those with the given names."""
    from coremltools.optimize import coreml as optimize

    config = optimize.OpPalettizerConfig("custom", lut_function=palette, weight_threshold=fewest)
    of_names = optimize.OptimizationConfig(op_name_configs=dict.fromkeys(names or (), config))
    return optimize.palettize_weights(model, optimize.OptimizationConfig(config) if names is None else of_names)


def _answers(package: Path, spec: ExportSpec) -> list[Arrays]:
    return list(map(load(package, spec, threads=1), calibration(spec)))


_PALETTE = 16
_ROUNDS = 25


def palette(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen values, and for each weight the index of the nearest, by k-means that starts from quantiles."""
    flat = np.sort(weights, axis=None).astype(np.float64)
    sums = np.concatenate([[0], np.cumsum(flat)])
    table = flat[(np.arange(_PALETTE) * 2 + 1) * flat.size // (2 * _PALETTE)]
    for _ in range(_ROUNDS):
        ends = np.searchsorted(flat, (table[1:] + table[:-1]) / 2)
        first, last = np.concatenate([[0], ends]), np.concatenate([ends, [flat.size]])
        table = np.where(last > first, (sums[last] - sums[first]) / np.maximum(last - first, 1), table)
    indices = np.searchsorted((table[1:] + table[:-1]) / 2, weights)
    return table.astype(weights.dtype), indices.astype(np.uint8)


def ranges(path: Path, spec: ExportSpec) -> tuple[dict[str, dict[str, float]], list[Arrays]]:
    """Evaluate a package on the batches of `spec.calibration`.

    Returns:
        Minimum and maximum of each float tensor over all batches, `rmin` and `rmax`; and the outputs for each batch,
        with PyTorch's names and dtypes.
    """
    from polyexport.coreml.evaluate import evaluator

    found: dict[str, dict[str, float]] = {}

    def observe(tensors: Arrays) -> None:
        for name, array in tensors.items():
            known = found.setdefault(name, {"rmin": np.inf, "rmax": -np.inf})
            known["rmin"] = min(known["rmin"], float(array.min()))
            known["rmax"] = max(known["rmax"], float(array.max()))

    run = package(evaluator(path, observe), spec)
    return found, list(map(run, calibration(spec)))


@contextlib.contextmanager
def _known_ranges(found: dict[str, dict[str, float]]) -> Iterator[None]:
    """Make coremltools use these ranges; it would run the model, which needs macOS, and use only the last batch's.

    Operations on values without a range, such as those in a loop, or with one too small for a scale in float16, stay in
    float: coremltools fails on them.
    """
    from coremltools.converters.mil.mil.passes.defs.optimize_activation_quantization import (
        insert_suffix_quantize_dequantize_pair as after,
    )
    from coremltools.optimize.coreml import _post_training_quantization as quantization
    from coremltools.optimize.coreml._quantization_passes import insert_prefix_quantize_dequantize_pair as before

    measure, insert, go_on = (
        quantization._get_activation_calibration_stats,
        before.transform_op,
        after._insert_quantize_dequantize,
    )

    def insert_where_possible(self: Any, operation: Any) -> None:
        values = (operation.inputs.get(name) for name in ("x", "y"))
        if all(_has_scale(found.get(value.name)) for value in values if value is not None and value.val is None):
            insert(self, operation)

    def go_on_outside_of_loops(self: Any, block: Any, *settings: Any) -> None:
        if settings:  # coremltools forgets them for inner blocks
            go_on(self, block, *settings)

    quantization._get_activation_calibration_stats = lambda *_: found
    before.transform_op, after._insert_quantize_dequantize = insert_where_possible, go_on_outside_of_loops
    try:
        yield
    finally:  # another model may be converted in this process later
        quantization._get_activation_calibration_stats = measure
        before.transform_op, after._insert_quantize_dequantize = insert, go_on


_STEPS = 255
"""Between the least and the greatest number in int8."""


def _has_scale(found: dict[str, float] | None) -> bool:
    """Whether a range is known, and its scale is a normal number in float16."""
    return found is not None and found["rmax"] - found["rmin"] >= _STEPS * float(np.finfo(np.float16).tiny)


# --- running ----------------------------------------------------------------------------------------------------------

_LEFT = (
    f"which have fewer than {_FEWEST_WEIGHTS} numbers, where compression saves nothing, or which coremltools does not "
    "compress; coreml-fp16 has all of them in half precision"
)


def load_compressed(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a remark on weights in float."""
    return _telling(
        load(path, spec, threads=threads), lambda four, eight, left: in_float(left, four + eight + left, _LEFT), path
    )


def load_palettized(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a remark on the shares of the weights in 4 and 8 bits."""
    return _telling(load(path, spec, threads=threads), lambda *sizes: in_four_bits(*sizes, _LEFT), path)


def _telling(opened: Loaded, told: Callable[[int, int, int], InFloat], path: Path) -> Loaded:
    program = read(path)
    left = told(*map(sum, weights(program).values()))
    remark = "; ".join(filter(None, (left.remark, program.metadata.get(REMARK))))
    return replace(opened, remark=remark, shortfall="; ".join(filter(None, (opened.shortfall, left.shortfall))))


def _compressions(compress: Convert) -> tuple[Route, ...]:
    return (
        Route("from float16", "coreml-fp16", "coreml", compress),
        Route("from float32", "coreml", "coreml", compress),
    )


FORMATS = (
    coreml_format(
        "coreml-w8",
        "w8",
        "Core ML program in half precision with int8 weights, half its size",
        *_compressions(quantize_weights),
        load=load_compressed,
    ),
    coreml_format(
        "coreml-w4",
        "w4",
        "Core ML program in half precision with weights from a palette of sixteen, a quarter of its size",
        *_compressions(palettize_weights),
        Route("some in 8 bits", "coreml-fp16", "coreml", palettize_some_weights),
        load=load_palettized,
        calibrated=True,
    ),
    coreml_format(
        "coreml-int8",
        "int8",
        "Core ML program with int8 weights and activations, for the Neural Engine from A17 Pro and M4 on",
        Route("from float16", "coreml-fp16", "coreml", quantize, mends=True),
        load=load_compressed,
        calibrated=True,
    ),
)
