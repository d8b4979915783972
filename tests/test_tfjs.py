"""TensorFlow.js' backends: the faster one that agrees is used, and the report says which and why."""

from __future__ import annotations

import time

import numpy as np
import pytest

from polyexport import Arrays
from polyexport.formats.tfjs import _Faster, _split_sums

RIGHT = {"y": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}


def asked(cpu_seconds: float, wasm_seconds: float, wasm: Arrays | Exception) -> tuple[_Faster, list[str]]:
    """A model that answers like this, and the backends that it was asked on."""
    used: list[str] = []

    def ask(backend: str, inputs: Arrays) -> tuple[Arrays, int]:
        used.append(backend)
        time.sleep(cpu_seconds if backend == "cpu" else wasm_seconds)
        if backend == "cpu":
            return RIGHT, 1_000_000
        if isinstance(wasm, Exception):
            raise wasm
        return wasm, 2_000_000

    return _Faster(ask), used


@pytest.mark.parametrize(
    ("cpu_seconds", "wasm_seconds", "wasm", "backend", "says"),
    [
        (0.2, 0.0, RIGHT, "wasm", "and they agree"),
        (0.0, 0.2, RIGHT, "cpu", "and they agree"),
        (0.2, 0.0, {"y": -RIGHT["y"]}, "cpu", "wasm differs: y: 100.000% of the elements are off"),
        (0.2, 0.0, RuntimeError("Kernel 'Erf' not registered"), "cpu", "wasm cannot run it: Kernel 'Erf'"),
    ],
)
def test_the_faster_backend_that_agrees_is_used_and_named(cpu_seconds, wasm_seconds, wasm, backend, says):
    run, used = asked(cpu_seconds, wasm_seconds, wasm)
    assert np.array_equal(run({})["y"], RIGHT["y"])
    run({})
    assert used[-1] == backend
    assert run.observed.device == f"cpu ({backend} backend)"
    assert run.observed.verified_by.startswith(f"TensorFlow.js in Node, {backend} backend (")
    assert says in run.observed.verified_by
    assert run.observed.peak_memory_bytes == (1_000_000 if backend == "cpu" else 2_000_000)


def test_a_backend_that_fails_at_another_size_is_left():
    run, used = asked(0.1, 0.0, RIGHT)
    ask = run._ask

    def smaller(backend, inputs):
        if backend == "wasm" and inputs:
            raise RuntimeError("memory access out of bounds")
        return ask(backend, inputs)

    run._ask = smaller
    run({})
    assert np.array_equal(run({"x": RIGHT["y"]})["y"], RIGHT["y"])
    assert used[-1] == "cpu"
    assert run.observed.verified_by.endswith(
        "cpu backend (wasm cannot run it at every size: memory access out of bounds)"
    )


def test_a_sum_fused_with_a_whole_tensor_is_decomposed_and_a_bias_is_not():
    fused = {"T": {"type": "DT_FLOAT"}, "fused_ops": {"list": {"s": ["Qmlhc0FkZA==", "UmVsdQ=="]}}}  # BiasAdd, Relu
    node = {"name": "a", "op": "_FusedConv2D", "input": ["x", "w", "bias"], "attr": fused}
    residual = {**node, "name": "b", "input": ["a", "w", "x"]}
    weights = [{"name": "w", "shape": [3, 3, 4, 4]}, {"name": "bias", "shape": [4]}]
    model = {"modelTopology": {"node": [node, residual]}, "weightsManifest": [{"weights": weights}]}
    _split_sums(model)
    found = [(each["name"], each["op"], each["input"]) for each in model["modelTopology"]["node"]]
    assert found == [
        ("a", "_FusedConv2D", ["x", "w", "bias"]),
        ("b/product", "Conv2D", ["a", "w"]),
        ("b/sum", "AddV2", ["b/product", "x"]),
        ("b", "Relu", ["b/sum"]),
    ]
