"""ONNX of opset 15, for runtimes and converters that have learnt nothing newer, X2Paddle among them.

https://onnx.ai/onnx/repo-docs/Versioning.html

It is traced anew rather than converted down: ONNX's own version converter lacks most steps back.
"""

from __future__ import annotations

from pathlib import Path

from polyexport.format import MODULE, Format, Route
from polyexport.formats.onnx import ON_DEVICE, SNIPPETS, TRITON, convert_trace, load
from polyexport.spec import ExportSpec


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace and translate the module with the TorchScript exporter."""
    convert_trace(source, target, spec, opset=15)


FORMAT = Format(
    name="onnx-opset15",
    description="ONNX graph of opset 15, for older runtimes and converters",
    url="https://onnx.ai/onnx/repo-docs/Versioning.html",
    artifact="model.onnx",
    routes=(Route("torchscript", upstream=MODULE, toolchain="onnx", convert=convert),),
    load=load,
    targets=("server CPU",),
    snippets=SNIPPETS,
    on_device=ON_DEVICE,
    triton=TRITON,
)
