"""ONNX's own backend suite is the judge of the lowerings; what it cannot judge is checked here by hand."""

from __future__ import annotations

import ast
import functools
import json
import tempfile
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest

from isolated import PACKAGE, answer, in_toolchain
from polyexport.lowering.opsets import current
from polyexport.lowering.table import Operators
from polyexport.lowering.value import Value

CASES = {
    ("tensorflow", "static"): (1220, 220),
    ("tensorflow", "dynamic"): (1600, 280),
    ("paddle", "static"): (960, 190),
    ("paddle", "dynamic"): (1180, 210),
}
"""How many cases pass at least, and to how many a rule applies at most; the toolchains' releases of ONNX differ."""


@functools.cache
def suite(target: str) -> dict[str, dict[str, str]]:
    """What became of each case, by mode; all modes in one process, since to collect the cases takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        in_toolchain(target, "backend_suite.py", target, str(PACKAGE), str(result))
        found: dict[str, dict[str, str]] = json.loads(result.read_text())
        return found


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mode"), CASES)
def test_passes_every_applicable_case_of_onnx_own_suite(target: str, mode: str) -> None:
    """With static sizes, and with none known; for Paddle from its files, by Paddle Inference."""
    results, (passed, excused) = suite(target)[mode], CASES[target, mode]
    counts = Counter(result.split(":")[0] for result in results.values())
    assert {name: result for name, result in results.items() if result.startswith("failed")} == {}, counts
    assert counts["passed"] > passed
    assert counts["not applicable"] < excused


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorflow", "paddle"])
def test_the_suite_notices_a_wrong_operator(target: str) -> None:
    """The same cases with Relu lowered to tanh, and with an operator that nobody carries."""
    results = suite(target)["broken"]
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


def test_no_function_of_the_room_is_written_twice() -> None:
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


@pytest.mark.parametrize("target", ["tensorflow", "paddle"])
def test_an_input_that_only_the_run_knows_is_named(target: str) -> None:
    """Where the operator needs it while the graph is made."""
    said = answer(target, "unknown_input")
    assert said == "ONNX operator Squeeze (node 'y', opset 18): its input 'axes' is not known before the run"


@pytest.mark.parametrize("target", ["tensorflow", "paddle"])
def test_random_operators_draw_what_they_are_asked_for(target: str) -> None:
    """By mean and deviation, since ONNX's suite, which compares numbers, cannot judge them."""
    normal, uniform = (2.0, 3.0), (1.0, 4 / 12**0.5)
    expected = {"normal": normal, "normal_like": normal, "uniform": uniform, "uniform_like": uniform}
    expected |= {"bernoulli": (0.3, 0.21**0.5), "multinomial": (1.6, 0.44**0.5)}
    for name, numbers in answer(target, "drawn").items():
        np.testing.assert_allclose(numbers, expected[name], atol=0.15 if "normal" in name else 0.06, err_msg=name)


def test_transposes_around_convolutions_cancel() -> None:
    """A chain of convolutions, activations, additions and a pool is transposed once on its way in and once out."""
    assert answer("tensorflow", "transposes") == 2


def test_what_tflite_and_tensorflow_js_lack_is_not_in_the_graph() -> None:
    """Complex numbers, a scatter into a tensor that adds, and a sum along an axis counted from the end."""
    assert answer("tensorflow", "plain") == [[], [1]]


def test_elementary_functions_run_by_tflites_own_operators() -> None:
    """Each as numpy computes it, beside turned sequences, and images whose batch alone is not known while lowering."""
    assert answer("tensorflow", "elementary") is None


def test_infinities_are_found_by_tflite_too() -> None:
    """Its converter stores them as the greatest float, which equals no infinity."""
    assert answer("tensorflow", "infinities") is None


def test_integers_of_64_bits_run_by_tflites_own_operators() -> None:
    """Absolute values, signs, quotients and indices of the extremes, exactly as numpy and Python compute them."""
    assert answer("tensorflow", "integers") is None


def test_distinct_rows_and_reduced_updates_run_by_tflites_own_operators() -> None:
    """Also where an infinite element gets no update."""
    assert answer("tensorflow", "distinct") is None
