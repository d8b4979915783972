"""ONNX of opset 15, for runtimes and converters that support nothing newer, such as X2Paddle.

https://onnx.ai/onnx/repo-docs/Versioning.html

It is traced again rather than converted down, since ONNX's version converter lacks most downgrades.
"""

from __future__ import annotations

from pathlib import Path

from polyexport.format import MODULE, Route
from polyexport.formats.onnx import convert_trace, onnx_format
from polyexport.spec import ExportSpec


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace and translate the module with the TorchScript exporter."""
    convert_trace(source, target, spec, opset=15)


FORMAT = onnx_format(
    "onnx-opset15",
    "ONNX graph of opset 15, for older runtimes and converters",
    "https://onnx.ai/onnx/repo-docs/Versioning.html",
    Route("torchscript", upstream=MODULE, toolchain="onnx", convert=convert),
)
