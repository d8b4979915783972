"""TensorFlow.js: a graph model for browsers and Node; it is run here in Node.

https://www.tensorflow.org/js/guide/conversion
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from polyexport.format import Convert, Format, Loaded, Observed, Route, Snippet
from polyexport.formats.graphdef import check_size
from polyexport.formats.saved_model import SIGNATURE, arguments
from polyexport.measure.latency import timed_ms
from polyexport.measure.parity import compare
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import Arrays, ExportSpec, Precision
from polyexport.web import page
from polyexport.web.node import Node

_PROGRAM = Path(__file__).parents[1] / "toolchains" / "tfjs" / "run.cjs"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Freeze and optimize the SavedModel with tensorflowjs; weights are in shards of 4 MB."""
    check_size(source)
    import_tensorflowjs()
    model = _converted(source, target, spec)
    if _activations(model) - _FUSED:
        with _fusing_nothing():
            model = _converted(source, target, spec)
    _split_sums(model)
    model["signature"] = _named(model["signature"], spec)
    # attributes come in random order; the signature keeps its order, which is that of the inputs
    model["modelTopology"] = json.loads(json.dumps(model["modelTopology"], sort_keys=True))
    target.write_text(json.dumps(model), encoding="utf-8")
    _write_page(target, spec)


def _write_page(target: Path, spec: ExportSpec) -> None:
    page.write(target, spec, "tfjs", "@tensorflow/tfjs", "@tensorflow/tfjs-core")


_UNUSED = ("tensorflow_decision_forests", "tensorflow_hub", "jax", "jax.experimental", "jax.experimental.jax2tf")
"""Modules that tensorflowjs imports only for other sources; without them its toolchain is half the size."""


def import_tensorflowjs() -> None:
    """Import tensorflowjs with empty modules in place of those that converting a SavedModel does not need."""
    importlib.import_module("keras")  # it looks for jax, and must not find an empty one
    empty = {name: ModuleType(name) for name in _UNUSED}
    vars(empty["jax.experimental"])["jax2tf"] = empty["jax.experimental.jax2tf"]
    sys.modules.update(empty)
    try:
        importlib.import_module("tensorflowjs")
    finally:
        for name in empty:
            del sys.modules[name]


def store_weights_as(dtype: str) -> Convert:
    """A conversion of the float32 model that stores its weights, except vectors and scalars, in a smaller type.

    `dtype` is `float16`, or `uint8`, which has 256 steps between the minimum and maximum of a tensor. TensorFlow.js
    converts them to float32 when it loads them.
    """

    def convert_weights(source: Path, target: Path, spec: ExportSpec) -> None:
        import_tensorflowjs()
        from tensorflowjs import read_weights, write_weights

        model = json.loads(source.read_text(encoding="utf-8"))
        groups = read_weights.read_weights(model["weightsManifest"], str(source.parent))
        names = [each["name"] for group in groups for each in group if _is_large(each["data"])]
        model["weightsManifest"] = write_weights.write_weights(
            groups, str(target.parent), write_manifest=False, quantization_dtype_map={dtype: names}
        )
        target.write_text(json.dumps(model), encoding="utf-8")
        _write_page(target, spec)

    return convert_weights


def _is_large(weight: np.ndarray) -> bool:
    return weight.dtype == np.float32 and weight.ndim > 1


def _converted(source: Path, target: Path, spec: ExportSpec) -> dict[str, Any]:
    from tensorflowjs.converters import tf_saved_model_conversion_v2 as conversion

    with _flat_products():
        conversion.convert_tf_saved_model(
            str(source),
            str(target.parent),
            signature_def=SIGNATURE,
            control_flow_v2=True,
            metadata={"polyexport": dict(spec.metadata), **({"labels": spec.labels} if spec.labels else {})},
        )
    model: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return model


_FUSED = {"BiasAdd", "Relu", "Relu6", "Elu", "Prelu", "LeakyRelu", "Sigmoid"}
"""Operators that TensorFlow.js' kernels can have fused to a convolution or product."""


def _activations(model: dict[str, Any]) -> set[str]:
    return {name for node in model["modelTopology"]["node"] for name in _fused(node)}


def _fused(node: dict[str, Any]) -> list[str]:
    listed = node.get("attr", {}).get("fused_ops", {"list": {}})["list"].get("s", [])
    return [base64.b64decode(each).decode() for each in listed]


@contextlib.contextmanager
def _fusing_nothing() -> Iterator[None]:
    """Remove the fusing optimizer from tensorflowjs' list: it fuses tanh and gelu, which no kernel supports."""
    from tensorflowjs.converters import tf_saved_model_conversion_v2 as conversion

    run = conversion._run_grappler

    def without(config: Any, *rest: Any) -> Any:
        optimizers = config.graph_options.rewrite_options.optimizers
        optimizers[:] = [each for each in optimizers if each != "remap"]
        return run(config, *rest)

    with mock.patch.object(conversion, "_run_grappler", without):
        yield


@contextlib.contextmanager
def _flat_products() -> Iterator[None]:
    """Have products of many rows with one matrix converted as products of two matrices.

    TensorFlow.js' wasm backend computes a batch of more than one product in a plain loop, seventy times slower.
    """
    from tensorflowjs.converters import tf_saved_model_conversion_v2 as conversion

    from polyexport.lowering.tensorflow.products import flattened

    optimize = conversion.optimize_graph

    def flatten_first(graph: Any, *rest: Any, **options: Any) -> Any:
        return optimize(flattened(graph), *rest, **options)

    with mock.patch.object(conversion, "optimize_graph", flatten_first):
        yield


_UNFUSED = {
    "_FusedConv2D": "Conv2D",
    "FusedDepthwiseConv2dNative": "DepthwiseConv2dNative",
    "_FusedMatMul": "MatMul",
}


def _split_sums(model: dict[str, Any]) -> None:
    """Split ops that were fused with a whole tensor as a bias, as at the end of a residual block.

    TensorFlow's optimizer fuses it, TensorFlow.js' CPU backend supports it, but its wasm and WebGL backends refuse it.
    """
    vectors = {w["name"] for group in model["weightsManifest"] for w in group["weights"] if len(w["shape"]) == 1}
    nodes: list[dict[str, Any]] = []
    for node in model["modelTopology"]["node"]:
        bias, *activation = _fused(node) or [""]
        if bias != "BiasAdd" or node["input"][2] in vectors or len(node["input"]) > 3:
            nodes.append(node)
            continue
        name, dtype = node["name"], {"T": node["attr"]["T"]}
        product, total = f"{name}/product", f"{name}/sum" if activation else name
        one, other, added = node["input"]
        attributes = {key: value for key, value in node["attr"].items() if key != "fused_ops"}
        nodes += [
            {"name": product, "op": _UNFUSED[node["op"]], "input": [one, other], "attr": attributes},
            {"name": total, "op": "AddV2", "input": [product, added], "attr": dtype},
            *({"name": name, "op": op, "input": [total], "attr": node["attr"]} for op in activation),
        ]
    model["modelTopology"]["node"] = nodes


def _named(signature: dict[str, Any], spec: ExportSpec) -> dict[str, Any]:
    """The signature under forward's names; tensorflowjs loses names of tensors with the same shape.

    Placeholders have the names of the SavedModel's arguments; outputs are numbered `Identity`, `Identity_1` … in the
    order of their names.
    """
    names = arguments(spec)
    ports = {names[entry["name"].split(":")[0]]: entry for entry in signature.get("inputs", {}).values()}
    made = sorted(signature["outputs"].values(), key=lambda entry: _number(entry["name"]))
    outputs = dict(zip(sorted(spec.output_names), made, strict=True))
    return {"inputs": {name: ports[name] for name in spec.input_names if name in ports}, "outputs": outputs}


def _number(name: str) -> int:
    return int(name.split(":")[0].removeprefix("Identity").removeprefix("_") or 0)


Ask = Callable[[str, Arrays], tuple[Arrays, int | None]]
"""Runs the model on one of TensorFlow.js' backends, `cpu` or `wasm`; also returns Node's peak memory in bytes."""


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it in Node, on the faster of TensorFlow.js' cpu and wasm backends, in a process that ends with this one."""
    node = Node("TensorFlow.js", _PROGRAM, str(path))
    dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.outputs}

    def ask(backend: str, inputs: Arrays) -> tuple[Arrays, int | None]:
        given = {name: _narrow(array) for name, array in inputs.items()}
        found = node.ask(given, spec.output_names, backend=backend)
        # JavaScript has no 64-bit integers: int64 was computed as int32
        return {name: array.astype(dtypes[name]) for name, array in found.items()}, node.peak_memory_bytes

    run = _Faster(ask)
    return Loaded(run, observed=lambda: run.observed)


class _Faster:
    """Runs a model on both backends once, and then on the faster one; wasm has to agree with cpu.

    Attributes:
        observed: The backend that is used, the result of the other one, the time of the first call on it, and Node's
            memory; known after the first call.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._backend = ""
        self.observed = Observed()

    def __call__(self, inputs: Arrays) -> Arrays:
        if not self._backend:
            return self._choose(inputs)
        try:
            return self._run(self._backend, inputs)
        except RuntimeError as error:  # wasm may support one batch size but not another
            if self._backend == "cpu":
                raise
            self._settle("cpu", f"wasm cannot run it at every size: {error}")
            return self._run("cpu", inputs)

    def _run(self, backend: str, inputs: Arrays) -> Arrays:
        answer, peak_memory_bytes = self._ask(backend, inputs)
        self.observed = replace(self.observed, peak_memory_bytes=peak_memory_bytes)
        return answer

    def _choose(self, inputs: Arrays) -> Arrays:
        answer, first_ms, cpu_ms = self._timed("cpu", inputs)
        backend = "cpu"
        try:
            found, wasm_first_ms, wasm_ms = self._timed("wasm", inputs)
        except RuntimeError as error:  # the backend lacks an operator, or a form of it
            other = f"wasm cannot run it: {error}"
        else:
            other = f"cpu {cpu_ms:.3g} ms, wasm {wasm_ms:.3g} ms a call, and they agree"
            agreed = compare(found, answer, Tolerance.for_precision("float32"))
            if not agreed.passed:
                other = f"wasm differs: {agreed.reason}"
            elif wasm_ms < cpu_ms:
                answer, backend, first_ms = found, "wasm", wasm_first_ms
        self._settle(backend, other)
        self.observed = replace(self.observed, first_ms=first_ms)
        return answer

    def _settle(self, backend: str, other: str) -> None:
        """Use a backend from now on, and record the result of the other one."""
        self._backend = backend
        told = f"TensorFlow.js in Node, {backend} backend ({other})"
        self.observed = replace(self.observed, verified_by=told, device=f"cpu ({backend} backend)")

    def _timed(self, backend: str, inputs: Arrays) -> tuple[Arrays, float, float]:
        """The outputs, and the milliseconds of a first and a second call."""
        first_ms = timed_ms(lambda: self._run(backend, inputs))
        start = time.perf_counter()
        answer = self._run(backend, inputs)
        return answer, first_ms, (time.perf_counter() - start) * 1e3


def _narrow(array: np.ndarray) -> np.ndarray:
    """The array in one of TensorFlow.js' three types."""
    kinds: dict[str, Any] = {"f": np.float32, "b": np.bool_}
    return np.asarray(array, kinds.get(array.dtype.kind, np.int32), order="C")


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


def _format(name: str, precision: Precision, description: str, route: Route) -> Format:
    return Format(
        name=name,
        aliases=(name.replace("tfjs", "tensorflowjs"),),
        description=description,
        url="https://www.tensorflow.org/js/guide/conversion",
        artifact="model.json",
        graph="model.json",
        precision=precision,
        routes=(route,),
        load=load,
        targets=("browser",),
        page=page.NAME,
        runtime="tfjs",
        slow_because="in Node its WebAssembly backend has one thread (https://github.com/tensorflow/tfjs/issues/3830), "
        "and multiplies batches of matrices, as attention does, in a plain loop",
        snippets=_SNIPPETS,
    )


FORMATS = (
    _format(
        "tfjs",
        "float32",
        "TensorFlow.js graph model, for browsers and Node",
        Route("tensorflowjs", "saved_model", "tensorflow", convert),
    ),
    _format(
        "tfjs-fp16",
        "float16",
        "TensorFlow.js graph model with weights in float16, half the download",
        Route("weights", "tfjs", "tensorflow", store_weights_as("float16")),
    ),
    _format(
        "tfjs-w8",
        "w8",
        "TensorFlow.js graph model with weights in 8 bits, a quarter of the download",
        Route("weights", "tfjs", "tensorflow", store_weights_as("uint8")),
    ),
)
