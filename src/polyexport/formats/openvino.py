"""OpenVINO IR: Intel's runtime for CPUs, GPUs and NPUs.

https://docs.openvino.ai/
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.format import Format, Loaded, OnDevice, Route, Snippet, Triton
from polyexport.formats.onnx import REMARK
from polyexport.spec import Arrays, ExportSpec, Runner

if TYPE_CHECKING:
    import onnx


def convert_onnx(source: Path, target: Path, spec: ExportSpec) -> None:
    """Read the ONNX graph."""
    import onnx

    openvino = without_telemetry()
    model = onnx.load(source, load_external_data=False)
    prepared = target.with_name("prepared.onnx")
    if changed := split_slices(model):
        onnx.save(model, prepared)
    try:
        save(openvino.convert_model(str(prepared if changed else source)), target, spec)
    finally:
        prepared.unlink(missing_ok=True)


def split_slices(model: onnx.ModelProto) -> bool:
    """Replace each Slice along one axis of known size that GatherElements reads by Split; returns whether any was.

    OpenVINO treats such a Slice as a no-op, and then refuses the sizes. A model with its weights in another file, which
    has to be next to it, is not changed.
    """
    import onnx
    from onnx import helper, numpy_helper

    gathered = {node.input[0] for node in model.graph.node if node.op_type == "GatherElements"}
    slices = [node for node in model.graph.node if node.op_type == "Slice" and node.output[0] in gathered]
    if not slices or any(each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer):
        return False
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.input, *inferred.value_info)}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    known |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    for node in slices:
        numbers = [numpy_helper.to_array(known[name]).ravel() for name in node.input[1:] if name in known]
        if len(numbers) != len(node.input) - 1 or len(numbers) < 3 or any(each.tolist() != [1] for each in numbers[3:]):
            continue
        (start, *more), (end, *_), (axis, *_) = (each.tolist() for each in numbers[:3])
        size = shapes[node.input[0]][axis].dim_value if node.input[0] in shapes else 0
        if more or not size:
            continue
        first, last, _ = slice(start, end).indices(size)
        name = node.output[0]
        parts = {f"{name}_before": first, name: last - first, f"{name}_after": size - last}
        kept = {part: length for part, length in parts.items() if length}
        lengths = numpy_helper.from_array(np.array(list(kept.values()), np.int64), f"{name}_lengths")
        model.graph.initializer.append(lengths)
        node.CopyFrom(helper.make_node("Split", [node.input[0], lengths.name], list(kept), axis=axis))
    return any(node.op_type == "Split" for node in slices)


def convert_torchscript(source: Path, target: Path, spec: ExportSpec) -> None:
    """Read the TorchScript trace."""
    import torch

    openvino = without_telemetry()
    shapes = [
        (openvino.PartialShape(list(tensor.sized(lambda _: -1))), openvino.Type(np.dtype(tensor.dtype)))
        for tensor in spec.inputs
    ]
    save(openvino.convert_model(torch.jit.load(str(source)), input=shapes), target, spec)


def without_telemetry() -> Any:
    """OpenVINO, which otherwise writes into the home folder on import, and reports each conversion to its vendor."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None makes the import fail
    import openvino

    return openvino


def halve(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the weights in float16."""
    save(without_telemetry().Core().read_model(source), target, spec, half=True)


def save(model: Any, target: Path, spec: ExportSpec, *remarks: str, half: bool = False) -> None:
    """Name inputs and outputs, embed metadata and remarks, and write `.xml` and `.bin`.

    `half` stores float32 weights in float16.
    """
    openvino = without_telemetry()
    _keep_order(model)
    for ports, tensors in ((model.inputs, spec.inputs), (model.outputs, spec.outputs)):
        if len(ports) == len(tensors):
            for port, tensor in zip(ports, tensors, strict=True):
                port.get_tensor().set_names({tensor.name})
    told = "; ".join(filter(None, remarks))
    for key, value in (*spec.metadata.items(), *([(REMARK, told)] if told else [])):
        model.set_rt_info(value, ["polyexport", key])
    if spec.labels:  # as OpenVINO's Model API reads them: separated by spaces, without spaces in them
        words = " ".join(re.sub(r"\s", "_", label) or "_" for label in spec.labels)
        model.set_rt_info(words, ["model_info", "labels"])
    _renumber(model)
    openvino.save_model(model, str(target), compress_to_fp16=half)


def _keep_order(model: Any) -> None:
    """Let sorts keep the order of equal elements, as in ONNX and in PyTorch's stable ones."""
    opset = without_telemetry().opset11
    for node in model.get_ordered_ops():
        told = node.get_attributes() if node.get_type_name() == "TopK" else {}
        if told.get("sort") != "value" or told.get("stable"):
            continue
        given = {name: told[name] for name in ("axis", "mode", "sort", "index_element_type")}
        kept = opset.topk(node.input_value(0), node.input_value(1), **given, stable=True, name=node.friendly_name)
        for port, its in zip(node.outputs(), kept.outputs(), strict=True):
            its.get_tensor().set_names(port.get_tensor().get_names())
            port.replace(its)


def _renumber(model: Any) -> None:
    """Renumber the nodes that OpenVINO named, in order, since its counter is global to the process."""
    nodes = model.get_ordered_ops()
    drawn = [node for node in nodes if re.fullmatch(rf"{node.get_type_name()}_\d+", node.friendly_name)]
    taken = {node.friendly_name for node in nodes} - {node.friendly_name for node in drawn}
    for index, node in enumerate(drawn):
        name = f"{node.get_type_name()}_{index}"
        node.friendly_name = f"{name}_" if name in taken else name


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the CPU; see `compiled`."""
    model = without_telemetry().Core().read_model(str(path))
    where = ["polyexport", REMARK]
    remark = model.get_rt_info(where).astype(str) if model.has_rt_info(where) else ""
    return Loaded(compiled(model, spec, threads=threads), remark=remark)


def compiled(model: Any, spec: ExportSpec, *, threads: int) -> Runner:
    """Run a model on the CPU; floats in float32, which some processors would round to bfloat16."""
    program = _compiled(model, threads)

    def run(inputs: Arrays) -> Arrays:
        answer = program(inputs)
        return {tensor.name: answer[tensor.name] for tensor in spec.outputs}

    return run


def _compiled(model: Any, threads: int) -> Callable[[Arrays], Any]:
    """Like `compiled`, with all outputs by index or name."""
    core = without_telemetry().Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
    program = core.compile_model(model, "CPU")
    known = set().union(*(port.get_names() for port in program.inputs))
    return lambda inputs: program({name: a for name, a in inputs.items() if name in known}, share_inputs=True)


def intermediates(path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
    """The output of each operation of the graph."""
    openvino = without_telemetry()
    model = openvino.Core().read_model(str(path))
    computed: set[str] = set()
    ports: list[Any] = []
    for node in model.get_ordered_ops():
        sources = {given.get_source_output().get_node().get_friendly_name() for given in node.inputs()}
        if node.get_type_name() == "Parameter" or not computed.isdisjoint(sources):
            computed.add(node.get_friendly_name())
            ports += [port for port in node.outputs() if node.get_type_name() not in ("Parameter", "Result")]
    ports = [port for port in ports if port.get_element_type().is_real()]
    results = [openvino.opset8.result(port) for port in ports]
    answers = _compiled(openvino.Model(results, model.get_parameters()), threads)(inputs)
    names = (f"{port.get_node().get_friendly_name()}:{port.get_index()}" for port in ports)
    return {name: answers[index].astype(np.float32) for index, name in enumerate(names)}


SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import openvino

# float32, as it was verified: by default some processors round to bfloat16
model = openvino.Core().compile_model("{{ path }}", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
batch = np.load("{{ batch }}")
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


def openvino_format(name: str, description: str, url: str, *routes: Route, **more: Any) -> Format:
    """A format whose artifact is OpenVINO's IR."""
    defaults: dict[str, Any] = {"load": load, "intermediates": intermediates}
    return Format(
        name=name,
        aliases=(name.replace("openvino", "ov"),),
        description=description,
        url=url,
        artifact="model.xml",
        graph="model.xml",
        routes=routes,
        targets=("server CPU",),
        snippets=SNIPPETS,
        on_device=OnDevice(("openvino",)),
        triton=Triton("openvino", "model.xml"),
        **(defaults | more),
    )


FORMATS = (
    openvino_format(
        "openvino",
        "OpenVINO IR, for Intel CPUs, GPUs and NPUs",
        "https://docs.openvino.ai/",
        Route("onnx", upstream="onnx", toolchain="openvino", convert=convert_onnx),
        Route("torchscript", upstream="torchscript", toolchain="openvino", convert=convert_torchscript),
    ),
    openvino_format(
        "openvino-fp16",
        "OpenVINO IR with its weights in float16, half the size",
        "https://docs.openvino.ai/2025/openvino-workflow/model-preparation/conversion-parameters.html",
        Route("openvino", upstream="openvino", toolchain="openvino", convert=halve),
        precision="float16",
    ),
)
