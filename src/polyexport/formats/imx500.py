"""IMX500: an int8 network for Sony's image sensor, which computes it next to its pixels.

https://developer.aitrios.sony-semicon.com/en/docs/raspberry-pi-ai-camera/imx500-converter

Requirements:
* Sony's Model Compression Toolkit quantizes it, with ranges from `spec.calibration`. It knows PyTorch's layers only, so
  the program of `torch.export` is written as such layers; for one row, since a sensor takes one image at a time.
* Sony's converter compiles what it makes, an ONNX graph with quantizers of its own. The archive of the converter is
  what `imx500-package` on the Raspberry Pi makes a camera's file from.
* Nothing here runs a compiled network, so what is verified is that ONNX graph, on the CPU. It lies next to the archive,
  with the converter's report of memory.
* The converter is a Java program with Sony's own license; it is installed if this format is asked for by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np

from polyexport.errors import ToolMissing, line
from polyexport.format import Format, Loaded, Observed, Route, Snippet
from polyexport.spec import Arrays, ExportSpec, calibration, in_rows, row_remark
from polyexport.tracing.constants import constants, fold
from polyexport.tracing.exported_program import export_program, load_program
from polyexport.tracing.image_operators import with_image_operators
from polyexport.workers import programs

if TYPE_CHECKING:
    import torch

URL = "https://developer.aitrios.sony-semicon.com/en/docs/raspberry-pi-ai-camera/imx500-converter"

GRAPH = "model.onnx"
MEMORY = "memory.json"


def lacks() -> str:
    """What is missing if there is no Java, or Python is too new, in a line."""
    if sys.version_info >= (3, 13):
        return (
            f"Sony's converter is made for Python up to 3.12, and this is {sys.version_info[0]}.{sys.version_info[1]}"
        )
    if not shutil.which("java"):
        return "java is not on PATH, in which Sony's converter runs: packages such as openjdk-17-jre-headless have it"
    return ""


# --- conversion -------------------------------------------------------------------------------------------------------


_SAID = 200
"""Characters of what the toolkit raised that are told: it prints its graph behind the cause."""


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Quantize the program for one row, and compile it.

    Raises:
        ToolMissing: there is no Java, or Python is too new.
        RuntimeError: the toolkit lacks what it needs, or the converter refuses it; then the message is the converter's.
    """
    if why := lacks():
        raise ToolMissing(why)
    graph = target.with_name(GRAPH)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder  # else matplotlib, which the toolkit imports, writes ~/.config/matplotlib
        try:
            quantize(source, graph, spec.one_row())
        except Exception as error:
            why = beyond(load_program(source), spec) or f"Sony's toolkit fails on it, with {line(error, _SAID)}"
            raise RuntimeError(why) from error
    _compile(graph, target)


def beyond(program: torch.export.ExportedProgram, spec: ExportSpec) -> str:
    """What the toolkit is known to lack of a program that it failed on, in a line; empty if nothing."""
    recurrent = {"aten::lstm": "LSTM", "aten::gru": "GRU", "aten::rnn_tanh": "RNN", "aten::rnn_relu": "RNN"}
    names = {each.target._schema.name for each in program.graph.nodes if hasattr(each.target, "_schema")}
    if found := sorted({layer for name, layer in recurrent.items() if name in names}):
        return f"Sony's toolkit does not support recurrent layers, and the model has {', '.join(found)}"
    if whole := [f"{each.name} ({each.dtype})" for each in spec.inputs if np.dtype(each.dtype).kind in "iub"]:
        return f"Sony's toolkit makes every input float32, and the model reads integers: {', '.join(whole)}"
    return ""


def quantize(source: Path, target: Path, one: ExportSpec) -> None:
    """Write the ONNX graph of the quantized program, which is for one row."""
    import torch

    _declare_operators()
    import model_compression_toolkit as toolkit

    batches = [[torch.from_numpy(arrays[name]) for name in one.input_names] for arrays in calibration(one)]

    def rows() -> Iterator[list[torch.Tensor]]:
        yield from batches

    module = with_image_operators(load_program(source).module())
    program = export_program(module, batches[0], [()] * len(batches[0]))
    quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
        in_module=layers(program),
        representative_data_gen=rows,
        target_platform_capabilities=toolkit.get_target_platform_capabilities("pytorch", "imx500"),
    )
    # it exports TorchScript's graph, which newer versions of PyTorch have to be asked for
    exporter, torch.onnx.export = torch.onnx.export, partial(torch.onnx.export, dynamo=False)
    try:
        toolkit.exporter.pytorch_export_model(
            model=quantized, save_model_path=str(target), repr_dataset=rows, output_names=list(one.output_names)
        )
    finally:
        torch.onnx.export = exporter


def _declare_operators() -> None:
    """Declare the operators that torchvision describes at import, if it cannot load its own.

    Its wheel on PyPI is built for the torch on PyPI, and next to a build for CPUs its library does not load.
    """
    import torch

    found = find_spec("torchvision")
    assert found is not None, "it is in the toolchain"
    assert found.origin is not None, "it is a package"
    try:
        for file in Path(found.origin).parent.glob("_C.*"):
            torch.ops.load_library(file)
    except OSError:
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _declared[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared: list[Any] = []
"""What is declared, which is so as long as it is referenced."""


def _compile(graph: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--input-path", str(graph), "--output-dir", folder, "--overwrite-output"]
        done = programs.run([str(Path(sys.prefix, "bin", "imxconv-pt")), *words])
        if done.returncode or not Path(folder, "packerOut.zip").exists():
            raise RuntimeError(f"Sony's converter refuses it: {_why(done.stdout + done.stderr)}")
        _pack(Path(folder, "packerOut.zip"), target)
        (memory,) = Path(folder).glob("*_MemoryReport.json")
        shutil.copyfile(memory, target.with_name(MEMORY))


def _pack(source: Path, target: Path) -> None:
    """Copy the converter's archive without the time at which it was made."""
    with ZipFile(source) as made, ZipFile(target, "w", ZIP_DEFLATED) as kept:
        for name in made.namelist():
            content = made.read(name)
            if name == "manifest.json":
                content = re.sub(rb'("Date Info": )"[^"]*"', rb'\1""', content)
            kept.writestr(ZipInfo(name), content, ZIP_DEFLATED)


def _why(said: str) -> str:
    """The first error that the converter prints, without its time."""
    errors = re.findall(r"ERROR ?: (?:CODE: )?(.*?)\s*(?:\[/\S+\])?$", said, re.MULTILINE)
    nodes = re.findall(
        r"^Node \[\S+\] op: (\w+), id: (\S+),.*\n\s*(?:.*reason: )?(.*?)\s*(?:\[/\S+\])?$", said, re.MULTILINE
    )
    if errors and nodes:  # what it lists below its first line
        return "; ".join(dict.fromkeys(f"{kind} {name}: {what}" for kind, name, what in nodes[:3]))
    return errors[0] if errors else "see its output in the log"


# --- the program as layers --------------------------------------------------------------------------------------------


def layers(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program with layers and functions of PyTorch in place of its operators, which the toolkit does not know."""
    import torch

    module = program.module(check_guards=False)
    fold(module, constants(module))  # the toolkit takes what it has to compute of weights for activations
    graph = torch.fx.GraphModule(module, module.graph)
    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if name == "slice" and node.args[0].meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
            continue
        make = _LAYERS.get(name)
        layer = make(_arguments(node, graph)) if make else None
        if layer is None:
            node.target = _function(name, len(node.target._schema.returns)) or node.target
            if name == "squeeze":  # TorchScript's exporter makes a branch of it where it does not know the sizes
                node.target, node.args = torch.reshape, (node.args[0], list(map(int, node.meta["val"].shape)))
            continue
        graph.add_submodule(node.name, layer.eval())
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(_call(node, layer, graph.graph), propagate_meta=True)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _call(node: torch.fx.Node, layer: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.Node:
    """The call of the layer that replaces a node; with an axis more than the node has where the converter needs it.

    It takes convolutions of two axes only, and linear layers of two axes or four.
    """
    import torch

    x, shape = node.args[0], list(map(int, node.meta["val"].shape))
    if len(shape) != 3 or not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
        return graph.call_module(node.name, (x,))
    if isinstance(layer, torch.nn.Linear):
        sizes = (shape[0], 1, shape[1], layer.in_features)
    else:
        sizes = (shape[0], layer.in_channels, 1, -1)
    called = graph.call_module(node.name, (graph.call_function(torch.reshape, (x, sizes)),))
    return graph.call_function(torch.reshape, (called, shape))


_RENAMED = {"view": "reshape"}
_FUNCTIONAL = ("max_pool2d", "prelu")
"""What the toolkit knows by its name in `torch.nn.functional` only, although `torch` has it too."""


def _function(name: str, results: int) -> Callable[..., Any] | None:
    """The function that the toolkit knows an operator by, which takes the same arguments."""
    import torch

    places: list[Any] = [torch, torch.nn.functional]
    if name in _FUNCTIONAL:
        places.reverse()
    if results > 1:
        places.remove(torch.nn.functional)  # whose functions return no indices
    return next(filter(None, (getattr(place, _RENAMED.get(name, name), None) for place in places)), None)


def _arguments(node: torch.fx.Node, module: torch.nn.Module) -> dict[str, Any]:
    """An operator's arguments by name, those that are not given included; a weight as its tensor."""
    listed = node.target._schema.arguments  # type: ignore[union-attr]  # an operator's overload
    given = {each.name: each.default_value for each in listed}
    given |= {each.name: value for each, value in zip(listed, node.args, strict=False)}
    return {
        name: attrgetter(str(each.target))(module).detach() if getattr(each, "op", "") == "get_attr" else each
        for name, each in (given | node.kwargs).items()
    }


def _with(layer: torch.nn.Module, arguments: dict[str, Any]) -> torch.nn.Module:
    """A layer with the weights among an operator's arguments."""
    layer.load_state_dict({name: arguments[name] for name in layer.state_dict() if name in arguments}, strict=False)
    return layer


def _is_constant(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.Tensor)


def _convolution(arguments: dict[str, Any], *, transposed: bool = False) -> torch.nn.Module | None:
    import torch

    weight, groups = arguments["weight"], arguments["groups"]
    if not _is_constant(weight):
        return None
    names = ("stride", "padding", "dilation", "groups", *(["output_padding"] if transposed else []))
    settings = {name: arguments[name] for name in names} | {"bias": arguments["bias"] is not None}
    if transposed:
        return _with(
            torch.nn.ConvTranspose2d(len(weight), weight.shape[1] * groups, weight.shape[2:], **settings), arguments
        )
    return _with(torch.nn.Conv2d(weight.shape[1] * groups, len(weight), weight.shape[2:], **settings), arguments)


def _convolution_of_one_axis(arguments: dict[str, Any]) -> torch.nn.Module | None:
    """As a convolution of two axes, the first of which has the size 1."""
    weight = arguments["weight"]
    if not _is_constant(weight) or isinstance(arguments["padding"], str):
        return None
    fill = {"stride": 1, "padding": 0, "dilation": 1}
    sizes = {name: [fill[name], *arguments[name]] for name in fill}
    return _convolution(arguments | sizes | {"weight": weight.unsqueeze(2)})


def _linear(arguments: dict[str, Any]) -> torch.nn.Module | None:
    import torch

    weight = arguments["weight"]
    if not _is_constant(weight):
        return None
    return _with(torch.nn.Linear(weight.shape[1], len(weight), bias=arguments["bias"] is not None), arguments)


def _batch_norm(arguments: dict[str, Any]) -> torch.nn.Module | None:
    import torch

    mean, weight = arguments["running_mean"], arguments["weight"]
    if not _is_constant(mean):
        return None
    layer = torch.nn.BatchNorm2d(len(mean), eps=arguments["eps"], affine=weight is not None)
    return _with(layer, arguments)


def _layer_norm(arguments: dict[str, Any]) -> torch.nn.Module | None:
    import torch

    weight, bias = arguments["weight"], arguments["bias"]
    layer = torch.nn.LayerNorm(
        arguments["normalized_shape"], arguments["eps"], elementwise_affine=weight is not None, bias=bias is not None
    )
    return _with(layer, arguments)


_LAYERS: dict[str, Callable[[dict[str, Any]], torch.nn.Module | None]] = {
    "conv1d": _convolution_of_one_axis,
    "conv2d": _convolution,
    "conv_transpose2d": partial(_convolution, transposed=True),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
}


# --- running ----------------------------------------------------------------------------------------------------------


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run the quantized graph before compilation on the CPU, row by row, since there is no sensor here."""
    import mct_quantizers
    import onnxruntime

    options = mct_quantizers.get_ort_session_options()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path.with_name(GRAPH)), options, providers=["CPUExecutionProvider"])
    read = [each.name for each in session.get_inputs()]

    def run(inputs: Arrays) -> Arrays:
        given = dict(zip(read, (inputs[name] for name in spec.input_names), strict=True))
        return dict(zip(spec.output_names, session.run(None, given), strict=True))

    ran = "the quantized ONNX graph before compilation, on the CPU"
    return Loaded(
        in_rows(run, spec.one_row()),
        spec.one_row(),
        remark="; ".join(filter(None, (row_remark(spec), _memory(path.with_name(MEMORY))))),
        stand_in=f"what ran is {ran}, which says nothing about the speed of the IMX500",
        observed=lambda: Observed(verified_by=ran),
    )


def _memory(file: Path) -> str:
    """How much of the sensor's memory it takes, by the converter."""
    found = json.loads(file.read_text(encoding="utf-8"))["Memory Report"]
    return f"it takes {found['Memory Usage']} of the {found['Total Memory Available On Chip']} on the sensor"


FORMAT = Format(
    name="imx500",
    description="Network in int8 for Sony's IMX500, the sensor of the Raspberry Pi AI Camera",
    url=URL,
    artifact="packerOut.zip",
    graph=GRAPH,
    precision="int8",
    routes=(Route("mct", "pt2", "imx500", convert),),
    load=load,
    runtime="imx500",
    lacks=lacks,
    calibrated=True,
    targets=("camera",),
    snippets=(
        Snippet(
            "Python",
            """\
# on the Raspberry Pi, once: imx500-package -i {{ path }} -o .
import numpy as np
from picamera2 import Picamera2
from picamera2.devices import IMX500

camera = IMX500("network.rpk")
picamera = Picamera2(camera.camera_num)
picamera.start(picamera.create_preview_configuration())
while (outputs := camera.get_outputs(picamera.capture_metadata(), add_batch=True)) is None:
    pass  # the sensor has not computed its first frame
""",
        ),
    ),
)
