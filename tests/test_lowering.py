"""ONNX's own backend suite is the judge of the lowerings; what it cannot judge is checked here by hand."""

from __future__ import annotations

import ast
import json
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest

from isolated import AS_PACKAGE, HERE, PACKAGE, in_toolchain
from polyexport.lowering.opsets import current
from polyexport.lowering.table import Operators
from polyexport.lowering.value import Value

CASES = {"tensorflow": (1600, 280), "paddle": (1180, 210)}
"""How many cases pass at least, and to how many a rule applies at most; the toolchains' releases of ONNX differ."""


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES)
def test_passes_every_applicable_case_of_onnx_own_suite(target: str, tmp_path: Path) -> None:
    """Each twice: with static sizes, and with none known; for Paddle from its files, by Paddle Inference."""
    in_toolchain(target, "backend_suite.py", target, str(PACKAGE), str(tmp_path / "result.json"))
    passed, excused = CASES[target]
    for results in json.loads((tmp_path / "result.json").read_text()).values():
        failed = {name: result for name, result in results.items() if result.startswith("failed")}
        counts = Counter(result.split(":")[0] for result in results.values())
        assert not failed, counts
        assert counts["passed"] > passed
        assert counts["not applicable"] < excused


@pytest.mark.parametrize("target", CASES)
def test_the_suite_notices_a_wrong_operator(target: str, tmp_path: Path) -> None:
    """The same cases with Relu lowered to tanh, and with an operator that nobody carries."""
    script = tmp_path / "broken.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import backend_suite
run = backend_suite.run
def broken(*given):
    import {target}
    from polyexport.lowering.{target} import OPS
    if OPS._table.pop(("", "Round"), None):  # the first time
        OPS.elementwise("Relu", since=2)(lambda x: {target}.tanh(x))
    return run(*given)
backend_suite.run = broken
found = {str(tmp_path / "result.json")!r}
backend_suite.main({target!r}, {str(PACKAGE)!r}, found, "static", "^test_(relu|round|tanh)$")
"""
    )
    in_toolchain(target, str(script))
    results = json.loads((tmp_path / "result.json").read_text())["static"]
    assert results["test_tanh"] == "passed"
    assert results["test_relu"].startswith("failed: AssertionError")
    assert "ONNX operator Round (node 'y', opset 22): there is no lowering for it" in results["test_round"]


def test_no_files_of_the_room_import_each_other_in_a_circle() -> None:
    room = PACKAGE / "lowering"
    names = {
        ".".join(("polyexport", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in room.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    graph = {}
    for name, file in names.items():
        found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        given = {f"{node.module}.{alias.name}" for node in found for alias in node.names} | {
            node.module for node in found
        }
        graph[name] = {each for each in given & names.keys() if each != name and not name.startswith(f"{each}.")}
    assert len(list(TopologicalSorter(graph).static_order())) > 20


def test_no_function_of_the_room_stands_there_twice() -> None:
    """What two frameworks compute in the same way is written once."""
    found: dict[str, list[str]] = {}
    for file in (PACKAGE / "lowering").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                code = [each for each in node.body if not isinstance(each, ast.Expr)]
                content = "".join(map(ast.dump, (node.args, *code)))
                found.setdefault(content, []).append(f"{file.parent.name}/{file.name}: {node.name}")
    assert [names for names in found.values() if len(names) > 1] == []


def test_an_operator_that_is_declared_twice_is_an_error() -> None:
    shared = Operators()
    shared.op("Relu", "Neg")(lambda x: x)
    with pytest.raises(ValueError, match="the operator Neg has a function since opset 1 already"):
        Operators(shared).elementwise("Neg")(lambda x: x)
    Operators(shared).op("Neg", since=13)(lambda x: x)


def test_older_forms_become_those_of_today() -> None:
    """Attributes that are inputs now, tensors that lay at an axis, and words that say nothing any more."""
    x, bias = (Value(None, known=np.zeros(shape, "f4")) for shape in ((2, 3, 4, 5), (3,)))

    def contents(op: str, version: int, *inputs: Value, **attributes: object) -> list[object]:
        found, rest = current(op, version, list(inputs), attributes)
        return [None if each is None else each.known.tolist() for each in found[len(inputs) :]] + [dict(rest)]

    assert contents("Squeeze", 11, x, axes=[0]) == [[0], {}]
    assert contents("Slice", 9, x, starts=[1], ends=[2]) == [[1], [2], {}]
    assert contents("Clip", 6, x, max=6.0) == [None, 6.0, {}]
    assert contents("DFT", 17, x, inverse=1) == [None, 1, {"inverse": 1}]
    assert contents("DFT", 20, x, inverse=1) == [{"inverse": 1}]
    assert contents("ReduceSum", 11, x, axes=[1], keepdims=0) == [[1], {"keepdims": 0}]
    (_, moved), rest = current("Add", 6, [x, bias], {"axis": 1, "broadcast": 1, "consumed_inputs": [0]})
    assert (moved.shape, rest) == ((3, 1, 1), {})
    (_, slopes), _ = current("PRelu", 6, [x, bias], {})
    assert slopes.shape == (3, 1, 1)


@pytest.mark.parametrize("target", CASES)
def test_an_input_that_only_the_run_knows_is_named(target: str, tmp_path: Path) -> None:
    """Where the operator needs it while the graph is made."""
    script = tmp_path / "unknown.py"
    script.write_text(
        f"""
{AS_PACKAGE}
import backend_suite
import numpy as np
from onnx import helper
ports = [helper.make_tensor_value_info("x", 1, [1, 3]), helper.make_tensor_value_info("last", 7, [1])]
node = helper.make_node("Squeeze", ["x", "last"], ["y"])
graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", 1, None)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
inputs = {{"x": np.zeros((1, 3), "f4"), "last": np.array([0])}}
try:
    backend_suite.TARGETS[{target!r}](model, inputs, {{"x": [1, 3], "last": [1]}})
except Exception as error:
    print(error)
"""
    )
    said = in_toolchain(target, str(script)).splitlines()[-1]
    assert said == "ONNX operator Squeeze (node 'y', opset 18): its input 'axes' is not known before the run"


def test_transposes_around_convolutions_cancel(tmp_path: Path) -> None:
    """A chain of convolutions, activations, additions and a pool is transposed once on its way in and once out."""
    script = tmp_path / "layout.py"
    script.write_text(
        f"""
{AS_PACKAGE}
import numpy as np, onnx, tensorflow as tf
from onnx import helper, numpy_helper
from polyexport.lowering.tensorflow import lower_model
weight = numpy_helper.from_array(np.random.rand(4, 4, 3, 3).astype(np.float32), "w")
nodes = [
    helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("Conv", ["b", "w"], ["c"], pads=[1] * 4),
    helper.make_node("Add", ["b", "c"], ["d"]),
    helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
    helper.make_node("Concat", ["e", "e"], ["y"], axis=1),
]
port = lambda name: helper.make_tensor_value_info(name, 1, [None] * 4)
model = helper.make_model(helper.make_graph(nodes, "g", [port("x")], [port("y")], [weight]))
lowered = lower_model(model, [tf.TensorSpec([None, 4, 8, 8], tf.float32, "x")])
print([node.op for node in lowered.forward.graph.as_graph_def().node].count("Transpose"))
"""
    )
    assert in_toolchain("tensorflow", str(script)).split() == ["2"]


def test_what_tflite_and_tensorflow_js_lack_is_not_in_the_graph(tmp_path: Path) -> None:
    """Complex numbers, a scatter into a tensor that adds, and a sum along an axis counted from the end."""
    script = tmp_path / "plain.py"
    script.write_text(
        f"""
{AS_PACKAGE}
import numpy as np, onnx, tensorflow as tf
from onnx import helper, numpy_helper
from polyexport.lowering.tensorflow import lower_model
constants = {{"step": 4, "window": np.hanning(16).astype("f4"), "last": -1}}
constants |= {{"places": [[0], [0]], "rows": np.ones((2, 64), "f4")}}
weights = [numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()]
nodes = [
    helper.make_node("STFT", ["x", "step", "window"], ["spectrum"]),
    helper.make_node("CumSum", ["x", "last"], ["sums"]),
    helper.make_node("ScatterND", ["x", "places", "rows"], ["added"], reduction="add"),
]
port = lambda name, *sizes: helper.make_tensor_value_info(name, 1, sizes or None)
outputs = [port(name) for name in ("spectrum", "sums", "added")]
graph = helper.make_graph(nodes, "g", [port("x", None, 64)], outputs, weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
lowered = lower_model(model, [tf.TensorSpec([None, 64], tf.float32, "x")])
nodes = lowered.forward.graph.as_graph_def().node
print(*sorted({{node.op for node in nodes}} & {{"Complex", "FFT", "TensorScatterAdd"}}))
axis = next(node for node in nodes if node.op == "Cumsum").input[1]
print(next(tf.make_ndarray(node.attr["value"].tensor).item() for node in nodes if node.name == axis))
"""
    )
    assert in_toolchain("tensorflow", str(script)).split() == ["1"]


def test_elementary_functions_run_by_tflites_own_operators(tmp_path: Path) -> None:
    """Each as numpy computes it, beside turned sequences, and images whose batch alone is not known while lowering."""
    script = tmp_path / "elementary.py"
    script.write_text(
        f"""
{AS_PACKAGE}
import math
import numpy as np, onnx, tensorflow as tf
from onnx import helper, numpy_helper
from polyexport.lowering.tensorflow import lower_model
functions = {{
    "Acos": np.arccos, "Asin": np.arcsin, "Atan": np.arctan, "Atanh": np.arctanh, "Asinh": np.arcsinh,
    "Cosh": np.cosh, "Sinh": np.sinh, "Tan": np.tan, "Cos": np.cos, "Sin": np.sin, "Tanh": np.tanh,
    "Erf": np.vectorize(math.erf), "Exp": np.exp, "Abs": np.abs, "Sign": np.sign, "Ceil": np.ceil, "Floor": np.floor,
    "Round": np.round, "Neg": np.negative, "Reciprocal": np.reciprocal, "Softplus": lambda x: np.log1p(np.exp(x)),
    "Acosh": lambda x: np.full_like(x, np.nan), "Sqrt": np.sqrt, "Log": np.log, "IsNaN": np.isnan, "IsInf": np.isinf,
}}
weights = {{
    "regions": np.float32([[0, 0, 5, 4], [1, 1, 8, 5], [0, 2, 3, 5]]), "owner": np.array([0, 1, 2]),
    "kernel": np.random.default_rng(1).random((18, 2, 3, 3), np.float32) / 9,
    "lengths": np.array([3, 1]), "parts": np.array([2, 3]), "fourth": np.array([4]), "fifth": np.array([5]),
    "new": np.array([2, 3]), "seventh": np.array([7]), "divisor": np.float32(-0.3), "size": np.array([2, 3]),
}}
nodes = [helper.make_node(op, ["x"], [op]) for op in functions] + [
    helper.make_node("Mod", ["x", "divisor"], ["Mod"], fmod=1),
    helper.make_node("ReverseSequence", ["rows", "lengths"], ["ReverseSequence"], batch_axis=1, time_axis=0),
    helper.make_node("Cast", ["Ceil"], ["integers"], to=7),
    helper.make_node("Split", ["integers", "parts"], ["rest", "Split"], axis=1),
    helper.make_node("Unsqueeze", ["image", "new"], ["six axes"]),
    helper.make_node("Slice", ["six axes", "fourth", "seventh", "fifth"], ["Slice"]),
    helper.make_node("Shape", ["image"], ["kept"], end=2),
    helper.make_node("Concat", ["kept", "size"], ["sizes"], axis=0),
    helper.make_node("Resize", ["image", "", "", "sizes"], ["Resize"], mode="cubic", antialias=1),
    helper.make_node(
        "RoiAlign", ["image", "regions", "owner"], ["RoiAlign"], output_height=2, output_width=3, sampling_ratio=2
    ),
    helper.make_node("Conv", ["image", "kernel"], ["moves"]),
    helper.make_node("DeformConv", ["image", "kernel", "moves"], ["DeformConv"]),
]
dtypes = {{"IsNaN": 9, "IsInf": 9, "Split": 7}}
names = [*functions, "Mod", "Split", "Slice", "ReverseSequence", "Resize", "RoiAlign", "DeformConv"]
port = lambda name: helper.make_tensor_value_info(name, dtypes.get(name, 1), None)
constants = [numpy_helper.from_array(np.asarray(each), name) for name, each in weights.items()]
inputs = {{"x": (None, 5), "rows": (4, 2, None), "image": (None, 2, 6, 9)}}
graph = helper.make_graph(nodes, "g", [port(name) for name in inputs], [port(name) for name in names], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
lowered = lower_model(model, [tf.TensorSpec(shape, tf.float32, name) for name, shape in inputs.items()])
tf.saved_model.save(lowered, {str(tmp_path / "made")!r}, signatures={{"serving_default": lowered.forward}})
converter = tf.lite.TFLiteConverter.from_saved_model({str(tmp_path / "made")!r})
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
call = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner()
random = np.random.default_rng(0)
x = np.float32([[-0.9, -0.4, 0.0, 0.3, 0.99], [0.5, -0.5, 0.7, 0.1, -0.1]])
rows, image = (random.random(shape, np.float32) for shape in ((4, 2, 3), (3, 2, 6, 9)))
found = call(x=x, rows=rows, image=image)
turned = rows.copy()
turned[:3, 0] = rows[2::-1, 0]
with np.errstate(all="ignore"):
    right = {{name: function(x) for name, function in functions.items()}}
    right |= {{"Mod": np.fmod(x, np.float32(-0.3)), "ReverseSequence": turned}}
    right["Split"], right["Slice"] = np.ceil(x).astype("i8")[:, 2:], image[:, :, None, None, :, 4:7]
for name, expected in right.items():
    np.testing.assert_allclose(found[name], expected, atol=2e-6, rtol=2e-6, err_msg=name)
answer = lowered.forward(*map(tf.constant, (x, rows, image)))
for name in ("RoiAlign", "DeformConv"):
    np.testing.assert_allclose(found[name], answer[name], atol=1e-5, err_msg=name)
arrays = dict(zip(inputs, (x, rows, image)))
whole = lower_model(model, [tf.TensorSpec(array.shape, tf.float32, name) for name, array in arrays.items()])
static = whole.forward(*map(tf.constant, (x, rows, image)))["Resize"]
np.testing.assert_allclose(found["Resize"], static, atol=1e-5)
assert found["Resize"].shape == (3, 2, 2, 3)
"""
    )
    in_toolchain("tensorflow", str(script))
