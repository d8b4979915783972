"""ONNX of opset 15, for runtimes and converters that have learnt nothing newer, X2Paddle among them.

https://onnx.ai/onnx/repo-docs/Versioning.html

It is traced anew rather than converted down: ONNX's own version converter lacks most steps back.
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
