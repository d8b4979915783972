"""ONNX in half precision, for GPUs, NPUs and processors that compute in it; inputs and outputs stay float32.

https://onnxruntime.ai/docs/performance/model-optimizations/float16.html

Operators whose values leave float16's range on real batches, and those without a float16 kernel, stay in float32; the
file's metadata lists them. ONNX Runtime on x86 has few float16 kernels, and casts around the others.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polyexport.format import Route
from polyexport.formats.onnx import onnx_format, save
from polyexport.formats.onnx_quantized import beyond, ranges
from polyexport.measure.weights import counted
from polyexport.spec import ExportSpec

if TYPE_CHECKING:
    import onnx

_GREATEST = float(np.finfo(np.float16).max) / 2
"""Values above half of float16's maximum stay float32, since other batches may have larger ones."""


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store and compute in float16 what stays within its range."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    wide = beyond(model, ranges(source, spec), _GREATEST)
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=[node.name for node in wide])
    _keep_wide(half)
    found = Counter(node.op_type for node in wide)
    save(
        half, target, spec.embedded, f"in float32, since their values exceed float16: {counted(found)}" if found else ""
    )


def _keep_wide(model: onnx.ModelProto) -> None:
    """Remove casts to float16 and back, which the converter adds between two nodes that stay float32."""
    from onnx import TensorProto
    from onnxruntime.transformers.onnx_model import OnnxModel

    float32 = {each.name for each in model.graph.value_info if each.type.tensor_type.elem_type == TensorProto.FLOAT}
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    narrow = {name: node.input[0] for name, node in casts.items() if node.attribute[0].i == TensorProto.FLOAT16}
    wide = {
        name: narrow[node.input[0]]
        for name, node in casts.items()
        if node.attribute[0].i == TensorProto.FLOAT and narrow.get(node.input[0]) in float32
    }
    for node in model.graph.node:
        node.input[:] = [wide.get(name, name) for name in node.input]
    whole = OnnxModel(model)
    whole.prune_graph()
    whole.topological_sort()


FORMAT = onnx_format(
    "onnx-fp16",
    "ONNX graph in half precision, for GPUs and NPUs",
    "https://onnxruntime.ai/docs/performance/model-optimizations/float16.html",
    Route("onnxruntime", "onnx", "onnx", convert),
    precision="float16",
    targets=("GPU",),
    calibrated=True,
)
