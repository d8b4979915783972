"""ONNX's own backend suite against a lowering; run by the Python of the toolchain that has its framework.

    python backend_suite.py TARGET PACKAGE RESULT [static,dynamic,broken] [PATTERN]

TARGET is `tensorflow` or `paddle`. PACKAGE is the folder of `polyexport`; it is imported without what only the training
environment has, as a worker does. RESULT is written as JSON: for each mode and case "passed", "not applicable: <rule>"
or "failed: <why>". In the mode `dynamic` no size of the data is known while the graph is lowered. The mode `static`
leaves out operators that are expanded to what the standard defines them by, which are most of the nodes: definitions
hold for any size. In the mode `broken`, the last, two operators are wrong, and only the cases in `BROKEN` run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

STRINGS = "it computes with strings, which no tensor of PyTorch holds"
NO_TYPE = "its element type has no arithmetic in {target}"
RANDOM = "it draws at random, and ONNX does not say which numbers"
OPTIONAL = "an optional, a sequence or a map is an input or output of the model, which no signature of {target} has"
OLD_SCAN = "the Scan of opset 8, older than anything that PyTorch's exporters write"
FRACTION = (
    "it aligns corners by a fractional length; PyTorch, whose graphs are lowered, rounds it, as ONNX Runtime does"
)
SMOOTH = "antialias to sizes, of a length that only the run knows, is refused by name: a known limit"
BORDER = "Paddle Inference takes and gives no tensor of its element type"
EMPTY = "nothing but a tensor without entries, with which Paddle Inference stops"
TRAINING = "an operator of training"
OTHER_DOMAIN = "an operator of another domain than ai.onnx, which PyTorch does not export to"


PARAMETERS = {
    "axes",
    "axis",
    "image_shape",
    "block_shape",
    "frame_step",
    "frame_length",
    "num_mel_bins",
    "dft_length",
    "sample_rate",
    "lower_edge_hertz",
    "upper_edge_hertz",
}
"""Inputs that decide ranks and shapes; PyTorch's exporters always write them as constants, and so they are here."""


WEIGHTS = {"W", "R", "w", "weight", "B", "roi", "size", "sizes", "scales", "indices"}
"""Inputs whose shapes are the model's and not the data's; they stay static in the dynamic run."""

MENDED = "the answer that ONNX before 1.18 expects is wrong, and was mended there"

WRONG = {
    "test_averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_True",  # the tail belongs to one side only
    "test_qlinearmatmul_2D_int8_float32",
    "test_qlinearmatmul_2D_int8_float16",
    "test_qlinearmatmul_3D_int8_float32",
    "test_qlinearmatmul_3D_int8_float16",  # they wrap where the standard saturates
}

ROUNDED = {"test_resize_downsample_scales_linear_align_corners", "test_resize_downsample_scales_cubic_align_corners"}


TYPES = {
    "tensorflow": "FLOAT8|FLOAT4|U?INT4|U?INT2",
    "paddle": "FLOAT8|FLOAT4|U?INT4|U?INT2|UINT16|UINT32|UINT64|BFLOAT16",  # its CPU kernels do not know the last
}
"""The element types that a target cannot compute with."""

Answers = dict[str, np.ndarray]

AT_ONCE = 16
"""How many cases are lowered as one graph."""


def onnx_version() -> tuple[int, ...]:
    """Of the suite: a case is judged by the release that it comes with."""
    import onnx

    return tuple(map(int, onnx.__version__.split(".")[:2]))


def rule_against(model: Any, name: str, target: str) -> str | None:
    """Why a case says nothing about the lowering; None where it does."""
    from onnx import TensorProto

    values = [*model.graph.input, *model.graph.output]
    kinds = {value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}
    ops = {node.op_type for node in model.graph.node}
    if any(not value.type.HasField("tensor_type") for value in values):
        return OPTIONAL
    if TensorProto.STRING in kinds or ops & {"StringNormalizer", "ImageDecoder", "TfIdfVectorizer"}:
        return STRINGS
    narrow = {
        each
        for each in TensorProto.DataType.values()
        if re.match(f"({TYPES[target]})", TensorProto.DataType.Name(each))
    }
    attributes = {a.i for node in model.graph.node for a in node.attribute if a.name in ("to", "dtype", "output_dtype")}
    inner = {weight.data_type for weight in model.graph.initializer}
    if (kinds | attributes | inner) & narrow:
        return NO_TYPE
    if any(node.domain not in ("", "ai.onnx") for node in model.graph.node) and not model.functions:
        return TRAINING if "training" in " ".join(node.domain for node in model.graph.node) else OTHER_DOMAIN
    if ops & {"Bernoulli", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"}:
        return RANDOM
    if target == "paddle" and TensorProto.INT16 in kinds:
        return BORDER
    if target == "paddle" and name == "test_reshape_allowzero_reordered":
        return EMPTY
    if name in ROUNDED:
        return FRACTION
    if name in WRONG and onnx_version() < (1, 18):
        return MENDED
    if "Scan" in ops and any(o.domain == "" and o.version < 9 for o in model.opset_import):
        return OLD_SCAN
    if ("training" in name or "train" in name) and "Dropout" in ops:
        return RANDOM
    return None


def tensorflow(model: Any, inputs: Answers, shapes: dict[str, Any]) -> Answers:
    """Lower to TensorFlow and run."""
    import tensorflow as tf

    from polyexport.lowering.tensorflow import lower_model

    module = lower_model(model, [tf.TensorSpec(shapes[name], array.dtype, name) for name, array in inputs.items()])
    found = module.forward(*(tf.constant(array) for array in inputs.values()))
    return {name: tensor.numpy() for name, tensor in found.items()}


def paddle(model: Any, inputs: Answers, shapes: dict[str, Any]) -> Answers:
    """Lower to Paddle, save, and run the files by Paddle Inference, as the format's own loader does."""
    from paddle.static import InputSpec

    from polyexport.formats.paddle import load
    from polyexport.lowering.paddle import lower_model
    from polyexport.spec import ExportSpec, TensorSpec

    lowered = lower_model(model, [InputSpec(shapes[name], array.dtype.name, name) for name, array in inputs.items()])
    signature = [TensorSpec(name, array.dtype.name, array.shape) for name, array in inputs.items()]
    answers = [TensorSpec(name, "", ()) for name in lowered.outputs]  # the loader reads their names only
    with tempfile.TemporaryDirectory() as folder:
        lowered.save(Path(folder) / "model")
        return load(Path(folder), ExportSpec(tuple(signature), tuple(answers)), threads=1)(inputs)


TARGETS = {"tensorflow": tensorflow, "paddle": paddle}


Case = tuple[str, Any, list[tuple[list[Any], list[Any]]], float, float]
"""Name, model, data, and the tolerances, relative and absolute."""


@dataclass(frozen=True)
class Part:
    """A model on one of its data sets.

    Attributes:
        model: Without functions, and with parameters as constants.
        shapes: The shape of each input while the graph is lowered; None for a size that only the run knows.
        expected: The outputs by name, in the order of the model's.
    """

    model: Any
    inputs: Answers
    shapes: dict[str, list[int | None]]
    expected: Answers
    rtol: float
    atol: float


def parts(case: Case, *, dynamic: bool) -> list[Part]:
    """A case's model on each of its data sets."""
    import onnx
    from onnx import numpy_helper
    from onnx.inliner import inline_local_functions

    _, model, data_sets, rtol, atol = case
    if model.functions:
        model = inline_local_functions(model)
    smooth = any(a.name == "antialias" and a.i for node in model.graph.node for a in node.attribute)
    constant = PARAMETERS | {"scales", "sizes"} if smooth else PARAMETERS
    if model.graph.name.startswith("test_affine_grid") and model.graph.name.endswith("expanded"):
        constant = constant | {"size"}  # the standard's own definition chooses by it between two and three axes
    fixed = [i for i, value in enumerate(model.graph.input) if value.name in constant]
    if fixed:
        kept = onnx.ModelProto()
        kept.CopyFrom(model)
        model = kept
    for i in fixed:
        model.graph.initializer.append(numpy_helper.from_array(_array(data_sets[0][0][i]), model.graph.input[i].name))
    weights = {weight.name for weight in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    found = []
    for given, expected in data_sets:
        arrays = [_array(each) for i, each in enumerate(given) if i not in fixed]
        inputs = dict(zip(names, arrays, strict=False))
        shapes = {
            name: _free(array, model) if dynamic and name not in WEIGHTS else list(array.shape)
            for name, array in inputs.items()
        }
        answers = {value.name: _array(each) for value, each in zip(model.graph.output, expected, strict=False)}
        found.append(Part(model, inputs, shapes, answers, rtol, atol))
    return found


def opsets(part: Part) -> str:
    """What two models must have in common to be one."""
    return repr(sorted((each.domain, each.version) for each in part.model.opset_import))


def merged(several: Sequence[Part]) -> Part:
    """Graphs beside each other in one, whose names begin with their number."""
    import onnx
    from onnx.compose import add_prefix

    model = onnx.ModelProto()
    model.CopyFrom(several[0].model)
    model.graph.Clear()
    model.graph.name = "several"
    inputs, shapes, expected = {}, {}, {}
    for number, part in enumerate(several):
        prefix = f"p{number}_"
        model.graph.MergeFrom(add_prefix(part.model, prefix).graph)
        inputs |= {prefix + name: array for name, array in part.inputs.items()}
        shapes |= {prefix + name: shape for name, shape in part.shapes.items()}
        expected |= {prefix + name: array for name, array in part.expected.items()}
    return Part(model, inputs, shapes, expected, several[0].rtol, several[0].atol)


def run(target: str, part: Part) -> None:
    """Lower a model, run it on the data, compare.

    Raises:
        AssertionError: an output differs.
    """
    found = TARGETS[target](part.model, part.inputs, part.shapes)
    for name, reference in part.expected.items():
        check(found[name], reference, part.rtol, part.atol)


def agree(target: str, several: Sequence[Part]) -> bool:
    """Whether models agree that are lowered as one, which takes less time; if not, it may be due to that."""
    try:
        run(target, merged(several))
    except Exception:  # each is run by itself then, and what it raises is in the result
        return False
    return True


def _free(array: np.ndarray, model: Any) -> list[int | None]:
    """No size known; but of a signal whether it is real or complex, its last axis, which decides the operator."""
    if array.ndim == 1 and array.dtype.kind in "iu":  # a shape: its length is a number of axes
        return list(array.shape)
    fourier = any(node.op_type in ("DFT", "STFT") for node in model.graph.node)
    return [None] * (array.ndim - 1) + [array.shape[-1]] if fourier and array.ndim else [None] * array.ndim


def _array(content: Any) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    return numpy_helper.to_array(content) if isinstance(content, TensorProto) else np.asarray(content)


def check(found: np.ndarray, reference: np.ndarray, rtol: float, atol: float) -> None:
    """Type, shape and values, as the suite's own runner asks for them."""
    assert found.shape == reference.shape, f"shape {found.shape} instead of {reference.shape}"
    assert found.dtype == reference.dtype, f"type {found.dtype} instead of {reference.dtype}"
    if found.dtype.itemsize == 2 and found.dtype.kind not in "biu":  # the suite's own limit is below their precision
        rtol, atol = max(rtol, 4e-3), max(atol, 4e-3)
    if found.dtype.kind not in "biuc":
        found, reference = found.astype(np.float64), reference.astype(np.float64)
        finite = np.abs(reference[np.isfinite(reference)])
        atol *= max(1.0, finite.max(initial=0.0))  # a sum of large terms may miss zero by their last bits
    np.testing.assert_allclose(found, reference, rtol=rtol, atol=atol)


def cases() -> list[Case]:
    """All node cases, and the models that were converted from PyTorch."""
    import onnx
    from onnx import numpy_helper
    from onnx.backend.test.case.node import collect_testcases

    found = [(case.name, case.model, case.data_sets, case.rtol, case.atol) for case in collect_testcases(None)]
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for folder in sorted([*data.glob("pytorch-converted/*"), *data.glob("pytorch-operator/*")]):
        model = onnx.load(folder / "model.onnx")
        sets = []
        for one in sorted(folder.glob("test_data_set_*")):
            parts = []
            for kind in ("input", "output"):
                files = sorted(one.glob(f"{kind}_*.pb"), key=lambda file: int(file.stem.split("_")[1]))
                parts.append([numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files])
            sets.append((parts[0], parts[1]))
        found.append((f"{folder.parent.name}/{folder.name}", model, sets, 1e-3, 1e-5))
    return found


def excuse(target: str, mode: str, case: Case) -> str:
    """What RESULT says of a case that a rule excludes; empty if none does."""
    name, model, *_ = case
    rule = rule_against(model, name, target)
    if mode == "dynamic" and "sizes" in name and "antialias" in name:
        rule = SMOOTH
    return f"not applicable: {rule.format(target=target)}" if rule else ""


def outcome(target: str, mode: str, case: Case) -> str:
    """What RESULT says of a case that is run by itself."""
    if said := excuse(target, mode, case):
        return said
    try:
        for part in parts(case, dynamic=mode == "dynamic"):
            run(target, part)
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "passed"


BROKEN = ("test_relu", "test_round", "test_tanh")
"""Relu is lowered to tanh, and Round not at all; the third is right."""


def broken(target: str, case: Case) -> str:
    """What RESULT says of a case where two operators are broken for good."""
    framework, lowering = import_module(target), import_module(f"polyexport.lowering.{target}")
    if lowering.OPS._table.pop(("", "Round"), None):  # the first time
        lowering.OPS.elementwise("Relu", since=2)(lambda x: framework.tanh(x))
    return outcome(target, "static", case)


def results(target: str, mode: str, chosen: list[Case]) -> dict[str, str]:
    """What RESULT says of each case in one mode."""
    if mode == "broken":
        return {case[0]: broken(target, case) for case in chosen if case[0] in BROKEN}
    if mode == "static":
        chosen = [case for case in chosen if "_expanded" not in case[0]]
    found = {case[0]: said for case in chosen if (said := excuse(target, mode, case))}
    for group in groups([case for case in chosen if case[0] not in found], dynamic=mode == "dynamic"):
        if agree(target, [part for _, some in group for part in some]):
            found |= dict.fromkeys((case[0] for case, _ in group), "passed")
        else:
            found |= {case[0]: outcome(target, mode, case) for case, _ in group}
    return found


def groups(chosen: list[Case], *, dynamic: bool) -> Iterator[list[tuple[Case, list[Part]]]]:
    """Cases with their parts, which can be lowered as one."""
    alike: dict[Any, list[tuple[Case, list[Part]]]] = {}
    for case in chosen:
        some = parts(case, dynamic=dynamic)
        alike.setdefault((opsets(some[0]), case[3:]), []).append((case, some))
    for each in alike.values():
        yield from (each[start : start + AT_ONCE] for start in range(0, len(each), AT_ONCE))


def main(target: str, package: str, result: str, modes: str = "static,dynamic,broken", pattern: str = "") -> None:
    """Run the suite; see the module's docstring."""
    module = types.ModuleType("polyexport")
    module.__path__ = [package]
    sys.modules["polyexport"] = module
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.simplefilter("ignore")
    np.random.seed(0)
    chosen = [case for case in cases() if re.search(pattern, case[0])]
    found = {mode: results(target, mode, chosen) for mode in modes.split(",")}
    Path(result).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
