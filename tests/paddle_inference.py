"""Programs that Paddle's inference runtime gets wrong unless they are made for it, against ONNX's own evaluator.

    python paddle_inference.py PACKAGE FOLDER [as-it-is]

Each graph is lowered, saved in FOLDER and run by Paddle Inference; with a third word it is saved without the copies of
`polyexport.lowering.paddle.inference`. Raises at the first that differs, else prints `agree`.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

Step = tuple[str, list[str], dict[str, Any]]
"""An operator, its inputs after the first, and its attributes."""

RANDOM = np.random.default_rng(0)


def agrees(folder: str, name: str, steps: list[Step], x: np.ndarray, **weights: Any) -> None:
    """Each step works on the result of the one before, `x` at first; the last result is `y`."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator
    from paddle import inference
    from paddle.static import InputSpec

    from polyexport.lowering.paddle import lower_model

    names = ["x", *(f"t{index}" for index in range(1, len(steps))), "y"]
    nodes = [
        helper.make_node(op, [names[index], *more], [names[index + 1]], **attributes)
        for index, (op, more, attributes) in enumerate(steps)
    ]
    kind = TensorProto.FLOAT if x.dtype == np.float32 else TensorProto.INT64
    port = helper.make_tensor_value_info("x", kind, ["N", *x.shape[1:]])
    tensors = [numpy_helper.from_array(np.asarray(weight), key) for key, weight in weights.items()]
    graph = helper.make_graph(nodes, "g", [port], [helper.make_tensor_value_info("y", kind, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    prefix = Path(tempfile.mkdtemp(dir=folder), "model")  # weights of another program would be read too
    lower_model(model, [InputSpec([-1, *x.shape[1:]], str(x.dtype), "x")]).save(prefix)
    config = inference.Config(f"{prefix}.json", f"{prefix}.pdiparams")
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    predictor.get_input_handle("x").copy_from_cpu(x)
    predictor.run()
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    actual = predictor.get_output_handle("y").copy_to_cpu()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def main(package: str, folder: str, *as_it_is: str) -> None:
    """Run them all; see the module's docstring."""
    module = types.ModuleType("polyexport")
    module.__path__ = [package]
    sys.modules["polyexport"] = module
    from polyexport.lowering.paddle import inference

    if as_it_is:
        vars(inference)["guard"] = lambda program: None
    image, whole = RANDOM.random((2, 3, 8, 9), "f4") + 1, RANDOM.integers(0, 9, (2, 3, 4))
    for op, more in (("Floor", []), ("Reciprocal", []), ("Pow", ["three"]), ("CumSum", ["axis"])):
        steps = [("Mul", ["two"], {}), (op, more, {}), ("Add", ["t1"], {})]
        agrees(folder, f"y + {op}(y)", steps, image, two=np.float32(2), three=np.float32(3), axis=1)
    agrees(folder, "a sum times three", [("Add", ["x"], {}), ("Mul", ["three"], {})], whole, three=3)
    agrees(folder, "a product, unsqueezed", [("Mul", ["x"], {}), ("Unsqueeze", ["axes"], {})], whole, axes=[1])
    steps = [("Transpose", [], {"perm": [0, 2, 1]}), ("Reshape", ["shape"], {})]
    agrees(folder, "integers transposed and reshaped", steps, whole, shape=[-1, 12])
    steps = [
        *(("Reshape", ["split"], {}), ("Transpose", [], {"perm": [0, 1, 3, 2, 4, 5]}), ("Reshape", ["rows"], {})),
        *(("MatMul", ["weight"], {}), ("Add", ["bias"], {}), ("Reshape", ["heads"], {})),
    ]
    weights = {"weight": RANDOM.random((16, 48), "f4"), "bias": RANDOM.random(48, "f4")}
    shapes = {"split": [-1, 2, 4, 2, 4, 16], "rows": [-1, 16, 16], "heads": [-1, 16, 3, 4, 4]}
    agrees(folder, "windows in a linear layer", steps, RANDOM.random((2, 8, 8, 16), "f4"), **weights, **shapes)
    for pads in (
        [0, 0, 2, 1, 0, 0, 1, 0],
        [0, 0, 3, 0, 0, 0, 0, 2],
        [0, 2, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 2, 0],
    ):
        agrees(
            folder,
            f"pads {pads}",
            [("Mul", ["half"], {}), ("Pad", ["pads", "half"], {})],
            image,
            pads=pads,
            half=np.float32(0.5),
        )
    steps = [("ConvTranspose", ["kernel"], {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]})]
    agrees(folder, "a transposed convolution", steps, image, kernel=RANDOM.random((3, 4, 3, 3), "f4"))
    steps = [
        *(("Mul", ["half"], {}), ("Transpose", [], {"perm": [0, 2, 3, 1]}), ("Reshape", ["rows"], {})),
        ("Concat", ["zeros"], {"axis": 1}),
    ]
    zeros = np.zeros((2, 1, 3), "f4")
    agrees(folder, "pixels in rows", steps, image, half=np.float32(0.5), rows=[-1, 72, 3], zeros=zeros)
    steps = [("MatMul", ["matrix"], {}), ("Squeeze", ["axes"], {})]
    matrix = RANDOM.random((1, 3, 9, 1), "f4")
    agrees(folder, "a product whose batch is free on one side", steps, image, matrix=matrix, axes=[-1])
    print("agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
