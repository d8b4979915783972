"""ncnn: a model for Tencent's engine for phones and ARM boards, run here by its own runtime.

https://github.com/Tencent/ncnn/wiki

Requirements:
* It is converted by pnnx, ncnn's own converter, from an ONNX graph of one row, and takes a row without its batch axis.
* ncnn computes in floats. Everything except ids of an embedding is cast to float32 in the graph before pnnx reads it,
  and so are the artifact's inputs and outputs; operators without a layer in ncnn are decomposed (see
  `polyexport.onnx_graph.floats`).
* pnnx writes layers that ncnn lacks without an error; here that is an error.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.errors import NothingToDo, ended
from polyexport.format import Convert, Format, Loaded, OnDevice, Route, Snippet
from polyexport.spec import Arrays, ExportSpec, Precision, TensorSpec, in_rows, row_remark
from polyexport.workers import programs

if TYPE_CHECKING:
    import onnx

_URL = "https://github.com/Tencent/ncnn/wiki"
_WEIGHTS = "model.ncnn.bin"


def _converter(*, half: bool) -> Convert:
    """A conversion that stores the weights in float16, or in float32."""

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        """Convert the graph of one row with pnnx.

        Raises:
            NothingToDo: its dynamic batch became static, which is no other graph.
            RuntimeError: the graph has several rows, pnnx wrote no model, or ncnn lacks a layer.
        """
        from polyexport.onnx_graph.floats import in_floats
        from polyexport.onnx_graph.static_shapes import with_sizes

        one = spec.one_row()
        if why := fixed_batch(one):
            raise (NothingToDo if spec.sizes and not spec.is_dynamic else RuntimeError)(why)
        with TemporaryDirectory() as folder:
            model = in_floats(with_sizes(source, spec, one, without=["MatMulAddFusion"]))
            written = _translated(model, Path(folder, target.name), half=half)
            wanted, made = _ports(spec)
            names = {f"in{index}": wanted[value.name] for index, value in enumerate(model.graph.input)}
            names |= {f"out{index}": blob for index, blob in enumerate(made.values())}
            program = written.with_name("model_ncnn.py").read_text(encoding="utf-8")
            shapes = [tuple(dim.dim_value for dim in each.type.tensor_type.shape.dim) for each in model.graph.input]
            text = lifted(written.read_text(encoding="utf-8"), unsqueezed(program, shapes))
            target.write_text(rename(text, names), encoding="utf-8")
            shutil.copyfile(written.with_name(_WEIGHTS), target.with_name(_WEIGHTS))

    return convert


def fixed_batch(one: ExportSpec) -> str:
    """Why there is no graph of one row: all first axes have the same static size; empty if there is one."""
    sizes = {tensor.shape[:1] for tensor in (*one.inputs, *one.outputs)}
    size, *others = [*sizes] or [(1,)]
    if others or size in ((), (1,)):
        return ""
    return f"ncnn takes one row per call, but the batch is fixed at {size[0]}; make only the first axes dynamic"


def _translated(model: onnx.ModelProto, written: Path, *, half: bool) -> Path:
    """Run pnnx, which writes seven files next to its input; `written` is one of them.

    Raises:
        RuntimeError: pnnx wrote no model, or ncnn lacks a layer in it.
    """
    import onnx

    source = written.with_name("model.onnx")
    onnx.save(model, source)
    done = programs.run([_program(), source.name, f"fp16={int(half)}"], source.parent)
    if not written.exists():
        raise RuntimeError(f"pnnx wrote no model: {_why(done)}")
    if lacking := lacking_layers(written.read_text(encoding="utf-8")):
        raise RuntimeError(f"ncnn has no layer for {', '.join(lacking)}")
    return written


def _program() -> str:
    found = find_spec("pnnx")  # not imported: the module imports torch
    assert found is not None, "it is in the toolchain"
    assert found.submodule_search_locations, "it is a package"
    return str(Path(found.submodule_search_locations[0], "pnnx.exe" if os.name == "nt" else "pnnx"))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """How pnnx ended, and the last line of its output, which mixes notes and errors."""
    said = (done.stderr or done.stdout).split("\n")
    return f"{ended(done.returncode)}: {next((line.strip() for line in reversed(said) if line.strip()), '')}"


def lacking_layers(text: str) -> list[str]:
    """The layers in a `.param` file that ncnn does not have."""
    import ncnn

    kinds = dict.fromkeys(line.split()[0] for line in text.splitlines()[2:])
    return [kind for kind in kinds if ncnn.layer_to_index(kind) < 0]


def _ports(spec: ExportSpec) -> tuple[dict[str, str], dict[str, str]]:
    """The names of inputs and outputs in the artifact: forward's, unless ncnn cannot distinguish them from its own."""

    def named(kind: str, names: tuple[str, ...]) -> dict[str, str]:
        # ncnn's own blobs have numbers as names
        fits = {name: re.fullmatch(r"[^\s\d]\S{0,200}", name) for name in names}
        return {name: name if fits[name] else f"{kind}{index}" for index, name in enumerate(names)}

    return named("in", spec.input_names), named("out", spec.output_names)


def unsqueezed(program: str, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """The inputs of one row that keep their first axis in ncnn, since pnnx did not recognize it as the batch axis.

    Args:
        program: The test program that pnnx wrote, which shows it.
        shapes: Shapes of the inputs.

    Raises:
        RuntimeError: it takes an axis of more than one row for the batch axis.
    """
    axes = re.findall(r"ncnn\.Mat\(in\d+\.numpy\(\), batch_index=(\d+)\)", program)
    for axis, shape in zip(axes, shapes, strict=True):
        if axis != _NO_AXIS and shape[int(axis)] != 1:
            raise RuntimeError(f"pnnx takes axis {axis} of an input of the shape {shape} for the batch")
    pairs = enumerate(zip(axes, shapes, strict=True))
    return [f"in{index}" for index, (axis, shape) in pairs if axis == _NO_AXIS and _is_row(shape)]


def _is_row(shape: tuple[int | str, ...]) -> bool:
    """Whether a tensor is passed to ncnn without its first axis."""
    return len(shape) > 1 and shape[0] == 1


_NO_AXIS = "233"
"""ncnn's value for a missing parameter."""


def lifted(text: str, names: Iterable[str]) -> str:
    """The `.param` file with a leading axis added to some inputs, so that all of them are passed as rows."""
    magic, sizes, *layers = text.splitlines()
    inner = {name: f"polyexport_row_{index}" for index, name in enumerate(names)}
    added = [f"ExpandDims {row} 1 1 {name} {row} -23303=1,0" for name, row in inner.items()]
    inputs = [line for line in layers if line.split()[0] == "Input"]
    others = [_renamed(line, inner) for line in layers if line.split()[0] != "Input"]
    counts = " ".join(str(int(size) + len(inner)) for size in sizes.split())
    return "\n".join([magic, counts, *inputs, *added, *others]) + "\n"


def rename(text: str, names: Mapping[str, str]) -> str:
    """The `.param` file with blobs renamed."""
    magic, sizes, *layers = text.splitlines()
    return "\n".join([magic, sizes, *(_renamed(line, names) for line in layers)]) + "\n"


def _renamed(line: str, names: Mapping[str, str]) -> str:
    words = line.split()
    blobs = [names.get(blob, blob) for blob in _blobs(words)]
    return " ".join([*words[:4], *blobs, *words[4 + len(blobs) :]])


def _blobs(words: list[str]) -> list[str]:
    """Inputs and outputs of a layer's line: kind, name, how many of each, their names, parameters."""
    return words[4 : 4 + int(words[2]) + int(words[3])]


def embedded(text: str) -> set[str]:
    """The inputs of a `.param` file that are ids of an embedding, and therefore integers."""
    layers = [line.split() for line in text.splitlines()[2:]]
    makers = {blob: words for words in layers for blob in _blobs(words)[int(words[2]) :]}
    found = set()
    for words in layers:
        if words[0] == "Embed":
            (blob,) = _blobs(words)[:1]
            while makers[blob][0] != "Input":
                blob = _blobs(makers[blob])[0]
            found.add(blob)
    return found


def _answer(extractor: Any, blob: str, tensor: TensorSpec) -> np.ndarray:
    """An output of ncnn, which is float32, in PyTorch's shape and dtype."""
    failed, mat = extractor.extract(blob)
    found, shape = np.array(mat), tuple(map(int, tensor.shape))
    if failed or found.size != math.prod(shape):
        raise RuntimeError(f"ncnn returns {tensor.name} with shape {found.shape}, PyTorch with {shape}")
    dtype = np.dtype(tensor.dtype)
    return (found if dtype.kind == "f" else np.rint(found)).reshape(shape).astype(dtype)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with ncnn on the CPU, row by row, in float32."""
    return _loaded(path, spec, threads, half=False)


def load_half(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, in float16 where ncnn supports that on this CPU."""
    return _loaded(path, spec, threads, half=True)


def _loaded(path: Path, spec: ExportSpec, threads: int, *, half: bool) -> Loaded:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = half
    if net.load_param(str(path)) or net.load_model(str(path.with_name(_WEIGHTS))):
        raise RuntimeError("ncnn cannot load it; see its output in the log")
    one = spec.one_row()
    wanted, made = _ports(spec)
    read = {name: blob for name, blob in wanted.items() if blob in net.input_names()}
    shapes = {tensor.name: tensor.shape for tensor in one.inputs}
    ids = embedded(path.read_text(encoding="utf-8"))

    def run(inputs: Arrays) -> Arrays:
        extractor = net.create_extractor()
        for name, blob in read.items():
            array = inputs[name]
            if array.shape != shapes[name]:
                raise RuntimeError(f"{name} has shape {array.shape}; the artifact takes only {shapes[name]}")
            dtype = np.int32 if blob in ids else np.float32
            row = np.ascontiguousarray(array[0] if _is_row(array.shape) else array, dtype)  # at least of one axis
            extractor.input(blob, ncnn.Mat(row).clone())  # a Mat does not keep its array alive
        return {tensor.name: _answer(extractor, made[tensor.name], tensor) for tensor in one.outputs}

    return Loaded(in_rows(run, one), _signature(one, read, ids), remark=row_remark(spec))


def _signature(one: ExportSpec, read: Mapping[str, str], ids: set[str]) -> ExportSpec:
    """The artifact's own signature: one row, only inputs that are read, and no integers other than ids."""
    inputs = tuple(
        replace(tensor, dtype="int32" if read[tensor.name] in ids else "float32")
        for tensor in one.inputs
        if tensor.name in read
    )
    return replace(one, inputs=inputs, outputs=tuple(replace(tensor, dtype="float32") for tensor in one.outputs))


_PYTHON = """\
import ncnn
import numpy as np

net = ncnn.Net(){{ precise }}
net.load_param("{{ path }}")
net.load_model("{{ path | replace(".param", ".bin") }}")
batch = np.load("{{ batch }}")
extractor = net.create_extractor()
{%- for input in inputs %}
row = np.ascontiguousarray(batch[{{ input.name | tojson }}][0], np.{{ input.dtype }})  # without a batch axis
extractor.input({{ input.name | tojson }}, ncnn.Mat(row).clone())
{%- endfor %}
outputs = [np.array(extractor.extract(name)[1])[np.newaxis] for name in {{ outputs | tojson }}]
"""

_CPP = """\
#include <ncnn/net.h>

int main() {
  ncnn::Net net;{{ precise }}
  if (net.load_param("{{ path }}") || net.load_model("{{ path | replace(".param", ".bin") }}")) return 1;
  ncnn::Extractor extractor = net.create_extractor();
{%- for input in inputs %}
  ncnn::Mat in{{ loop.index0 }}({{ (input.shape[1:] or (1,)) | reverse | join(", ") }});  // no batch axis
  in{{ loop.index0 }}.fill({{ "0.f" if input.dtype == "float32" else "0" }});  // your data here
  extractor.input({{ input.name | tojson }}, in{{ loop.index0 }});
{%- endfor %}
{%- for output in outputs %}
  ncnn::Mat out{{ loop.index0 }};
  extractor.extract({{ output | tojson }}, out{{ loop.index0 }});
{%- endfor %}
}
"""


def _snippets(*, half: bool) -> tuple[Snippet, ...]:
    options = [f"net.opt.use_fp16_{name} = " for name in ("packed", "storage", "arithmetic")]
    python, cpp = "".join(f"\n{each}False" for each in options), f"\n  {''.join(options)}false;"
    return tuple(
        Snippet(language, code.replace("{{ precise }}", "" if half else precise))
        for language, code, precise in (("Python", _PYTHON, python), ("C++", _CPP, cpp))
    )


def _format(name: str, precision: Precision, description: str) -> Format:
    half = precision == "float16"
    return Format(
        name=name,
        description=description,
        url=_URL,
        artifact="model.ncnn.param",
        graph="model.ncnn.param",
        precision=precision,
        routes=(Route("pnnx", "onnx", "ncnn", _converter(half=half)),),
        load=load_half if half else load,
        targets=("phone",),
        snippets=_snippets(half=half),
        on_device=OnDevice(("ncnn",)),
    )


FORMATS = (
    _format("ncnn", "float32", "ncnn model, for phones and ARM boards"),
    _format("ncnn-fp16", "float16", "ncnn model with its weights in float16, half the size"),
)
