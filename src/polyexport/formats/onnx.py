"""ONNX: the exchange format that most runtimes read, run here by ONNX Runtime.

https://onnx.ai/onnx/
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from polyexport.errors import line
from polyexport.format import MODULE, Format, Loaded, OnDevice, Route, Snippet, Triton
from polyexport.onnx_graph.names import generated_names, rename_inputs_outputs
from polyexport.spec import Arrays, ExportSpec, Runner, example
from polyexport.tracing.exported_program import load_program
from polyexport.tracing.in_place import functional

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    import torch

_PROTOBUF_LIMIT = 2_000_000_000  # an ONNX file is a protobuf message, which is limited to 2 GiB


def convert_program(source: Path, target: Path, spec: ExportSpec) -> None:
    """Translate the traced program with `torch.onnx`'s exporter for programs (`dynamo=True`)."""
    translate(load_program(source), target, spec)


def translate(program: torch.export.ExportedProgram, target: Path, spec: ExportSpec) -> None:
    """`convert_program` for a program in memory."""
    import torch

    program = _within_images(functional(program))
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    try:
        with _quickly():
            torch.onnx.export(
                program,
                (),
                target,
                dynamo=True,
                input_names=generated_names("input", len(spec.inputs)),
                output_names=generated_names("output", len(spec.outputs)),
                external_data=size > _PROTOBUF_LIMIT,
                verbose=False,
            )
    except Exception as error:  # the message is mostly on how to report it; the cause is at the end of the chain
        raise RuntimeError(_bottom(error)) from error
    _finish(target, spec)


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Translate without parsing the Python source of all 500 functions of the translation, which each export does anew.

    Its registry asks what their source says only for their domain, which they have without it.
    """
    from onnxscript import values

    parsed: Any = values.TracedOnnxFunction.function_ir
    with mock.patch.object(values.TracedOnnxFunction, "function_ir", property(partial(_Source, parsed))):
        yield


class _Source:
    """The `function_ir` of a function, parsed when more than its domain is needed."""

    def __init__(self, parsed: property, function: Any) -> None:
        self._parsed, self._function = parsed, function
        self.domain = function.opset.domain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parsed.__get__(self._function), name)


def _bottom(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return line(error)


def _within_images(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with average pools no larger than the padded image; EfficientNet has one of 1280 x 1280.

    What is outside has no effect, but OpenVINO refuses it, and other runtimes have to fill it with zeros.
    """
    import torch

    for node in program.graph.nodes:
        if node.target is torch.ops.aten.avg_pool2d.default and len(node.args) > 4 and node.args[4]:
            x, kernel, strides, padding, *rest = node.args
            room = [size + 2 * pad for size, pad in zip(x.meta["val"].shape[-2:], padding, strict=True)]
            if all(isinstance(size, int) for size in room):
                least = [min(pair) for pair in zip(kernel, room, strict=True)]
                node.args = (x, least, strides or kernel, padding, *rest)
    return program


def convert_trace(source: Path, target: Path, spec: ExportSpec, *, opset: int = 20) -> None:
    """Trace and translate the module with the TorchScript exporter, which supports some models that dynamo does not."""
    import torch

    from polyexport.capture import snapshot
    from polyexport.capture.calls import example_inputs
    from polyexport.tracing.decompositions import decomposed
    from polyexport.tracing.exportable import exportable

    loaded = snapshot.load(source, spec.output_names)
    with torch.no_grad(), decomposed(), exportable(loaded, dynamic=spec.is_dynamic) as model:
        _translated(model, example_inputs(source, spec), target, spec, opset)


def convert_script(source: Path, target: Path, spec: ExportSpec, *, opset: int = 20) -> None:
    """Translate the TorchScript file, whose branches become `If` and whose loops `Loop`."""
    import torch

    inputs = tuple(map(torch.from_numpy, example(spec).values()))
    with torch.no_grad():
        _translated(torch.jit.load(str(source)), inputs, target, spec, opset)


def _translated(model: Any, inputs: tuple[torch.Tensor, ...], target: Path, spec: ExportSpec, opset: int) -> None:
    import torch

    signature = {"input": spec.inputs, "output": spec.outputs}
    named = {
        kind: dict(zip(generated_names(kind, len(tensors)), tensors, strict=True))
        for kind, tensors in signature.items()
    }
    axes = {name: tensor.dynamic for tensors in named.values() for name, tensor in tensors.items() if tensor.dynamic}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is used as a fallback on purpose
        torch.onnx.export(
            model,
            inputs,
            str(target),
            dynamo=False,
            input_names=list(named["input"]),
            output_names=list(named["output"]),
            dynamic_axes=axes,
            opset_version=opset,
            verbose=False,
        )
    _finish(target, spec)


def _finish(path: Path, spec: ExportSpec) -> None:
    """Give inputs, outputs and dynamic axes their names, and the file its metadata."""
    import onnx

    model = _drawing_ones(onnx.load(path, load_external_data=False))
    inputs = dict(zip(generated_names("input", len(spec.inputs)), spec.input_names, strict=True))
    rename_inputs_outputs(model, inputs, spec.output_names)
    named = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    for value in (*model.graph.input, *model.graph.output):
        _name_axes(value, named[value.name].dynamic)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        _forget_code(nodes)
    onnx.helper.set_model_props(model, spec.embedded)
    onnx.save(model, path)


# Not by its definition in the standard, which is one with the probability that it should be zero.
_BERNOULLI = "Bernoulli (p) => (y) { drawn = RandomUniformLike (p) is_one = Less (drawn, p) y = CastLike (is_one, p) }"


def _drawing_ones(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with Bernoulli decomposed, since ONNX Runtime computes it by its definition."""
    from polyexport.onnx_graph.decompose import decomposed

    if not any(node.op_type == "Bernoulli" for node in model.graph.node):
        return model
    return decomposed(model, [_BERNOULLI], lambda node: not node.attribute)


def _forget_code(nodes: Iterable[onnx.NodeProto]) -> None:
    """Remove what the exporter notes at each node but its layer: lines of the user's code with their paths.

    That is up to two thirds of the file of a small model.
    """
    for node in nodes:
        layer = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(layer)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _forget_code(graph.node)


def save(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str], *remarks: str, shortfall: str = "") -> None:
    """Write a model with metadata and remarks; weights too large for one file go into a second one."""
    import onnx

    told = {REMARK: "; ".join(filter(None, remarks)), SHORTFALL: shortfall}
    onnx.helper.set_model_props(model, {**metadata, **{key: text for key, text in told.items() if text}})
    apart = model.ByteSize() > _PROTOBUF_LIMIT
    onnx.save(model, path, save_as_external_data=apart, location=f"{path.name}.data" if apart else None)


def _name_axes(value: onnx.ValueInfoProto, names: dict[int, str]) -> None:
    for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
        if axis in names and not dimension.HasField("dim_value"):
            dimension.dim_param = names[axis]


REMARK, SHORTFALL = "polyexport_remark", "polyexport_shortfall"
"""Metadata entries for `Loaded.remark` and `Loaded.shortfall`, such as which operators stay in float."""


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with ONNX Runtime on the CPU."""
    session = _session(path, threads=threads)
    told = session.get_modelmeta().custom_metadata_map
    return Loaded(_runner(session), remark=told.get(REMARK, ""), shortfall=told.get(SHORTFALL, ""))


def opened(path: Path, *, threads: int) -> Runner:
    """`load` as a plain runner, for converters."""
    return _runner(_session(path, threads=threads))


def _session(path: Path, *, threads: int) -> onnxruntime.InferenceSession:
    # opts out of telemetry: since 1.32 it contacts its vendor's host and writes a device id into the home folder
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _runner(session: onnxruntime.InferenceSession) -> Runner:
    outputs = [output.name for output in session.get_outputs()]
    wanted = {given.name for given in session.get_inputs()}

    def run(inputs: Arrays) -> Arrays:
        # inputs that forward never reads are not in the graph
        feed = {name: array for name, array in inputs.items() if name in wanted}
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return run


def intermediates(path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
    """The output of each node of the graph; ONNX Runtime does not fuse nodes across tensors that it has to return."""
    import onnx

    model = onnx.load(path)
    computed = {given.name for given in model.graph.input}
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if not computed.isdisjoint(node.input):
            computed.update(filter(None, node.output))
            model.graph.output.extend(
                onnx.ValueInfoProto(name=name) for name in node.output if name and name not in outputs
            )
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model.onnx"), {})
        session = _session(Path(folder, "model.onnx"), threads=threads)
    kinds = {output.name: output.type for output in session.get_outputs()}
    order = [name for node in model.graph.node for name in node.output if kinds.get(name) in _FLOATS]
    feed = {given.name: inputs[given.name] for given in session.get_inputs()}
    return {name: array.astype("float32") for name, array in zip(order, session.run(order, feed), strict=True)}


_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")

SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{{ path }}")
batch = np.load("{{ batch }}")
inputs = {each.name: batch[each.name] for each in session.get_inputs()}
outputs = session.run({{ outputs | tojson }}, inputs)
""",
    ),
)


def onnx_format(name: str, description: str, url: str, *routes: Route, **more: Any) -> Format:
    """A format whose artifact is an ONNX file, which ONNX Runtime runs."""
    defaults: dict[str, Any] = {"load": load, "intermediates": intermediates, "targets": ("server CPU",)}
    return Format(
        name=name,
        description=description,
        url=url,
        artifact="model.onnx",
        graph="model.onnx",
        routes=routes,
        snippets=SNIPPETS,
        on_device=OnDevice(("onnxruntime",)),
        triton=Triton("onnxruntime", "model.onnx"),
        **(defaults | more),
    )


FORMAT = onnx_format(
    "onnx",
    "ONNX graph, for ONNX Runtime and most other runtimes",
    "https://onnx.ai/onnx/",
    Route("dynamo", upstream="pt2", toolchain="onnx", convert=convert_program),
    Route("torchscript", upstream=MODULE, toolchain="onnx", convert=convert_trace),
    Route("script", upstream="torchscript", toolchain="onnx", convert=convert_script),
)
