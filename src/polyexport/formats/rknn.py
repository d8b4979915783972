"""RKNN: a model for the NPU of Rockchip's RK3588, run here by the simulator of the vendor's toolkit.

https://github.com/airockchip/rknn-toolkit2

Requirements:
* It is built from an ONNX graph of one row whose sizes are all known, without operators newer than the toolkit.
* The simulator runs only what was built in its own process. What the artifact was built from lies beside it: the graph,
  or of int8 what the toolkit keeps of a quantized one, which holds no data. It is built anew where the artifact is
  loaded, and has to be the same file but for bytes that the toolkit does not initialize.
* The toolkit has Rockchip's own license; it is installed where this format is asked for by name.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import pickle
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.errors import CannotRun, ToolMissing, line
from polyexport.format import Format, Loaded, Observed, OnDevice, Route, Snippet
from polyexport.measure.drafts import Draft, distance, mended
from polyexport.measure.weights import InFloat, in_float, is_weight
from polyexport.spec import Arrays, ExportSpec, Precision, Runner, TensorSpec, calibration, in_rows, row_remark

if TYPE_CHECKING:
    import onnx

URL = "https://github.com/airockchip/rknn-toolkit2"

_CHIP = "rk3588"
_GRAPH = "model.onnx"
_FLOAT = (_GRAPH,)
_SETTINGS = "model.quantization.cfg"
_DATA = "model.data"
_GRAPH_QUANTIZED = "model.model"
_QUANTIZED = (_GRAPH_QUANTIZED, _DATA, _SETTINGS)
"""What the toolkit keeps of a graph that it has quantized: the graph, its weights and its number ranges."""


def lacks() -> str:
    """A platform that the toolkit is made for, in a line."""
    if sys.platform == "linux" and sys.version_info < (3, 13):
        return ""
    here = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
    return f"RKNN-Toolkit2 is made for Linux and for Python up to 3.12, and this is {here}"


# --- the graph --------------------------------------------------------------------------------------------------------

_OPSET = 19
"""The newest that the toolkit knows."""

_GELU = (
    "Gelu (x) => (y) { half = Constant<value = float {0.5}>() slope = Constant<value = float {0.70710678}>() "
    "scaled = Mul(x, slope) erf = Erf(scaled) one = Constant<value = float {1.0}>() share = Add(erf, one) "
    "product = Mul(x, share) y = Mul(product, half) }"
)
_GELU_BY_TANH = (
    "Gelu (x) => (y) { half = Constant<value = float {0.5}>() cubic = Constant<value = float {0.044715}>() "
    "slope = Constant<value = float {0.79788456}>() square = Mul(x, x) cube = Mul(square, x) bent = Mul(cube, cubic) "
    "sum = Add(x, bent) scaled = Mul(sum, slope) tanh = Tanh(scaled) one = Constant<value = float {1.0}>() "
    "share = Add(tanh, one) product = Mul(x, share) y = Mul(product, half) }"
)


def in_older_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with operators that the toolkit knows; one that it lacks all the same it names itself."""
    from polyexport.onnx_graph.decompose import decomposed
    from polyexport.onnx_graph.static_shapes import set_values

    model = decomposed(model, [_GELU_BY_TANH], _by_tanh)
    model = decomposed(model, [_GELU], lambda node: not _by_tanh(node))
    for node in model.graph.node:  # its check of recurrent layers is older than this attribute, which is 0 by default
        set_values(node.attribute, [each for each in node.attribute if (each.name, each.i) != ("layout", 0)])
    for version in model.opset_import:
        if not version.domain:
            version.version = min(version.version, _OPSET)
    return model


def _by_tanh(node: onnx.NodeProto) -> bool:
    return any(each.s == b"tanh" for each in node.attribute)


# --- the toolkit ------------------------------------------------------------------------------------------------------


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Build it in float16."""
    with _workshop() as folder:
        _write_graph(source, spec, folder)
        _save(_FLOAT, folder, target)


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """A working folder of its own, since the toolkit writes into that.

    Raises:
        ToolMissing: the toolkit is not made for this platform.
        RuntimeError: the toolkit fails.
    """
    if why := lacks():
        raise ToolMissing(why)
    # where it pads its buffers it writes what lay there before, of this process's memory: now zeros
    ctypes.CDLL(None).mallopt(_M_PERTURB, 0xFF)
    with TemporaryDirectory() as folder, contextlib.chdir(folder), _in_a_line():
        yield Path(folder)


_M_PERTURB = -6
"""glibc's name for the byte whose complement fills memory that is allocated."""


@contextlib.contextmanager
def _in_a_line() -> Iterator[None]:
    """What the toolkit raises is a traceback in one text, whatever it was."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"RKNN-Toolkit2 fails: {cause(error)}") from error


def cause(error: ValueError) -> str:
    """The last exception in the text that the toolkit makes of a traceback."""
    said = re.findall(r"^[\w.]+: .*$", str(error), re.MULTILINE)
    return said[-1] if said else line(error)


def _must(failed: int, what: str) -> None:
    if failed:
        raise RuntimeError(f"RKNN-Toolkit2 cannot {what}; see its output in the log")


def _toolkit() -> Any:
    from rknn.api import RKNN

    toolkit = RKNN(verbose=False)
    _must(toolkit.config(target_platform=_CHIP), f"build for {_CHIP}")
    return toolkit


def _built(kept: tuple[str, ...]) -> Any:
    """What the toolkit builds from these files in the working folder."""
    toolkit = _toolkit()
    if kept == _FLOAT:
        _must(toolkit.load_onnx(_GRAPH), "read the graph")
        _must(toolkit.build(do_quantization=False), "build it")
    else:
        _must(toolkit.hybrid_quantization_step2(*kept), "build it")
    return toolkit


def _write_graph(source: Path, spec: ExportSpec, folder: Path) -> list[str]:
    """Write the graph of one row; returns the names of the inputs that it reads."""
    import onnx

    from polyexport.onnx_graph.static_shapes import with_sizes

    model = in_older_opset(with_sizes(source, spec, spec.one_row()))
    onnx.save(model, folder / _GRAPH)
    return [value.name for value in model.graph.input]


def _save(kept: tuple[str, ...], folder: Path, target: Path) -> None:
    toolkit = _built(kept)
    _must(toolkit.export_rknn(str(target)), "write it")
    toolkit.release()
    for name in kept:
        shutil.copyfile(folder / name, target.with_name(name))


# --- int8 -------------------------------------------------------------------------------------------------------------

_SAMPLES = "samples.txt"
_ROWS, _FEW_ROWS = 32, 4
"""How many rows a draft is compared on, and one of which a single layer is in int8."""


def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
    """Build it in int8, with number ranges from `spec.calibration`, and one scale for each channel of the weights.

    With the share `spec.in_float` of the layers in half precision, the costliest ones.
    """
    _quantize(source, target, spec, in_part=spec.in_float > 0)


def quantize_in_part(source: Path, target: Path, spec: ExportSpec) -> None:
    """The same, with the costliest layers in half precision, as many as bring the outputs near."""
    _quantize(source, target, spec, in_part=True)


def _quantize(source: Path, target: Path, spec: ExportSpec, *, in_part: bool) -> None:
    with _workshop() as folder:
        inputs = _write_graph(source, spec, folder)
        _write_samples(folder, inputs, spec.one_row())
        toolkit = _toolkit()
        _must(toolkit.load_onnx(_GRAPH), "read the graph")
        _must(toolkit.hybrid_quantization_step1(dataset=_SAMPLES), "quantize it")
        toolkit.release()
        _forget_folder(folder / _DATA)
        if in_part:
            text = _settled(folder, inputs, spec)
            (folder / _SETTINGS).write_text(text, encoding="utf-8")
        _save(_QUANTIZED, folder, target)


def _write_samples(folder: Path, inputs: list[str], one: ExportSpec) -> None:
    """Write each row of `spec.calibration` as the toolkit reads it: files of arrays, those of one row in a line."""
    lines = []
    for index, arrays in enumerate(calibration(one)):
        files = [f"{index}.{position}.npy" for position in range(len(inputs))]
        for name, file in zip(inputs, files, strict=True):
            np.save(folder / file, arrays[name])
        lines.append(" ".join(files))
    (folder / _SAMPLES).write_text("\n".join(lines), encoding="utf-8")


def _forget_folder(file: Path) -> None:
    """The toolkit writes down where the graph lay, which is elsewhere each time."""
    kept = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({**kept, "ori_model_path": _GRAPH}, protocol=4))


def _settled(folder: Path, inputs: Sequence[str], spec: ExportSpec) -> str:
    """The settings of a quantized model in the working folder, with the costliest layers in half precision."""
    one = spec.one_row()
    rows = [{name: arrays[name] for name in inputs} for arrays in islice(calibration(one), _ROWS)]
    expected = _simulated(_FLOAT, one, rows)
    settings = (folder / _SETTINGS).read_text(encoding="utf-8")
    layers = _layers(folder / _GRAPH_QUANTIZED, settings)

    def make(kept: Sequence[str], alone: Sequence[str]) -> Draft:
        text = _with_half(settings, [name for name in layers if name not in alone] if alone else kept)
        (folder / _SETTINGS).write_text(text, encoding="utf-8")
        few = rows[:_FEW_ROWS] if alone else rows
        return Draft(text, "", distance(expected[: len(few)], _simulated(_QUANTIZED, one, few)), tuple(kept))

    chosen, note = mended([make((), ())], {name: name for name in layers}, make, spec.in_float)
    print(note)
    text: str = chosen.model
    return text


def _simulated(kept: tuple[str, ...], one: ExportSpec, rows: Iterable[Arrays]) -> list[Arrays]:
    """What the model that is built from these files answers to each row."""
    toolkit = _built(kept)
    try:
        _must(toolkit.init_runtime(), "start its simulator")
        read = tuple(tensor for tensor in one.inputs if tensor.name in _inputs(Path(kept[0])))
        return list(map(_runner(toolkit, replace(one, inputs=read)), rows))
    finally:
        toolkit.release()


def _layers(graph: Path, settings: str) -> list[str]:
    """The layers of a quantized graph that may be in half precision instead, by the names of their outputs."""
    import onnx

    in_int8 = set(re.findall(r"^    (\S+):\n(?:      +.*\n)*?        dtype: int8$", settings, re.MULTILINE))
    nodes = [node for node in onnx.load(graph).graph.node if node.op_type != _CONVERSION]
    ends = {name for node in nodes for name in node.output}
    return [name for name in re.findall(r"^    (\S+):$", settings, re.MULTILINE) if name in in_int8 & ends]


_CONVERSION = "exDataConvert"
"""The toolkit's own operator between two types, for which there is no choice."""


def _with_half(settings: str, layers: Sequence[str]) -> str:
    """The settings with these layers in half precision."""
    rest = settings.partition(_PARAMETERS)[2]
    chosen = "".join(f"\n    {name}: float16" for name in layers) or " {}"
    return f"custom_quantize_layers:{chosen}\n{_PARAMETERS}{rest}"


_PARAMETERS = "quantize_parameters:"


# --- the simulator ----------------------------------------------------------------------------------------------------


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Build it anew from what lies beside it, and run it in the toolkit's simulator, row by row.

    Raises:
        RuntimeError: that is not the artifact, or the toolkit fails.
    """
    runtime = simulator(path)
    left = InFloat() if path.with_name(_GRAPH).exists() else in_float16(path)
    read = _inputs(path.with_name(_beside(path)[0]))
    one = spec.one_row()
    signature = replace(one, inputs=tuple(tensor for tensor in one.inputs if tensor.name in read))
    name = f"the simulator of RKNN-Toolkit2 {metadata.version('rknn-toolkit2')} for {_CHIP.upper()}, on the CPU"
    return Loaded(
        in_rows(_runner(runtime, signature), one),
        signature,
        shortfall=left.shortfall,
        remark="; ".join(filter(None, (row_remark(spec), left.remark))),
        stand_in=f"what ran is {name}, which says nothing of an NPU's speed",
        observed=lambda: Observed(verified_by=name),
    )


def simulator(path: Path) -> Any:
    """The toolkit, ready to simulate what it has built from the files beside the artifact, which has to be that."""
    kept = _beside(path)
    with _workshop() as folder:
        for name in kept:
            shutil.copyfile(path.with_name(name), folder / name)
        toolkit = _built(kept)
        _must(toolkit.export_rknn("rebuilt.rknn"), "write it")
        if not same(Path("rebuilt.rknn").read_bytes(), path.read_bytes()):
            raise RuntimeError(f"{path.name} is not what the toolkit builds from {kept[0]} beside it")
        _must(toolkit.init_runtime(), "start its simulator")
    atexit.register(toolkit.release)  # until then it has a temporary folder
    return toolkit


def in_float16(path: Path) -> InFloat:
    """What is in half precision in a quantized model, by the files beside it: layers, and a share of the weights."""
    import onnx

    layers = half_layers(path.with_name(_SETTINGS).read_text(encoding="utf-8"))
    graph = onnx.load(path.with_name(_GRAPH_QUANTIZED), load_external_data=False).graph
    sizes = {each.name: math.prod(each.dims) for each in graph.initializer if is_weight(each.dims)}
    left = {name for node in graph.node if {*node.output} & {*layers} for name in node.input if name in sizes}
    named = f"in half precision: {', '.join(layers)}" if layers else ""
    return in_float(sum(map(sizes.__getitem__, left)), sum(sizes.values()), "", named)


def half_layers(settings: str) -> list[str]:
    """The layers that a model's settings have in half precision, by the names of their outputs."""
    return re.findall(r"^ +(\S+): float16\b", settings.partition(_PARAMETERS)[0], re.MULTILINE)


def _inputs(graph: Path) -> list[str]:
    """The names of the inputs that a graph reads."""
    import onnx

    return [value.name for value in onnx.load(graph, load_external_data=False).graph.input]


def _beside(path: Path) -> tuple[str, ...]:
    return _FLOAT if path.with_name(_GRAPH).exists() else _QUANTIZED


_NOT_INITIALIZED = 0.01
"""The share of bytes that may be whatever lay in memory, as twelve of a convolution's settings, which are a kilobyte:
another model's file is found, a flipped bit is not."""


def same(one: bytes, other: bytes) -> bool:
    """Whether two files that the toolkit has built are of the same model."""
    if len(one) != len(other):
        return False
    return bool(np.mean(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)) <= _NOT_INITIALIZED)


def _runner(runtime: Any, signature: ExportSpec) -> Runner:
    """Run as many rows as the signature has: by the toolkit, or by its runtime on a board, which is called alike."""

    def run(arrays: Arrays) -> Arrays:
        given = [np.ascontiguousarray(arrays[tensor.name]) for tensor in signature.inputs]
        with _in_a_line():
            found = runtime.inference(inputs=given, data_format=["nchw"] * len(given))
        if found is None:
            raise RuntimeError("RKNN's runtime gives no answer; see its output in the log")
        return {tensor.name: answer(array, tensor) for tensor, array in zip(signature.outputs, found, strict=True)}

    return run


def answer(found: np.ndarray, tensor: TensorSpec) -> np.ndarray:
    """What is found, in the shape and dtype that PyTorch has."""
    shape = tuple(map(int, tensor.shape))
    if found.size != math.prod(shape):
        raise RuntimeError(f"RKNN gives {tensor.name} in the shape {found.shape}, PyTorch in {shape}")
    dtype = np.dtype(tensor.dtype)
    return (found if dtype.kind == "f" else np.rint(found)).reshape(shape).astype(dtype)


# --- a board ----------------------------------------------------------------------------------------------------------


def load_on_board(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it on the NPU of this board, row by row.

    Raises:
        CannotRun: there is none, or its library is not installed.
    """
    from rknnlite.api import RKNNLite

    board = RKNNLite()
    if board.load_rknn(str(path)) or board.init_runtime():
        raise CannotRun(
            f"there is no NPU of {_CHIP.upper()} here, or not librknnrt.so, which {URL} has: see what is printed above"
        )
    one = spec.one_row()
    return Loaded(in_rows(_runner(board, one), one), one, observed=lambda: Observed(device=f"npu {_CHIP}"))


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
from rknnlite.api import RKNNLite

model = RKNNLite()
model.load_rknn("{{ path }}")
model.init_runtime()
batch = np.load("{{ batch }}")
inputs = [
{%- for input in inputs %}
    batch[{{ input.name | tojson }}]{% if input.shape %}[:{{ input.shape[0] }}]{% endif %},
{%- endfor %}
]
outputs = model.inference(inputs=inputs, data_format=["nchw"] * len(inputs))
""",
    ),
)


def _format(name: str, precision: Precision, description: str, *routes: Route) -> Format:
    return Format(
        name=name,
        description=description,
        url=URL,
        artifact="model.rknn",
        precision=precision,
        routes=routes,
        load=load,
        lacks=lacks,
        calibrated=precision == "int8",
        targets=("camera",),
        snippets=_SNIPPETS,
        on_device=OnDevice(("rknn-toolkit-lite2",), load_on_board),
    )


FORMATS = (
    _format(
        "rknn",
        "float16",
        "RKNN model in half precision, for the NPU of Rockchip's RK3588",
        Route("onnx", "onnx", "rknn", convert),
        Route("opset15", "onnx-opset15", "rknn", convert),
    ),
    _format(
        "rknn-int8",
        "int8",
        "RKNN model in int8, calibrated with validation batches",
        Route("onnx", "onnx", "rknn", quantize, mends=True),
        Route("hybrid", "onnx", "rknn", quantize_in_part, mends=True),
        Route("opset15", "onnx-opset15", "rknn", quantize, mends=True),
    ),
)
