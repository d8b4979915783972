"""TensorRT for RTX: an engine that runs on any NVIDIA RTX GPU, built ahead of time on a machine without one.

https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/

Requirements:
* Builder, parser and engine have TensorRT's interface, so most of this is in `polyexport.formats.tensorrt`.
* The engine runs on GPUs from Ampere on (compute capability 8.0), but not on Hopper (9.0). It is compiled completely
  when it is first loaded.
* The library is NVIDIA's, under its own license; it is installed only if this format is asked for by name.
* A GPU is only needed to run the engine: without one it is `unverified`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from polyexport.errors import CannotRun
from polyexport.format import Format, Loaded, OnDevice, Route
from polyexport.formats.tensorrt import SNIPPETS, build, run_engine
from polyexport.spec import ExportSpec, Precision
from polyexport.workers import gpu
from polyexport.workers.gpu import device

_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0 and later")
"""The compute capabilities that an engine runs on unless others are asked for: from Ampere on, but not Hopper."""


def _library() -> Any:
    """TensorRT for RTX, whose bindings find its shared libraries only if those are loaded already."""
    import ctypes

    import onnx  # noqa: F401  # before TensorRT, which would load a protobuf that is incompatible with onnx
    import tensorrt_rtx_libs

    (folder,) = tensorrt_rtx_libs.__path__
    libraries = sorted(Path(folder).glob("*.so*"), key=lambda file: "parser" in file.name)
    for library in libraries:  # the parser last, since it needs the other
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Build an engine from the ONNX graph."""
    trt = _library()
    build(source, target, spec, trt, {"tensorrt_rtx": trt.__version__, "gpus": _CAPABILITIES})


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the first GPU.

    Raises:
        CannotRun: there is no GPU, or the library does not support it.
    """
    if why := gpu.missing():
        raise CannotRun(f"cannot be run here: {why}")
    return run_engine(path, spec, _library(), device())


def lacks() -> str:
    """What is missing on platforms without the library, in a line."""
    return "" if sys.platform == "linux" else f"TensorRT for RTX is supported on Linux only, and this is {sys.platform}"


def _format(name: str, upstream: str, precision: Precision, description: str, **more: Any) -> Format:
    return Format(
        name=name,
        description=description,
        url="https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/",
        artifact="model.engine",
        precision=precision,
        routes=(Route("onnx", upstream, "tensorrt_rtx", convert),),
        load=load,
        targets=("GPU",),
        uses_gpu=True,
        lacks=lacks,
        snippets=SNIPPETS,
        on_device=OnDevice(("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs", "torch", "onnx")),
        **more,
    )


FORMATS = (
    _format("tensorrt-rtx", "onnx", "float32", "TensorRT for RTX engine, for NVIDIA GPUs from Ampere on"),
    _format("tensorrt-rtx-fp16", "onnx-fp16", "float16", "TensorRT for RTX engine in half precision"),
    _format("tensorrt-rtx-int8", "onnx-int8-symmetric", "int8", "TensorRT for RTX engine in int8", calibrated=True),
)
