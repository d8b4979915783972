"""MNN: a model for Alibaba's engine for phones and small devices, run here by its own runtime.

https://mnn-docs.readthedocs.io/en/latest/

Converted by the compiled converter alone: the Python command around it installs packages and reports to its makers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polyexport.format import Format, Route, Runner, Snippet
from polyexport.spec import Arrays, ExportSpec


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Translate the ONNX graph."""
    import _tools  # the wheel's own name for it

    words = ("--framework", "ONNX", "--modelFile", source, "--MNNModel", target, "--bizCode", "polyexport")
    _tools.mnnconvert(["mnnconvert", *map(str, words)])  # says True even where it wrote nothing, which the worker sees


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it with MNN on the CPU, in full precision; what it has no type for (int64, bool) travels as int32."""
    import MNN

    kinds: dict[str, Any] = {"f": (MNN.expr.float, np.float32)}
    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
    names = MNN.nn.load_module_from_file(str(path), [], []).get_info()["inputNames"]
    module = MNN.nn.load_module_from_file(str(path), names, list(spec.output_names), runtime_manager=manager)

    def given(array: np.ndarray) -> Any:
        kind, dtype = kinds.get(array.dtype.kind, (MNN.expr.int, np.int32))
        return MNN.expr.const(np.ascontiguousarray(array, dtype), list(array.shape), MNN.expr.NCHW, kind)

    def run(inputs: Arrays) -> Arrays:
        answers = module.forward([given(inputs[name]) for name in names])
        return {
            tensor.name: np.array(MNN.expr.convert(answer, MNN.expr.NCHW).read(), tensor.dtype)
            for tensor, answer in zip(spec.outputs, answers, strict=True)
        }

    return run


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import MNN
import numpy as np

batch = np.load("validation_batch.npz")
manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 4},))
names = {{ names | tojson }}
module = MNN.nn.load_module_from_file("{{ path }}", names, {{ outputs | tojson }}, runtime_manager=manager)
kinds = {"f": MNN.expr.float, "i": MNN.expr.int}  # int64 and bool travel as int32
inputs = [batch[name] if batch[name].dtype.kind == "f" else batch[name].astype("int32") for name in names]
answers = module.forward([MNN.expr.const(x, list(x.shape), MNN.expr.NCHW, kinds[x.dtype.kind]) for x in inputs])
outputs = [np.array(answer.read()) for answer in answers]
""",
    ),
)


FORMAT = Format(
    name="mnn",
    description="MNN model, for phones and small devices",
    url="https://mnn-docs.readthedocs.io/en/latest/",
    artifact="model.mnn",
    routes=(Route("onnx", upstream="onnx", toolchain="mnn", convert=convert),),
    load=load,
    snippets=_SNIPPETS,
)
