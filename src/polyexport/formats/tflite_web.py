"""TensorFlow Lite for the web: a model that LiteRT.js runs in browsers, and here in Node.

https://ai.google.dev/edge/litert/web

Requirements:
* LiteRT.js supports no dynamic axes, so it is lowered for one row; a loaded artifact takes any number of rows.
* Its tensors are float32, int32 and uint8. Other integers and booleans are int32 in the artifact.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from polyexport.format import Format, Loaded, Route, Snippet
from polyexport.formats import tflite
from polyexport.formats.onnx_web import in_wasm
from polyexport.spec import Arrays, ExportSpec, TensorSpec, in_rows, row_remark
from polyexport.tracing.exported_program import load_program
from polyexport.web import page
from polyexport.web.node import Node

_PROGRAM = Path(__file__).parents[1] / "toolchains" / "litert_web" / "run.cjs"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program of `torch.export` again, for one row, and write a page that runs it."""
    one = spec.one_row()
    tflite.lower(load_program(source).module(), target, one, narrow=narrowed)
    page.write(target, one, "litert_web", "@litertjs/core")


def narrowed(dtype: str) -> str:
    """The type of an artifact's tensor for PyTorch's type."""
    return dtype if dtype == "uint8" else "float32" if dtype.startswith(("float", "bfloat")) else "int32"


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it in Node, by LiteRT.js's WebAssembly, in a process that ends with this one; on one thread."""
    node = Node("LiteRT.js", _PROGRAM, str(path))
    dtypes = {tensor.name: narrowed(tensor.dtype) for tensor in spec.inputs}

    def run(inputs: Arrays) -> Arrays:
        given = {name: np.ascontiguousarray(array, dtypes[name]) for name, array in inputs.items()}
        found = node.ask(given, spec.output_names)
        return {tensor.name: found[tensor.name].astype(tensor.dtype) for tensor in spec.outputs}

    one = spec.one_row()
    own = replace(one, inputs=_narrowed(one.inputs), outputs=_narrowed(one.outputs))
    return Loaded(in_rows(run, one), own, remark=row_remark(spec), observed=partial(in_wasm, node))


def _narrowed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(tensor, dtype=narrowed(tensor.dtype)) for tensor in tensors)


FORMAT = Format(
    name="tflite-web",
    aliases=("litert-web",),
    description="TensorFlow Lite model for browsers, run by LiteRT.js",
    url="https://ai.google.dev/edge/litert/web",
    artifact=tflite.ARTIFACT,
    graph=tflite.ARTIFACT,
    routes=(tflite.packed(Route("litert-torch", "pt2", "litert", convert)),),
    load=load,
    runtime="litert_web",
    targets=("browser",),
    page=page.NAME,
    slow_because="WebAssembly has vectors of 128 bits, and LiteRT.js runs on one thread here",
    snippets=(
        Snippet(
            "JavaScript",
            """\
import { loadAndCompile, loadLiteRt, Tensor } from "@litertjs/core";

await loadLiteRt("node_modules/@litertjs/core/wasm/");
const model = await loadAndCompile("{{ path }}", { accelerator: "wasm" });
const outputs = await model.run({
{%- for input in inputs %}
  {{ input.name | tojson }}: new Tensor(new {{
    {"int32": "Int32Array", "uint8": "Uint8Array"}.get(input.dtype, "Float32Array") }}(
    {{- input.shape | list | join(" * ") or 1 }}), {{ input.shape | list | tojson }}),
{%- endfor %}
});
""",
        ),
    ),
)
