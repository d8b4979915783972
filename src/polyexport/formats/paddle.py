"""Paddle: an inference model for PaddlePaddle's runtimes, run here by Paddle Inference.

https://www.paddlepaddle.org.cn/inference/

Our own lowering comes first, and X2Paddle if it fails or its result disagrees: artifacts of the lowering are about as
fast or faster, are made sooner, and have forward's own names. X2Paddle has its limits: no opset above 15, no
`dilations` of all ones on a pool, no weight that two layers share, and one conversion per process. Its telemetry is
off.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from polyexport.format import Format, Route, Snippet
from polyexport.spec import Arrays, ExportSpec, Runner

_PREFIX = "x2paddle_"
"""X2Paddle's prefix of the names of inputs."""


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Translate the ONNX graph with X2Paddle; only the inference model is kept."""
    import onnx
    from x2paddle.convert import onnx2paddle

    model = onnx.load(source)
    _strip_dilations(model)
    _unshare_weights(model)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        onnx.save(model, folder / "model.onnx")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                onnx2paddle(str(folder / "model.onnx"), str(folder / "made"), disable_feedback=True)
        except Exception as error:
            if lacking := re.findall(r"^=+ (\w+) =+$", printed.getvalue(), re.MULTILINE):
                raise RuntimeError(f"X2Paddle has no {', '.join(sorted(lacking))}") from error
            raise
        finally:
            print(printed.getvalue())
        shutil.move(folder / "made" / "inference_model", target)


def _strip_dilations(model: Any) -> None:
    """Remove dilations of all ones, which X2Paddle does not support."""
    for node in model.graph.node:
        if node.op_type in ("MaxPool", "AveragePool"):
            for attribute in [each for each in node.attribute if each.name == "dilations"]:
                if set(attribute.ints) == {1}:
                    node.attribute.remove(attribute)


def _unshare_weights(model: Any) -> None:
    """Copy shared weights, one for each use: X2Paddle removes a weight from its table at the first use.

    The exporter shares equal weights, by name or through an Identity.
    """
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    outputs = {output.name for output in graph.output}
    meant = {name: name for name in weights}
    for node in [each for each in graph.node if each.op_type == "Identity"]:
        if node.input[0] in meant and node.output[0] not in outputs:
            meant[node.output[0]] = meant[node.input[0]]
            graph.node.remove(node)
    uses: Counter[str] = Counter()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in meant:
                node.input[index] = _own(graph, weights[meant[name]], uses)


def _own(graph: Any, weight: Any, uses: Counter[str]) -> str:
    """The weight's name at its first use, the name of a new copy later."""
    uses[weight.name] += 1
    if uses[weight.name] == 1:
        return str(weight.name)
    copy = graph.initializer.add()
    copy.CopyFrom(weight)
    copy.name = f"{weight.name}_use_{uses[weight.name]}"
    return str(copy.name)


def lower(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the ONNX graph to Paddle's operators, under forward's own names."""
    from paddle.static import InputSpec

    from polyexport.lowering.paddle import lower_model
    from polyexport.lowering.protobuf import read

    shaped = [InputSpec(tensor.sized(lambda _: -1), tensor.dtype, tensor.name) for tensor in spec.inputs]
    lowered = lower_model(read(source), shaped)
    target.mkdir()
    lowered.save(target / "model")


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it with Paddle Inference on the CPU."""
    from paddle import inference

    config = inference.Config(str(path / "model.json"), str(path / "model.pdiparams"))
    config.disable_gpu()
    config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    given = {name.removeprefix(_PREFIX): predictor.get_input_handle(name) for name in predictor.get_input_names()}
    made = predictor.get_output_names()
    names = spec.output_names if set(spec.output_names) <= set(made) else made  # X2Paddle has its own names, in order
    answers = [predictor.get_output_handle(name) for name in names]

    def run(inputs: Arrays) -> Arrays:
        for name, handle in given.items():
            handle.reshape(inputs[name].shape)
            handle.copy_from_cpu(inputs[name])
        predictor.run()
        return {tensor.name: handle.copy_to_cpu() for tensor, handle in zip(spec.outputs, answers, strict=True)}

    return run


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
from paddle import inference

config = inference.Config("{{ path }}/model.json", "{{ path }}/model.pdiparams")
predictor = inference.create_predictor(config)
batch = np.load("{{ batch }}")
for name in predictor.get_input_names():
    array = batch[name.removeprefix("x2paddle_")]
    handle = predictor.get_input_handle(name)
    handle.reshape(array.shape)
    handle.copy_from_cpu(array)
predictor.run()
outputs = [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
""",
    ),
)


FORMAT = Format(
    name="paddle",
    aliases=("paddlepaddle",),
    description="PaddlePaddle inference model",
    url="https://www.paddlepaddle.org.cn/inference/",
    artifact="inference_model",
    graph="inference_model/model.json",
    routes=(
        Route("lowering", upstream="onnx", toolchain="paddle", convert=lower),
        Route("x2paddle", upstream="onnx-opset15", toolchain="paddle", convert=convert),
    ),
    load=load,
    slow_because="attention is several operators on CPUs, each transpose and reshape is a copy, and its kernel of "
    "recurrent layers takes longer than PyTorch's",
    targets=("server CPU",),
    snippets=_SNIPPETS,
)
