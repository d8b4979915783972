"""An ONNX graph whose sizes are all known, for runtimes and generators that take no others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.spec import ExportSpec

if TYPE_CHECKING:
    import onnx


def with_sizes(source: Path, spec: ExportSpec, fixed: ExportSpec, *, without: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph with its dynamic axes at the sizes in `fixed`, and all that depends on constants alone folded.

    ONNX Runtime does both; it drops inputs that nothing reads.

    Args:
        source: The graph of `spec`.
        spec: Names its dynamic axes.
        fixed: The same signature without any.
        without: Names of ONNX Runtime's optimizers that are not to run.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # it warns that the file is for this machine, which is so of later levels only
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
    sized_values = [value for value in model.graph.value_info if value.name in made]  # those of what is gone have none
    set_values(model.graph.value_info, sized_values)
    return model


def set_values(field: Any, values: Iterable[Any]) -> None:
    """Give a repeated field of a message these values alone."""
    kept = list(values)
    del field[:]
    field.extend(kept)
