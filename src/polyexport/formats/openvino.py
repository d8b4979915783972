"""OpenVINO IR: Intel's runtime for CPUs, GPUs and NPUs.

https://docs.openvino.ai/
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from polyexport.format import Format, Route, Runner, Snippet
from polyexport.spec import Arrays, ExportSpec


def convert_onnx(source: Path, target: Path, spec: ExportSpec) -> None:
    """Read the ONNX graph."""
    openvino = _without_telemetry()
    _save(openvino.convert_model(str(source)), target, spec)


def convert_torchscript(source: Path, target: Path, spec: ExportSpec) -> None:
    """Read the TorchScript trace."""
    import torch

    openvino = _without_telemetry()
    shapes = [
        (openvino.PartialShape(list(tensor.sized(lambda _: -1))), openvino.Type(np.dtype(tensor.dtype)))
        for tensor in spec.inputs
    ]
    _save(openvino.convert_model(torch.jit.load(str(source)), input=shapes), target, spec)


def _without_telemetry() -> Any:
    """OpenVINO, which otherwise writes into the home folder on import, and reports each conversion to its vendor."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the import system's own word for "not there"
    import openvino

    return openvino


def _save(model: Any, target: Path, spec: ExportSpec) -> None:
    """Name the ports, embed the metadata, write `.xml` and `.bin` in full precision."""
    openvino = _without_telemetry()
    for ports, tensors in ((model.inputs, spec.inputs), (model.outputs, spec.outputs)):
        if len(ports) == len(tensors):
            for port, tensor in zip(ports, tensors, strict=True):
                port.get_tensor().set_names({tensor.name})
    for key, value in spec.metadata.items():
        model.set_rt_info(value, ["polyexport", key])
    openvino.save_model(model, str(target), compress_to_fp16=False)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it on the CPU in float32, which some processors would otherwise round to bfloat16."""
    openvino = _without_telemetry()
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
    compiled = core.compile_model(str(path), "CPU")
    known = set().union(*(port.get_names() for port in compiled.inputs))

    def run(inputs: Arrays) -> Arrays:
        answer = compiled({name: array for name, array in inputs.items() if name in known}, share_inputs=True)
        return {tensor.name: answer[tensor.name] for tensor in spec.outputs}

    return run


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import openvino

# float32, as it was verified: by default some processors round to bfloat16
model = openvino.Core().compile_model("{{ path }}", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
batch = np.load("validation_batch.npz")
outputs = model({name: batch[name] for port in model.inputs for name in port.names if name in batch})
""",
    ),
    Snippet(
        "C++",
        """\
#include <openvino/openvino.hpp>

#include <cstring>

int main() {
  ov::Core core;
  // float32, as it was verified: by default some processors round to bfloat16
  auto model = core.compile_model("{{ path }}", "CPU", ov::hint::inference_precision(ov::element::f32));
  auto request = model.create_infer_request();
{%- for input in inputs %}
  ov::Tensor input{{ loop.index0 }}(ov::element::
    {{- input.dtype | replace("bool", "boolean") | replace("float", "f") | replace("int", "i") | replace("ui", "u") -}}
    , { {{- input.shape | join(", ") -}} });
  std::memset(input{{ loop.index0 }}.data(), 0, input{{ loop.index0 }}.get_byte_size());  // your data here
  request.set_tensor("{{ input.name }}", input{{ loop.index0 }});
{%- endfor %}
  request.infer();
{%- for name in outputs %}
  ov::Tensor output{{ loop.index0 }} = request.get_tensor("{{ name }}");
{%- endfor %}
}
""",
    ),
)


FORMAT = Format(
    name="openvino",
    aliases=("ov",),
    description="OpenVINO IR, for Intel CPUs, GPUs and NPUs",
    url="https://docs.openvino.ai/",
    artifact="model.xml",
    routes=(
        Route("onnx", upstream="onnx", toolchain="openvino", convert=convert_onnx),
        Route("torchscript", upstream="torchscript", toolchain="openvino", convert=convert_torchscript),
    ),
    load=load,
    snippets=_SNIPPETS,
)
