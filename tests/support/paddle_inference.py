"""Graphs that the passes of Paddle Inference would break, against ONNX's own evaluator.

    python paddle_inference.py PACKAGE

Each is lowered, saved and run by Paddle Inference, twice: as it is lowered for that runtime, and as plainly as Paddle's
executor takes it, without the copies of `polyexport.lowering.paddle.inference` and with Paddle's own `add`. Prints as
JSON, on the last line, the names of the graphs with a wrong answer, of the first round and of the second.
"""

from __future__ import annotations

import json
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Step = tuple[str, list[str], dict[str, Any]]
"""An operator, its inputs after the first, and its attributes."""

Case = tuple[str, list[Step], np.ndarray, dict[str, Any]]
"""Steps that each work on the result of the one before, `x` at first, called `t1`, `t2` … `y`; and weights by name."""

RANDOM = np.random.default_rng(0)


def cases() -> Iterator[Case]:
    """All of them."""
    image, whole = RANDOM.random((2, 3, 8, 9), "f4") + 1, RANDOM.integers(0, 9, (2, 3, 4))
    half = {"half": np.float32(0.5)}
    for op, more in (("Floor", []), ("Reciprocal", []), ("Pow", ["three"]), ("CumSum", ["axis"])):
        weights = {"two": np.float32(2), "three": np.float32(3), "axis": 1}
        yield f"y + {op}(y)", [("Mul", ["two"], {}), (op, more, {}), ("Add", ["t1"], {})], image, weights
    yield "a sum times three", [("Add", ["x"], {}), ("Mul", ["three"], {})], whole, {"three": 3}
    yield "a product, unsqueezed", [("Mul", ["x"], {}), ("Unsqueeze", ["axes"], {})], whole, {"axes": [1]}
    steps: list[Step] = [("Transpose", [], {"perm": [0, 2, 1]}), ("Reshape", ["shape"], {})]
    yield "integers transposed and reshaped", steps, whole, {"shape": [-1, 12]}
    yield "a distance of integers", [("Sub", ["other"], {}), ("Abs", [], {})], whole, {"other": whole[::-1].copy()}
    wide = RANDOM.random((2, 3))
    yield "a distance of doubles", [("Sub", ["other"], {}), ("Tanh", [], {})], wide, {"other": wide[:, :1] * 2}
    flat = {"weight": RANDOM.random((3, 4), "f4"), "rows": RANDOM.random((5, 2, 4), "f4")}
    yield "a product added to more axes", [("MatMul", ["weight"], {}), ("Add", ["rows"], {})], wide.astype("f4"), flat
    steps = [
        *(("Reshape", ["split"], {}), ("Transpose", [], {"perm": [0, 1, 3, 2, 4, 5]}), ("Reshape", ["rows"], {})),
        *(("MatMul", ["weight"], {}), ("Add", ["bias"], {}), ("Reshape", ["heads"], {})),
    ]
    weights = {"weight": RANDOM.random((16, 48), "f4"), "bias": RANDOM.random(48, "f4")}
    shapes = {"split": [-1, 2, 4, 2, 4, 16], "rows": [-1, 16, 16], "heads": [-1, 16, 3, 4, 4]}
    yield "windows in a linear layer", steps, RANDOM.random((2, 8, 8, 16), "f4"), weights | shapes
    for pads in (
        [0, 0, 2, 1, 0, 0, 1, 0],
        [0, 0, 3, 0, 0, 0, 0, 2],
        [0, 2, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 2, 0],
    ):
        yield f"pads {pads}", [("Mul", ["half"], {}), ("Pad", ["pads", "half"], {})], image, {"pads": pads, **half}
    steps = [("ConvTranspose", ["kernel"], {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]})]
    yield "a transposed convolution", steps, image, {"kernel": RANDOM.random((3, 4, 3, 3), "f4")}
    steps = [
        *(("Mul", ["half"], {}), ("Transpose", [], {"perm": [0, 2, 3, 1]}), ("Reshape", ["rows"], {})),
        ("Concat", ["zeros"], {"axis": 1}),
    ]
    yield "pixels in rows", steps, image, {**half, "rows": [-1, 72, 3], "zeros": np.zeros((2, 1, 3), "f4")}
    steps = [
        *(("Mul", ["half"], {}), ("Transpose", [], {"perm": [0, 2, 1, 3]}), ("Reshape", ["rows"], {})),
        ("Concat", ["t3"], {"axis": -1}),
    ]
    yield "rows of one head, beside themselves", steps, RANDOM.random((2, 1, 5, 8), "f4"), {**half, "rows": [-1, 5, 8]}
    steps = [("MatMul", ["matrix"], {}), ("Squeeze", ["axes"], {})]
    matrix = {"matrix": RANDOM.random((1, 3, 9, 1), "f4"), "axes": [-1]}
    yield "a product whose batch is free on one side", steps, image, matrix


def is_wrong(steps: list[Step], x: np.ndarray, weights: dict[str, Any]) -> bool:
    """Whether any result differs; all are outputs of one graph, and the last one of another, where passes do more."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    import backend_suite

    names = ["x", *(f"t{index}" for index in range(1, len(steps))), "y"]
    nodes = [
        helper.make_node(op, [names[index], *more], [names[index + 1]], **attributes)
        for index, (op, more, attributes) in enumerate(steps)
    ]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    given = helper.make_tensor_value_info("x", kind, ["N", *x.shape[1:]])
    tensors = [numpy_helper.from_array(np.asarray(weight), key) for key, weight in weights.items()]
    for outputs in (names[-1:], names[1:]):
        ports = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = helper.make_graph(nodes, "g", [given], ports, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        expected = dict(zip(outputs, ReferenceEvaluator(model).run(None, {"x": x}), strict=True))
        try:
            found = backend_suite.paddle(model, {"x": x}, {"x": [-1, *x.shape[1:]]})
        except Exception:  # some programs it refuses, whatever its own class for that
            traceback.print_exc()
            return True
        for name, array in expected.items():
            if found[name].shape != array.shape or not np.allclose(found[name], array, rtol=1e-4, atol=1e-4):
                return True
    return False


def main(package: str) -> None:
    """Run both rounds; see the module's docstring."""
    module = types.ModuleType("polyexport")
    module.__path__ = [package]
    sys.modules["polyexport"] = module
    sys.path.insert(0, str(Path(__file__).parent))
    import paddle

    from polyexport.lowering.paddle import OPS, inference

    every = list(cases())
    mended = [name for name, *graph in every if is_wrong(*graph)]
    vars(inference)["guard"] = lambda program: None
    OPS.elementwise("Add", since=14)(lambda a, b: paddle.add(a, b))
    plain = [name for name, *graph in every if is_wrong(*graph)]
    print(f"\n{json.dumps([mended, plain])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
