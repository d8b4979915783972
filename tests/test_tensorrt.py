"""TensorRT: skipped with a reason where it cannot run, and what it does where it can.

TensorRT for RTX builds without a GPU, by the same parser, profiles and builder: that is real here. What depends on the
GPU is called on a stand-in for the library, a few lines that record what they are asked and refuse what TensorRT's
documentation does not have. `test_an_engine_is_verified` runs on a machine with a GPU and the library.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import torch

import polyexport
import zoo
from isolated import many
from polyexport.errors import CannotRun, ToolMissing
from polyexport.formats import resolve, tensorrt
from polyexport.onnx_graph.recurrent_weights import in_float32
from polyexport.spec import ExportSpec, TensorSpec
from polyexport.workers import gpu

RTX = ("tensorrt-rtx", "tensorrt-rtx-fp16", "tensorrt-rtx-int8")
HERE = not gpu.missing() and torch.cuda.is_available() and importlib.util.find_spec("tensorrt") is not None
SPEC = ExportSpec(
    inputs=(TensorSpec("image", "float32", ("batch", 3, 8, 8)), TensorSpec("unused", "float32", ("batch", 2))),
    outputs=(TensorSpec("scores", "float32", ("batch", 5)),),
    sizes={"batch": 40},
    metadata={"checkpoint_sha256": "abc"},
)


@pytest.mark.skipif(not gpu.missing(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_skipped_in_a_line_and_nothing_else_is_built(tmp_path):
    module, inputs = zoo.build("keywords")
    report = polyexport.export(module, inputs, ["engine", "tensorrt-fp16"], tmp_path / "export", bench=False)
    for outcome in report.outcomes:
        assert outcome.state == "skipped"
        assert outcome.reason.startswith("it needs an NVIDIA GPU")
        assert "\n" not in outcome.reason
    assert not (tmp_path / "export/source/made").exists()


@pytest.mark.skipif(not HERE, reason="it needs an NVIDIA GPU, PyTorch's CUDA build and `pip install tensorrt-cu13`")
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-fp16", "tensorrt-int8"])
def test_an_engine_is_verified(name, tmp_path):
    module, inputs = zoo.build("resnet")
    report = polyexport.export(module, inputs, [name], tmp_path / "export", bench=False)
    (outcome,) = report.outcomes
    assert outcome.state == "verified", outcome.reason


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu, "missing", lambda: "")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(ToolMissing, match="pip install tensorrt"):
        tensorrt._library()


@pytest.fixture(scope="module")
def for_rtx(tmp_path_factory):
    module, inputs = zoo.build("resnet")
    folder = tmp_path_factory.mktemp("rtx") / "out"
    return polyexport.export(module, inputs, RTX, folder, bench=False, metadata={"by": "us"})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its wheels are installed on Linux only")
@pytest.mark.skipif(not gpu.missing(), reason="this machine has a GPU, which may run it")
@pytest.mark.parametrize("name", RTX)
def test_an_engine_for_rtx_is_built_without_a_gpu_and_not_called_verified(for_rtx, name):
    outcome = for_rtx[name]
    assert outcome.state == "unverified", outcome.reason
    assert "it needs an NVIDIA GPU" in outcome.reason
    assert outcome.inputs[0].shape[0] == "batch"
    about = json.loads((for_rtx.folder / name / "model.json").read_text())
    assert about["gpus"] == ["8.0", "8.6", "8.9", "12.0 and later"]
    assert (about["metadata"]["by"], about["metadata"]["checkpoint_sha256"]) == ("us", for_rtx.checkpoint.sha256)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its wheels are installed on Linux only")
def test_an_engine_that_nothing_here_can_open_has_its_size_and_hash(for_rtx):
    whole, half, eight = (for_rtx[name].artifact for name in RTX)
    assert whole.bytes > half.bytes > 100_000
    assert len(whole.sha256) == len(half.sha256) == len(eight.sha256) == 64


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its wheels are installed on Linux only")
def test_every_model_is_parsed_and_built(exported):
    roots = [str(exported(model).folder) for model in (*zoo.GROUND, *zoo.FURTHER)]
    found = many("tensorrt_rtx", "convert", ("tensorrt-rtx",), roots)
    assert {Path(root).name: made["tensorrt-rtx"] for root, made in found.items()} == {
        Path(root).name: "made" for root in roots
    }


def test_yolov5_calls_it_engine():
    assert [each.name for each in resolve(["engine"])] == ["tensorrt"]


# --- the stand-in -----------------------------------------------------------------------------------------------------


class Recorder:
    """Answers any of the methods it is told of, and keeps what it was asked; any other name is an error."""

    def __init__(self, calls, name, **answers):
        self._calls, self._name, self._answers = calls, name, answers

    def __getattr__(self, method):
        if method not in self._answers:
            raise AttributeError(f"TensorRT's {self._name} has no {method}")
        answer = self._answers[method]
        if not callable(answer):
            return answer

        def call(*given):
            self._calls.append((f"{self._name}.{method}", given))
            return answer(*given)

        return call


def nothing(*given):
    return None


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for `tensorrt` 11: the names that its documentation has, and a list of what was called."""
    calls, loggers, read = [], [], []

    def parse(path):
        read[:] = [node.op_type for node in onnx.load(path).graph.node]
        return "Frobnicate" not in read

    def fails(why):
        loggers[-1].log(Logger.ERROR, why)

    runtime = Recorder(calls, "Runtime", deserialize_cuda_engine=lambda plan: fails("it is for another GPU"))
    timings = Recorder(calls, "ITimingCache", serialize=lambda: b"timings")
    profile = Recorder(calls, "IOptimizationProfile", set_shape=nothing)
    config = Recorder(
        calls,
        "IBuilderConfig",
        set_memory_pool_limit=nothing,
        clear_flag=nothing,
        add_optimization_profile=nothing,
        create_timing_cache=lambda content: timings,
        set_timing_cache=lambda cache, ignore: True,
        get_timing_cache=lambda: timings,
    )
    network = Recorder(
        calls, "INetworkDefinition", num_inputs=1, get_input=lambda index: types.SimpleNamespace(name="image")
    )
    builder = Recorder(
        calls,
        "Builder",
        create_network=lambda flags: network,
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=lambda network, config: fails("no kernel for Rare") if "Rare" in read else b"plan",
    )
    error = types.SimpleNamespace(desc=lambda: "no importer for Frobnicate")
    parser = Recorder(
        calls,
        "OnnxParser",
        parse_from_file=parse,
        num_errors=1,
        get_error=lambda index: error,
    )

    class Logger:
        ERROR, WARNING = 1, 2

    stand_in = types.ModuleType("tensorrt")
    vars(stand_in).update(
        __version__="11.0.0",
        calls=calls,
        ILogger=Logger,
        Builder=lambda logger: loggers.append(logger) or builder,
        Runtime=lambda logger: loggers.append(logger) or runtime,
        OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=types.SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=types.SimpleNamespace(TF32="tf32"),
    )
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt, "_library", lambda: stand_in)
    monkeypatch.setattr(tensorrt, "device", lambda: tensorrt.Device("Some GPU", "9.0", 2 << 30))
    return stand_in


def built(tmp_path, operator="Relu"):
    source, target = tmp_path / "model.onnx", tmp_path / "model.engine"
    graph = f"g (float[batch,3,8,8] image) => (float[batch,3,8,8] scores) {{ scores = {operator}(image) }}"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {graph}'), source)
    tensorrt.convert(source, target, SPEC)
    return target


def test_the_engine_file_is_the_plan_and_its_description_is_next_to_it(library, tmp_path):
    target = built(tmp_path)
    assert target.read_bytes() == b"plan"
    about = json.loads(target.with_suffix(".json").read_text())
    assert (about["tensorrt"], about["gpu"]["name"]) == ("11.0.0", "Some GPU")
    assert about["metadata"] == {"checkpoint_sha256": "abc"}


def test_the_network_is_strongly_typed_and_float32_stays_float32(library, tmp_path):
    built(tmp_path)
    assert ("Builder.create_network", (2,)) in library.calls
    assert ("IBuilderConfig.clear_flag", ("tf32",)) in library.calls


def test_a_dynamic_batch_gets_a_profile_for_the_inputs_of_the_graph(library, tmp_path):
    built(tmp_path)
    shapes = [given for name, given in library.calls if name == "IOptimizationProfile.set_shape"]
    assert shapes == [("image", (1, 3, 8, 8), (40, 3, 8, 8), (80, 3, 8, 8))]
    order = [name for name, _ in library.calls]
    assert order.index("IBuilderConfig.add_optimization_profile") < order.index("Builder.build_serialized_network")


def test_the_workspace_is_bounded_by_what_is_free(library, tmp_path):
    built(tmp_path)
    assert ("IBuilderConfig.set_memory_pool_limit", ("workspace", 1 << 30)) in library.calls


def test_timings_of_the_first_build_serve_the_second(library, tmp_path):
    built(tmp_path)
    built(tmp_path)
    read = [given for name, given in library.calls if name == "IBuilderConfig.create_timing_cache"]
    assert read == [(b"",), (b"timings",)]


def test_what_the_parser_says_is_the_reason(library, tmp_path):
    with pytest.raises(RuntimeError, match="no importer for Frobnicate"):
        built(tmp_path, operator="Frobnicate")


def test_what_the_builder_says_is_the_reason_each_time(library, tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"built no engine: no kernel for Rare$"):
            built(tmp_path, operator="Rare")


def test_why_an_engine_is_refused_is_in_the_library_s_own_words(library, tmp_path):
    with pytest.raises(CannotRun, match=r"refuses the engine on Some GPU: it is for another GPU$"):
        tensorrt.load(built(tmp_path), SPEC, threads=1)


def test_weights_of_a_gru_that_are_stored_in_int8_become_the_floats_that_they_stand_for(tmp_path):
    """TensorRT's compiler fails on a loop with a `DequantizeLinear`."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install onnxruntime`")
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[3,2,4] x) => (float[3,1,2,5] y) { '
        "weights = DequantizeLinear<axis = 1>(w, scales) hidden = DequantizeLinear<axis = 1>(r, scales) "
        "y, last = GRU<hidden_size = 5>(x, weights, hidden) }"
    )
    draw = np.random.default_rng(0)
    steps = {name: draw.integers(-127, 128, (1, 15, size)).astype(np.int8) for name, size in (("w", 4), ("r", 5))}
    stored = steps | {"scales": draw.uniform(0.001, 0.01, 15).astype(np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in stored.items())
    x = {"x": draw.standard_normal((3, 2, 4)).astype(np.float32)}
    (expected,) = runtime.InferenceSession(model.SerializeToString()).run(None, x)
    assert in_float32(model, tmp_path)
    assert [node.op_type for node in model.graph.node] == ["GRU"]
    (answer,) = runtime.InferenceSession(model.SerializeToString()).run(None, x)
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
    assert not in_float32(model, tmp_path)
