"""RKNN: every model of the zoo in the vendor's simulator, what is refused, a board that is not there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import zoo
from isolated import many
from polyexport.errors import CannotRun, ToolMissing
from polyexport.formats import rknn
from polyexport.spec import ExportSpec, TensorSpec

FORMATS = ("rknn", "rknn-int8")

FAR_IN_INT8 = {"vit"}
"""Models that are beyond int8's tolerance where all of their layers are in int8."""


@pytest.fixture(scope="module")
def roots(exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports of the zoo, one whose ONNX graph is wrong, and one whose RKNN files will be."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; `pip install onnx`")
    found = {name: exported(name).folder for name in zoo.GROUND}
    folder = tmp_path_factory.mktemp("planted")
    for name in ("wrong_weight", "wrong_file"):
        found[name] = shutil.copytree(found["keywords"], folder / name, ignore=shutil.ignore_patterns("many"))
    path = found["wrong_weight"] / "onnx" / "model.onnx"
    model = onnx.load(path)
    weight = next(each for each in model.graph.initializer if len(each.dims) == 2)
    array = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(array[::-1].copy(), weight.name))
    onnx.save(model, path)
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def judged(roots: dict[str, str]) -> dict[tuple[str, str], object]:
    """Model and format -> parity, or why there is none."""
    made = many("rknn", "convert", FORMATS, [*roots.values()])
    assert {(root, name): said for root in made for name, said in made[root].items() if said != "made"} == {}
    for name in FORMATS:
        path = Path(roots["wrong_file"], "many", name, "model.rknn")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + content[: len(content) // 2 - 1 : -1])
    found = many("rknn", "verify", FORMATS, [*roots.values()])
    return {(model, name): parity for model, root in roots.items() for name, parity in found[root].items()}


@pytest.mark.slow
def test_every_model_agrees_at_three_batch_sizes(judged) -> None:
    cells = {cell: parity for cell, parity in judged.items() if not cell[0].startswith("wrong")}
    assert {cell: said for cell, said in cells.items() if not isinstance(said, dict)} == {}
    assert all(sorted({sizes["batch"] for sizes in said["batches"]}) == [1, 3, zoo.BATCH] for said in cells.values())
    assert {cell for cell, said in cells.items() if not said["passed"]} == {
        (model, "rknn-int8") for model in FAR_IN_INT8
    }


@pytest.mark.slow
def test_what_is_far_in_int8_agrees_with_its_costliest_layers_in_half_precision(roots: dict[str, str]) -> None:
    far = [roots[model] for model in FAR_IN_INT8]
    assert many("rknn", "convert", ("rknn-int8.hybrid",), far) == {root: {"rknn-int8.hybrid": "made"} for root in far}
    found = many("rknn", "verify", ("rknn-int8.hybrid",), far)
    assert {root for root in far if not found[root]["rknn-int8.hybrid"]["passed"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_weight_is_a_mismatch(judged, name: str) -> None:
    assert not judged["wrong_weight", name]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_not_what_was_simulated_is_refused(judged, name: str) -> None:
    assert "model.rknn is not what the toolkit builds from" in judged["wrong_file", name]


GELUS = {
    "exact": "Gelu(x)",
    "by_tanh": 'Gelu<approximate = "tanh">(x)',
}


@pytest.mark.parametrize("name", GELUS)
def test_an_operator_that_is_too_new_is_decomposed(name: str) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; `pip install onnx`")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install onnxruntime`")
    text = f'<ir_version: 9, opset_import: ["" : 20]> g (float[64] x) => (float[64] y) {{ y = {GELUS[name]} }}'
    model = onnx.parser.parse_model(text)
    x = {"x": np.linspace(-6, 6, 64, dtype=np.float32)}
    (expected,) = runtime.InferenceSession(model.SerializeToString()).run(None, x)
    older = rknn.in_older_opset(model)
    assert [each.version for each in older.opset_import if not each.domain] == [19]
    assert "Gelu" not in {node.op_type for node in older.graph.node}
    (answer,) = runtime.InferenceSession(older.SerializeToString()).run(None, x)
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)


def test_an_exception_of_the_toolkit_is_reported_by_its_last_line() -> None:
    said = (
        'Traceback (most recent call last):\n  File "rknn/api/rknn_log.py", line 344, in wrapper\n'
        "onnx.checker.ValidationError: No Op registered for Hardest\n\n==> Context: Bad node\n"
    )
    assert rknn.cause(ValueError(said)) == "onnx.checker.ValidationError: No Op registered for Hardest"
    assert rknn.cause(ValueError("too large")) == "ValueError: too large"


def test_on_other_systems_than_linux_the_reason_names_the_requirement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ToolMissing, match=r"made for Linux and for Python up to 3\.12, and this is Python 3\.\d+ on"):
        rknn.convert(tmp_path, tmp_path / "model.rknn", ExportSpec((), ()))


def test_without_an_npu_its_kit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class RKNNLite:
        def load_rknn(self, path: str) -> int:
            return -1

    module = ModuleType("rknnlite.api")
    module.RKNNLite = RKNNLite  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rknnlite", ModuleType("rknnlite"))
    monkeypatch.setitem(sys.modules, "rknnlite.api", module)
    with pytest.raises(CannotRun, match=r"there is no NPU of RK3588 here, or not librknnrt\.so"):
        rknn.load_on_board(tmp_path / "model.rknn", ExportSpec((), ()), threads=1)


@pytest.mark.parametrize(("differing", "is_same"), [(0, True), (10, True), (11, False)])
def test_files_are_the_same_but_for_one_byte_in_a_hundred(differing: int, is_same: bool) -> None:
    assert rknn.same(bytes(1000), bytes(1000 - differing) + b"x" * differing) is is_same
    assert not rknn.same(bytes(1000), bytes(1001))


def test_layers_in_half_precision_are_named() -> None:
    head = "custom_quantize_layers:{}\nquantize_parameters:\n    kept: float16\n"
    layers = "      # 0.95\n    add_2-rs: float16      # 0.95\n    add_1: float16    # 0.99"
    assert rknn.half_layers(head.format(layers)) == ["add_2-rs", "add_1"]


def test_an_answer_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"RKNN gives y in the shape \(4,\), PyTorch in \(1, 3\)"):
        rknn.answer(np.zeros(4, np.float32), TensorSpec("y", "float32", (1, 3)))
    assert rknn.answer(np.array([[2.0]], np.float32), TensorSpec("y", "int64", (1,))).tolist() == [2]
