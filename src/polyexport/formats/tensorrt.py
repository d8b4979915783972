"""TensorRT: an engine built for one NVIDIA GPU and one version of the library, in float32 and in float16.

https://docs.nvidia.com/deeplearning/tensorrt/latest/

Requirements:
* Networks are strongly typed, which TensorRT 10 supports and 11 requires: precision is in the ONNX graph, and float16
  comes from `onnx-fp16`, a float16 graph with float32 inputs and outputs.
* The library comes from the training environment: its PyPI package downloads from the vendor's index, and the right
  build depends on the driver, so it is not installed automatically.
* The engine file is a plain plan, as trtexec and Triton read it; the GPU and version that it was built for, and the
  user's metadata, are in a file next to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.errors import CannotRun, ToolMissing
from polyexport.format import Format, Loaded, Observed, OnDevice, Route, Snippet, Triton
from polyexport.onnx_graph.recurrent_weights import in_float32
from polyexport.onnx_graph.uint8_inputs import cast_early
from polyexport.spec import Arrays, ExportSpec, Precision
from polyexport.workers import gpu
from polyexport.workers.gpu import Device, device

_WORKSPACE = 4 << 30
"""Bytes of GPU memory that the builder may use for one layer, at most half of what is free."""


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Build an engine from the ONNX graph."""
    _build_here(source, target, spec, _library())


def _library() -> Any:
    """The `tensorrt` module.

    Raises:
        ToolMissing: there is no GPU, or no library.
    """
    if why := gpu.missing():
        raise ToolMissing(why)
    try:
        import onnx  # noqa: F401  # before tensorrt, which would load a protobuf that is incompatible with onnx
        import tensorrt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise
        raise ToolMissing(_NO_LIBRARY) from None
    return tensorrt


_NO_LIBRARY = (
    "TensorRT is not in the training environment: `pip install tensorrt-cu13` (or -cu12, as the driver's CUDA)"
)


def lacks() -> str:
    """What is missing if there is no GPU or no library, in a line."""
    return gpu.missing() or ("" if find_spec("tensorrt") else _NO_LIBRARY)


def _build_here(source: Path, target: Path, spec: ExportSpec, trt: Any) -> None:
    """Build for this machine's GPU, with the timing cache of earlier builds."""
    here = device()
    timings = _timings_file(here, trt)

    def settle(config: Any) -> None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, min(_WORKSPACE, here.free_bytes // 2))
        config.set_timing_cache(config.create_timing_cache(timings.read_bytes() if timings.exists() else b""), False)

    config = build(source, target, spec, trt, {"tensorrt": trt.__version__, "gpu": asdict(here)}, settle)
    timings.parent.mkdir(parents=True, exist_ok=True)
    timings.write_bytes(bytes(config.get_timing_cache().serialize()))


def build(
    source: Path,
    target: Path,
    spec: ExportSpec,
    trt: Any,
    about: Mapping[str, Any],
    settle: Callable[[Any], None] = lambda config: None,
) -> Any:
    """Write the plan of an ONNX graph, and a JSON file next to it with what it was built for.

    Args:
        source: The ONNX graph, whose types the engine keeps.
        target: The plan's file.
        spec: The signature; a dynamic axis gets a profile.
        trt: The library, TensorRT or one with its interface.
        about: Entries of the JSON file besides the metadata.
        settle: Sets device-dependent options of the builder's configuration.

    Returns:
        The builder's configuration after the build.

    Raises:
        RuntimeError: the parser refuses the graph, or the builder fails.
    """
    logger = _logger(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(source, network, trt, logger)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 has only ten bits of mantissa
    settle(config)
    if any(tensor.dynamic for tensor in spec.inputs):
        config.add_optimization_profile(_profile(builder.create_optimization_profile(), network, spec))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT built no engine: {logger.said()}")
    target.write_bytes(bytes(plan))
    text = json.dumps({**about, "metadata": spec.embedded}, indent=2)
    target.with_suffix(".json").write_text(text, encoding="utf-8")
    return config


@cache
def _logger(trt: Any) -> Any:
    """The logger of this process: TensorRT keeps the first that it is given, and says in no other way why it fails.

    It writes warnings and errors to stderr, and keeps the errors.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # a class of a library that is imported at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                print(text, file=sys.stderr, flush=True)
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)

        def said(self) -> str:
            return "; ".join(self.errors) or "it gives no reason"

    return Logger()


def _parse(source: Path, network: Any, trt: Any, logger: Any) -> None:
    parser = trt.OnnxParser(network, logger)
    rewritten = _rewritten(source)
    read = parser.parse_from_file(str(source)) if rewritten is None else parser.parse(rewritten, str(source))
    if not read:
        said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT cannot read the ONNX graph: {said}")


def _rewritten(source: Path) -> bytes | None:
    """The graph without what TensorRT refuses; None if there is nothing of it.

    * Only Cast takes uint8: https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/data-types.html
    * The compiler fails on loops of GRUs with a `DequantizeLinear` of their weights (TensorRT for RTX 1.7).
    """
    import onnx

    model = onnx.load(source, load_external_data=False)  # the parser finds it by the graph's path
    changed = [cast_early(model), in_float32(model, source.parent)]
    return model.SerializeToString() if any(changed) else None


def _profile(profile: Any, network: Any, spec: ExportSpec) -> Any:
    """The minimum, optimal and maximum shape of each input; the optimal one is that of the validation batch."""
    present = {network.get_input(index).name for index in range(network.num_inputs)}
    for tensor in spec.inputs:
        if tensor.name in present:
            profile.set_shape(tensor.name, *(tensor.sized(sizes.__getitem__) for sizes in _bounds(spec)))
    return profile


def _bounds(spec: ExportSpec) -> tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int]]:
    """The minimum, optimal and maximum size of each dynamic axis."""
    return dict.fromkeys(spec.sizes, 1), spec.sizes, spec.upper_bounds(64)


def _timings_file(device: Device, trt: Any) -> Path:
    """Path of the timing cache, which is valid for one GPU and one version."""
    from polyexport.workers.toolchain import cache_folder

    name = f"{device.name}-{device.capability}-{trt.__version__}".replace(" ", "-").replace("/", "-")
    return cache_folder() / "tensorrt" / f"{name}.timing"


# --- running ----------------------------------------------------------------------------------------------------------


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the first GPU."""
    return run_engine(path, spec, _library(), device())


def run_engine(path: Path, spec: ExportSpec, trt: Any, on: Device) -> Loaded:
    """Run a plan on the GPU; a call returns when the outputs are in host memory.

    Raises:
        CannotRun: the library refuses the plan.
    """
    import torch

    logger = _logger(trt)
    logger.errors.clear()
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise CannotRun(f"TensorRT refuses the engine on {on.name}: {logger.said()}")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch.cuda is typed in part

    def run(inputs: Arrays) -> Arrays:
        with torch.cuda.stream(stream):
            held = {name: torch.from_numpy(np.asarray(inputs[name], order="C")).cuda() for name in given}
            for name, tensor in held.items():
                context.set_input_shape(name, tuple(tensor.shape))
            for name in names:
                if name not in held:
                    dtype = torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype
                    held[name] = torch.empty(_known(context, name), dtype=dtype, device="cuda")
                context.set_tensor_address(name, held[name].data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(f"TensorRT did not run the engine: {logger.said()}")
            answer = {name: held[name].cpu() for name in names if name not in given}
        stream.synchronize()
        return {tensor.name: answer[tensor.name].numpy() for tensor in spec.outputs}

    return Loaded(run, observed=lambda: Observed(device=on.name))


def _known(context: Any, name: str) -> tuple[int, ...]:
    shape = tuple(context.get_tensor_shape(name))
    if min(shape, default=0) < 0:
        raise CannotRun(f"the shape of {name} depends on values, which is not supported here")
    return shape


SNIPPETS = (
    Snippet(
        "C++",
        """\
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << text << std::endl;
  }
};

int main() {
  std::ifstream file("{{ path }}", std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
  std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(bytes.data(), bytes.size())};
  std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};
{%- for input in inputs %}
  context->setInputShape(
      "{{ input.name }}", nvinfer1::Dims{ {{- input.shape | length }}, { {{- input.shape | join(", ") -}} }});
{%- endfor %}
  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    const char* name = engine->getIOTensorName(i);
    const nvinfer1::Dims shape = context->getTensorShape(name);
    size_t count = 8;  // bytes of the widest element
    for (int axis = 0; axis < shape.nbDims; ++axis) count *= shape.d[axis];
    void* buffer = nullptr;
    cudaMalloc(&buffer, count);
    cudaMemset(buffer, 0, count);  // of an input: cudaMemcpy your data to it, and an output's from it
    context->setTensorAddress(name, buffer);
  }
  context->enqueueV3(nullptr);
  cudaDeviceSynchronize();
}
""",
    ),
    Snippet(
        "Python",
        """\
import numpy as np
import polyexport

run = polyexport.load("{{ path | replace("/model.engine", "") }}")  # TensorRT's own API takes buffers, as in C++
outputs = run(dict(np.load("{{ batch }}")))
""",
    ),
)


def _format(name: str, upstream: str, precision: Precision, description: str, **more: Any) -> Format:
    return Format(
        name=name,
        description=description,
        url="https://docs.nvidia.com/deeplearning/tensorrt/latest/",
        artifact="model.engine",
        precision=precision,
        # a layered environment sees the training environment's library
        routes=(Route("onnx", upstream, "onnx", convert),),
        load=load,
        targets=("GPU",),
        triton=Triton("tensorrt_plan", "model.plan", is_platform=True),
        uses_gpu=True,
        lacks=lacks,
        snippets=SNIPPETS,
        on_device=OnDevice(("tensorrt", "torch")),
        **more,
    )


FORMATS = (
    _format(
        "tensorrt",
        "onnx",
        "float32",
        "TensorRT engine, for the NVIDIA GPU it was built on",
        aliases=("engine", "trt"),
    ),
    _format("tensorrt-fp16", "onnx-fp16", "float16", "TensorRT engine in half precision"),
    _format("tensorrt-int8", "onnx-int8-symmetric", "int8", "TensorRT engine in int8", calibrated=True),
)
