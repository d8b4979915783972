"""An ONNX graph with static sizes only, for runtimes and generators that support no others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.spec import ExportSpec

if TYPE_CHECKING:
    import onnx


def with_sizes(source: Path, spec: ExportSpec, fixed: ExportSpec, *, without: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph with its dynamic axes at the sizes in `fixed`, and with constants folded.

    ONNX Runtime does both; it removes inputs that nothing reads.

    Args:
        source: The graph of `spec`.
        spec: The signature with its dynamic axes.
        fixed: The same signature without dynamic axes.
        without: Names of ONNX Runtime's optimizers to disable.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # it warns that the file is specific to this machine, which is true of higher levels only
    options.log_severity_level = 3
    for tensor, sized in zip(spec.inputs, fixed.inputs, strict=True):
        for axis, name in tensor.dynamic.items():
            options.add_free_dimension_override_by_name(name, int(sized.shape[axis]))
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "model.onnx"))
        onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
        )
        model = onnx.load(options.optimized_model_filepath)
    made = {name for node in model.graph.node for name in node.output}
    # values that were removed have none
    sized_values = [value for value in model.graph.value_info if value.name in made]
    set_values(model.graph.value_info, sized_values)
    return model


def set_values(field: Any, values: Iterable[Any]) -> None:
    """Replace the values of a repeated field of a message."""
    kept = list(values)
    del field[:]
    field.extend(kept)
