"""MNN: a model for Alibaba's engine for phones and small devices, in several precisions; run here by its own runtime.

https://mnn-docs.readthedocs.io/en/latest/

It is converted by the compiled converter only: the Python command around it installs packages and reports to its
vendor.

Operators that MNN lacks or computes differently are decomposed first. The second route is an older opset, whose
operators it supports better: it crashes on some LSTMs in the newer one.

Lower precisions are made from the float32 file by the same converter: weights of convolutions, products and LSTMs only.
For weights in four bits that disagree, scales are fitted to blocks half as large by HQQ, for a slightly larger file;
outside a budget, the costliest layers go back to float.
int8 comes from its quantizer, which has three methods; each fails, or is far off, on some models. It crashes on loops,
so recurrent layers over few steps are unrolled first.
"""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.errors import NothingToDo, ended
from polyexport.format import Convert, Format, Loaded, Route, Snippet
from polyexport.measure.drafts import Draft, distance, mended
from polyexport.measure.weights import in_four_bits
from polyexport.onnx_graph.decompose import decomposed
from polyexport.onnx_graph.unrolled import STEPS, unrolled
from polyexport.spec import Arrays, ExportSpec, Precision, Runner, calibration
from polyexport.workers import programs

if TYPE_CHECKING:
    import onnx

# the module in the wheel that runs its programs
_TOOL = "import sys, _tools; getattr(_tools, sys.argv[1])(sys.argv[1:])"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Translate the ONNX graph.

    Raises:
        RuntimeError: MNN lacks a mode of an operator; or see `_run_converter`.
    """
    import onnx

    model = _decomposed(onnx.load(source))
    if lacking := lacking_modes(model):
        raise RuntimeError(f"MNN has no {', '.join(lacking)}; its converter would use another mode")
    _keep_three_axes(model)
    prepared = target.with_name("prepared.onnx")
    onnx.save(model, prepared)
    try:
        _run_converter("ONNX", prepared, target)
    finally:
        prepared.unlink()


def _run_converter(framework: str, source: Path, target: Path, *options: str) -> None:
    words = ("--framework", framework, "--modelFile", source, "--MNNModel", target, "--bizCode", "polyexport", *options)
    _run("mnnconvert", *map(str, words), writes=target)


def _run(tool: str, *words: str, writes: Path) -> None:
    """Run one of MNN's programs in a process of its own.

    Raises:
        RuntimeError: it crashed or wrote nothing, which only its output tells.
    """
    done = programs.run([sys.executable, "-c", _TOOL, tool, *words])
    if not writes.exists():
        raise RuntimeError(f"MNN's {tool} wrote no model: {_why(done)}")
    settle_id(writes)


def settle_id(path: Path) -> None:
    """Replace the file's random id by a hash of its content."""
    content = path.read_bytes()
    form = rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    for drawn in {*re.findall(form, content)}:
        own = uuid.uuid5(uuid.NAMESPACE_OID, content.replace(drawn, b"").hex())
        content = content.replace(drawn, str(own).encode())
    path.write_bytes(content)


def _with(*options: str) -> Convert:
    """A conversion of the float32 file with options of MNN's converter."""

    def convert_weights(source: Path, target: Path, spec: ExportSpec) -> None:
        _run_converter("MNN", source, target, *options)

    return convert_weights


_SHARES = "shares.json"
"""File next to an artifact some of whose layers are in float: which, and how many numbers."""


def _in_4_bits(*options: str) -> Convert:
    """A conversion of the float32 file to weights in four bits, but for the share `spec.in_float` of the layers."""
    settings = ("--weightQuantBits", "4", *options)

    def convert_weights(source: Path, target: Path, spec: ExportSpec) -> None:
        if not spec.in_float:
            _run_converter("MNN", source, target, *settings)
            return
        with TemporaryDirectory() as folder:
            table = Path(folder, "layers.json")
            settled = (*settings, "--compressionParamsFile", str(table))
            _run_converter("MNN", source, target, *settled)  # which writes the table, and reads it from then on
            about = json.loads(table.read_text(encoding="utf-8"))
            layers = {each["opName"]: each for each in about["algo"][0]["quantParams"]["layer"]}
            expected = list(map(load(source, spec, threads=1), calibration(spec)))

            def make(kept: Sequence[str], alone: Sequence[str]) -> Draft:
                for name, layer in layers.items():
                    layer["weight"][0]["bits"] = 0 if name in kept or (alone and name not in alone) else 4
                table.write_text(json.dumps(about), encoding="utf-8")
                target.unlink()
                _run_converter("MNN", source, target, *settled)
                found = map(load(target, spec, threads=1), calibration(spec))
                return Draft(target.read_bytes(), "", distance(expected, found), tuple(kept))

            chosen, note = mended([make((), ())], {name: name for name in layers}, make, spec.in_float)
        target.write_bytes(chosen.model)
        sizes = {name: _size(layer["conv"]) for name, layer in layers.items()}
        kept = sum(sizes[name] for name in chosen.kept)
        found = {"note": note, "in 4 bits": sum(sizes.values()) - kept, "in float": kept}
        target.with_name(_SHARES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    return convert_weights


def _size(layer: Mapping[str, Any]) -> int:
    """The number of weights of a layer in the table of MNN's converter."""
    return math.prod((layer["inputChannel"], layer["outputChannel"], *layer["kernelSize"]))


def load_w4(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a remark on layers in float."""
    run, file = load(path, spec, threads=threads), path.with_name(_SHARES)
    if not file.exists():
        return Loaded(run)
    found = json.loads(file.read_text(encoding="utf-8"))
    left = in_four_bits(found["in 4 bits"], 0, found["in float"], "", found["note"])
    return Loaded(run, remark=left.remark, shortfall=left.shortfall)


def _quantized(method: str) -> Convert:
    """A quantization of the float32 file to int8, with ranges from `spec.calibration` by one of MNN's methods."""

    def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
        if has_loops(source.read_bytes()):
            raise RuntimeError(
                "MNN's quantizer crashes on loops, which MNN's converter makes of recurrent layers over more than "
                f"{STEPS} steps or an unknown number of them; use mnn-w8"
            )
        with TemporaryDirectory() as folder:
            samples, config = Path(folder, "samples"), Path(folder, "config.json")
            count = _write_samples(samples, spec)
            about = {
                **{"path": f"{samples}/", "input_type": "sequence", "used_sample_num": count, "batch_size": 1},
                **{"feature_quantize_method": method, "weight_quantize_method": "MAX_ABS", "quant_bits": 8},
                **{"feature_clamp_value": 127, "weight_clamp_value": 127, "model": target.name},
            }
            config.write_text(json.dumps(about), encoding="utf-8")
            _run("mnnquant", str(source), str(target), str(config), writes=target)
        target.with_name(f"{target.name}.json").unlink(missing_ok=True)  # its own notes

    return quantize


def quantize_unrolled(source: Path, target: Path, spec: ExportSpec) -> None:
    """Quantize the ONNX graph to int8 with its recurrent layers unrolled.

    Raises:
        NothingToDo: it has none, or one that cannot be.
    """
    import onnx

    model = unrolled(onnx.load(source))
    if model is None:
        raise NothingToDo(f"it has no recurrent layers over up to {STEPS} steps alone")
    with TemporaryDirectory() as folder:
        graph, made = Path(folder, "unrolled.onnx"), Path(folder, "unrolled.mnn")
        onnx.save(model, graph)
        convert(graph, made, spec)
        _quantized("EMA")(made, target, spec)


_SUBGRAPHS = 10
"""Number of the field `subgraphs` in the table `Net` of MNN's schema, MNN.fbs."""


def has_loops(content: bytes) -> bool:
    """Whether an MNN file, which is a flatbuffer, has a vector of subgraphs: the bodies of loops and branches."""
    (root,) = struct.unpack_from("<I", content)
    (back,) = struct.unpack_from("<i", content, root)
    (size,) = struct.unpack_from("<H", content, root - back)
    offset = 4 + 2 * _SUBGRAPHS  # behind the sizes of the list of fields and of the table
    if offset >= size:
        return False
    (field,) = struct.unpack_from("<H", content, root - back + offset)
    if not field:
        return False
    (vector,) = struct.unpack_from("<I", content, root + field)
    (length,) = struct.unpack_from("<I", content, root + field + vector)
    return bool(length)


def _write_samples(folder: Path, spec: ExportSpec) -> int:
    """Write each batch of `spec.calibration` as text for MNN's tool; returns the number of batches."""
    count = 0
    for count, arrays in enumerate(calibration(spec), 1):
        sample = folder / str(count)
        sample.mkdir(parents=True)
        shapes = [{"name": name, "shape": array.shape} for name, array in arrays.items()]
        text = json.dumps({"inputs": shapes, "outputs": spec.output_names})
        (sample / "input.json").write_text(text, encoding="utf-8")
        for name, array in arrays.items():
            np.savetxt(sample / f"{name}.txt", array.reshape(-1), fmt="%.9g" if array.dtype.kind == "f" else "%d")
    return count


_MODES = {("GridSample", "mode"): {b"linear", b"bilinear", b"nearest"}}
"""The values of operators' attributes that MNN supports; it silently replaces any other by one of these."""


def lacking_modes(model: onnx.ModelProto) -> list[str]:
    """The operators with a mode that MNN lacks, as `GridSample with mode=cubic`."""
    found = [
        f"{node.op_type} with {attribute.name}={attribute.s.decode()}"
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.s not in _MODES.get((node.op_type, attribute.name), {attribute.s})
    ]
    return list(dict.fromkeys(found))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if lacking := re.findall(r"These Op Not Support: (.*\S)", done.stdout + done.stderr):
        return f"MNN has no {', '.join(lacking)}"
    return ended(done.returncode)


_FUNCTIONS = (
    # used by masked attention; MNN has no IsNaN
    "IsNaN (x) => (y) { same = Equal(x, x) y = Not(same) }",
    # MNN fuses even the operations of the exact Gelu into the one by tanh; negating erf twice prevents that
    "Erf (x) => (y) { negative = Neg(x) erf = Erf(negative) y = Neg(erf) }",
    "Gelu (x) => (y) { half = Constant<value_float = 0.5>() slope = Constant<value_float = 0.70710678>() "
    "scaled = Mul(x, slope) erf = Erf(scaled) halved = Mul(erf, half) share = Add(halved, half) y = Mul(x, share) }",
    # MNN reads the axes of these only as an attribute, as before opset 18, and else reduces all axes
    "ReduceL1 <keepdims: int = 1> (x, axes) => (y) { "
    "size = Abs(x) y = ReduceSum<keepdims: int = @keepdims>(size, axes) }",
    "ReduceL2 <keepdims: int = 1> (x, axes) => (y) { "
    "square = Mul(x, x) total = ReduceSum<keepdims: int = @keepdims>(square, axes) y = Sqrt(total) }",
    "ReduceSumSquare <keepdims: int = 1> (x, axes) => (y) { "
    "square = Mul(x, x) y = ReduceSum<keepdims: int = @keepdims>(square, axes) }",
    "ReduceLogSumExp <keepdims: int = 1> (x, axes) => (y) { "
    "top = ReduceMax<keepdims = 1>(x, axes) less = Sub(x, top) power = Exp(less) "
    "total = ReduceSum<keepdims: int = @keepdims>(power, axes) log = Log(total) "
    "most = ReduceMax<keepdims: int = @keepdims>(x, axes) y = Add(log, most) }",
)
"""Operations in terms of others, as functions in ONNX's text form."""


def _decomposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the operators of `_FUNCTIONS` decomposed, except Gelu by tanh, which is right in MNN."""
    return decomposed(model, _FUNCTIONS, lambda node: all(each.s != b"tanh" for each in node.attribute))


def _keep_three_axes(model: onnx.ModelProto) -> None:
    """Reshape each output of three axes to its shape: after a 1D convolution MNN adds a fourth axis."""
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    ranks = {weight.name: len(weight.dims) for weight in graph.initializer}
    if not any(node.op_type in ("Conv", "ConvTranspose") and ranks.get(node.input[1]) == 3 for node in graph.node):
        return
    shape = numpy_helper.from_array(np.array([0, 0, -1], np.int64), "polyexport_three_axes")
    graph.initializer.append(shape)
    for output in graph.output:
        if len(output.type.tensor_type.shape.dim) == 3:
            inner = f"{output.name}_of_four_axes"
            for node in graph.node:
                for names in (node.input, node.output):
                    names[:] = [inner if name == output.name else name for name in names]
            graph.node.append(onnx.helper.make_node("Reshape", [inner, shape.name], [output.name]))


def load_int8(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Like `load`, with a module for each size of the inputs: MNN crashes when it resizes some modules in int8."""
    runners: dict[tuple[tuple[int, ...], ...], Runner] = {}

    def run(inputs: Arrays) -> Arrays:
        sizes = tuple(array.shape for array in inputs.values())
        if sizes not in runners:
            runners[sizes] = load(path, spec, threads=threads)
        return runners[sizes](inputs)

    remark = "load a module for each size of the inputs, since MNN crashes when it resizes some in int8"
    return Loaded(run, remark=remark if spec.is_dynamic else "")


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it with MNN on the CPU, in full precision; int64 and bool, which it lacks, become int32."""
    import MNN

    kinds: dict[str, Any] = {"f": (MNN.expr.float, np.float32)}
    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
    # each time with the manager: without one it starts threads of its own
    names = MNN.nn.load_module_from_file(str(path), [], [], runtime_manager=manager).get_info()["inputNames"]
    module = MNN.nn.load_module_from_file(str(path), names, list(spec.output_names), runtime_manager=manager)

    def given(array: np.ndarray) -> Any:
        kind, dtype = kinds.get(array.dtype.kind, (MNN.expr.int, np.int32))
        return MNN.expr.const(np.asarray(array, dtype, order="C"), list(array.shape), MNN.expr.NCHW, kind)

    def run(inputs: Arrays) -> Arrays:
        answers = module.forward([given(inputs[name]) for name in names])
        if len(answers) != len(spec.outputs):
            raise RuntimeError(f"MNN returned {len(answers)} of the {len(spec.outputs)} outputs")
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

batch = np.load("{{ batch }}")
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


_SNIPPETS_INT8 = (
    Snippet(
        "Python",
        """\
import MNN
import numpy as np

names = {{ names | tojson }}
kinds = {"f": MNN.expr.float, "i": MNN.expr.int}  # int64 and bool travel as int32
modules = {}  # one for each size of the inputs, since MNN crashes when it resizes some in int8


def load():
    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 4},))
    return MNN.nn.load_module_from_file("{{ path }}", names, {{ outputs | tojson }}, runtime_manager=manager)


def run(batch):
    inputs = [batch[name] if batch[name].dtype.kind == "f" else batch[name].astype("int32") for name in names]
    sizes = tuple(x.shape for x in inputs)
    if sizes not in modules:
        modules[sizes] = load()
    given = [MNN.expr.const(x, list(x.shape), MNN.expr.NCHW, kinds[x.dtype.kind]) for x in inputs]
    return [np.array(answer.read()) for answer in modules[sizes].forward(given)]


outputs = run(np.load("{{ batch }}"))
""",
    ),
)


def _format(name: str, precision: Precision, description: str, *routes: Route, **more: Any) -> Format:
    defaults: dict[str, Any] = {"load": load, "snippets": _SNIPPETS}
    defaults |= {
        "slow_because": "its products use vectors of 256 bits on x86, where CPUs have longer ones, it computes the erf "
        "of a GELU number by number, and its converter makes a loop of a recurrent layer"
    }
    return Format(
        name=name,
        description=description,
        url="https://mnn-docs.readthedocs.io/en/latest/",
        artifact="model.mnn",
        graph="model.mnn",
        precision=precision,
        routes=routes,
        targets=("phone",),
        **(defaults | more),
    )


FORMATS = (
    _format(
        "mnn",
        "float32",
        "MNN model, for phones and small devices",
        Route("onnx", "onnx", "mnn", convert),
        Route("opset15", "onnx-opset15", "mnn", convert),
    ),
    _format(
        "mnn-fp16",
        "float16",
        "MNN model with its weights in float16, half the size",
        Route("converter", "mnn", "mnn", _with("--fp16")),
    ),
    _format(
        "mnn-w8",
        "w8",
        "MNN model with int8 weights, a quarter of the size",
        Route("converter", "mnn", "mnn", _with("--weightQuantBits", "8")),
        slow_because="MNN makes float weights of them when it loads the file, and computes as in float32",
    ),
    _format(
        "mnn-w4",
        "w4",
        "MNN model with weights in four bits, an eighth of the size",
        Route("converter", "mnn", "mnn", _in_4_bits("--weightQuantBlock", "32"), mends=True),
        Route("blocks of 16", "mnn", "mnn", _in_4_bits("--weightQuantBlock", "16", "--hqq"), mends=True),
        load=load_w4,
        calibrated=True,
    ),
    _format(
        "mnn-int8",
        "int8",
        "MNN model in int8, calibrated with validation batches",
        Route("unrolled", "onnx", "mnn", quantize_unrolled),
        *(Route(method, "mnn", "mnn", _quantized(method)) for method in ("EMA", "ADMM", "KL")),
        load=load_int8,
        snippets=_SNIPPETS_INT8,
        calibrated=True,
        slow_because="MNN's package for Python has no code for the int8 instructions of x86 (AVX-512 VNNI)",
    ),
)
