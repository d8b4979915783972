"""ONNX for the web: a graph that ONNX Runtime Web runs in browsers, and here in Node.

https://onnxruntime.ai/docs/tutorials/web/

Requirements:
* The graph is the one of `onnx`: the operators of ONNX Runtime are compiled to WebAssembly.
* It is one file, since a page loads one, and WebAssembly's memory is limited to 4 GiB.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from polyexport.format import Format, Loaded, Observed, Route, Snippet
from polyexport.spec import Arrays, ExportSpec
from polyexport.web import page
from polyexport.web.node import Node

_PROGRAM = Path(__file__).parents[1] / "toolchains" / "onnx_web" / "run.cjs"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Copy the graph, and write a page that runs it.

    Raises:
        RuntimeError: its weights are in a second file.
    """
    if (beside := source.with_name(f"{source.name}.data")).exists():
        raise RuntimeError(
            f"a page loads one file of less than 2 GB, but {beside.stat().st_size:,} bytes are in a second one"
        )
    shutil.copyfile(source, target)
    page.write(target, spec, "onnx_web", "onnxruntime-web")


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it in Node, by ONNX Runtime Web's WebAssembly, in a process that ends with this one."""
    node = Node("ONNX Runtime Web", _PROGRAM, str(path), str(threads))

    def run(inputs: Arrays) -> Arrays:
        return node.ask(inputs, spec.output_names)

    return Loaded(run, observed=partial(in_wasm, node))


def in_wasm(node: Node) -> Observed:
    """What is known of a model that was run by a runtime's WebAssembly."""
    ran = f"{node.runtime} in Node, wasm backend"
    return Observed(verified_by=ran, device="cpu (wasm backend)", peak_memory_bytes=node.peak_memory_bytes)


FORMAT = Format(
    name="onnx-web",
    aliases=("ort-web",),
    description="ONNX graph for browsers, run by ONNX Runtime Web",
    url="https://onnxruntime.ai/docs/tutorials/web/",
    artifact="model.onnx",
    graph="model.onnx",
    routes=(Route("onnx", "onnx", "onnx_web", convert),),
    load=load,
    targets=("browser",),
    page=page.NAME,
    slow_because="WebAssembly has vectors of 128 bits, and CPUs have longer ones",
    snippets=(
        Snippet(
            "JavaScript",
            """\
import * as ort from "onnxruntime-web";

const session = await ort.InferenceSession.create("{{ path }}");
const inputs = {
{%- for input in inputs %}
  {{ input.name | tojson }}: new ort.Tensor({{ input.dtype | tojson }}, new
    {{- {"int64": " BigInt64Array", "int32": " Int32Array", "bool": " Uint8Array", "float64": " Float64Array"}
        .get(input.dtype, " Float32Array") }}(
    {{- input.shape | list | join(" * ") or 1 }}), {{ input.shape | list | tojson }}),
{%- endfor %}
};
const outputs = await session.run(inputs);
""",
        ),
    ),
)
