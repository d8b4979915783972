"""In the toolchain of Paddle: programs about the lowering, whose answers the tests look at.

python scripts/paddle_programs.py FOLDER
"""

import itertools
from dataclasses import replace
from unittest import mock

import numpy as np
from onnx import helper, numpy_helper
from paddle import inference
from paddle.static import InputSpec

import backend_suite
import bare  # noqa: F401  # before our package
import programs
from polyexport.lowering import paddle as lowering
from polyexport.lowering.paddle import lower_model


def unknown_input(folder):
    return programs.refusal("paddle")


def drawn(folder):
    return programs.drawn("paddle")


def weight_in_a_loop(folder):
    weight = np.random.rand(12, 12).astype("f4")

    def port(name, *sizes):
        return helper.make_tensor_value_info(name, 1, [*sizes, 12])

    nodes = [
        helper.make_node("MatMul", ["s", "w"], ["t"]),
        helper.make_node("Add", ["t", "row"], ["new"]),
        helper.make_node("Tanh", ["new"], ["out"]),
    ]
    body = helper.make_graph(nodes, "b", [port("s", "N"), port("row", "N")], [port("new", "N"), port("out", "N")])
    scan = helper.make_node("Scan", ["start", "x"], ["end", "y"], body=body, num_scan_inputs=1)
    ports = [port("start", "N"), port("x", "T", "N")], [port("end", "N"), port("y", "T", "N")]
    graph = helper.make_graph([scan], "g", *ports, [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    specs = [InputSpec([-1, 12], "float32", "start"), InputSpec([-1, -1, 12], "float32", "x")]
    prefix = folder / "model"
    lower_model(model, specs).save(prefix)
    config = inference.Config(f"{prefix}.json", f"{prefix}.pdiparams")
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    given = {"start": np.random.rand(2, 12).astype("f4"), "x": np.random.rand(5, 2, 12).astype("f4")}
    for name, array in given.items():
        predictor.get_input_handle(name).copy_from_cpu(array)
    predictor.run()
    state, rows = given["start"], []
    for row in given["x"]:
        state = state @ weight + row
        rows.append(np.tanh(state))
    for name, expected in (("end", state), ("y", np.stack(rows))):
        np.testing.assert_allclose(predictor.get_output_handle(name).copy_to_cpu(), expected, rtol=1e-4)


def sum_of_nothing(folder):
    def ports(name):
        return [helper.make_tensor_value_info(name, 1, None)]

    node = helper.make_node("ReduceLogSumExp", ["x", "last"], ["y"], keepdims=0)
    given = helper.make_tensor_value_info("x", 1, [None, 3])
    graph = helper.make_graph([node], "g", [given], ports("y"), [numpy_helper.from_array(np.array([1]), "last")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    x = np.array([[-np.inf] * 3, [-np.inf, 1, 2], [0, np.inf, 1]], "f4")
    y = backend_suite.paddle(model, {"x": x}, {"x": [-1, 3]})["y"]
    np.testing.assert_allclose(y, np.log(np.exp(x).sum(1)), rtol=1e-6)


def outputs_of_one_value(folder):
    def port(name):
        return helper.make_tensor_value_info(name, 1, None)

    pairs = {
        "Neg": ["x"],
        "Identity": ["x"],
        "Add": ["x", "w"],
        "Mul": ["x", "x"],
        "Abs": ["w"],
        "Reciprocal": ["a_Neg"],
    }
    nodes = [helper.make_node(op, inputs, [f"{which}_{op}"]) for op, inputs in pairs.items() for which in "ab"]
    nodes.append(helper.make_node("Add", ["w", "x"], ["c_Add"]))
    names = [node.output[0] for node in nodes]
    weights = [numpy_helper.from_array(np.array([2, 4], "f4"), "w")]
    given = [helper.make_tensor_value_info("x", 1, [None, 2])]
    graph = helper.make_graph(nodes, "g", given, list(map(port, names)), weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    x, w = np.array([[-1, 2], [4, -8]], "f4"), np.array([2, 4], "f4")
    found = backend_suite.paddle(model, {"x": x}, {"x": [-1, 2]})
    right = {"Neg": -x, "Identity": x, "Add": x + w, "Mul": x * x, "Abs": w, "Reciprocal": -1 / x}
    assert list(found) == names
    for name, array in found.items():
        np.testing.assert_array_equal(array, right[name.split("_")[1]], name)


def clip_to_0_and_6(folder):
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(8, 4, 1, 1)).astype("f4") * 4, random.normal(size=8).astype("f4")
    constants = {"w": kernel, "b": bias, "low": np.array(0, "f4"), "high": np.array(6, "f4")}
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("Clip", ["c", "low", "high"], ["y"])]
    ports = [helper.make_tensor_value_info(name, 1, [2, size, 5, 5]) for name, size in (("x", 4), ("y", 8))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    prefix = folder / "clip"
    lower_model(model, [InputSpec([2, 4, 5, 5], "float32", "x")]).save(prefix)
    program = prefix.with_suffix(".json").read_text()
    assert "relu6" in program
    assert "maximum" not in program
    predictor = inference.create_predictor(inference.Config(f"{prefix}.json", f"{prefix}.pdiparams"))
    x = random.normal(size=(2, 4, 5, 5)).astype("f4")
    predictor.get_input_handle("x").copy_from_cpu(x)
    predictor.run()
    expected = np.clip(np.einsum("oi,nihw->nohw", kernel[..., 0, 0], x) + bias[:, None, None], 0, 6)
    assert 0.1 < (expected == 6).mean() < 0.9
    np.testing.assert_allclose(predictor.get_output_handle("y").copy_to_cpu(), expected, rtol=1e-4, atol=1e-5)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(kind, direction, lengths, layout):
    """A layer of five units over sequences of three numbers, and its inputs."""
    random, directions = np.random.default_rng(0), 2 if direction == "bidirectional" else 1
    rows = GATES[kind] * 5
    sizes = {"w": (directions, rows, 3), "r": (directions, rows, 5), "b": (directions, 2 * rows)}
    weights = [numpy_helper.from_array(random.normal(size=size).astype("f4"), name) for name, size in sizes.items()]
    given = {"x": random.normal(size=(4, 7, 3) if layout else (7, 4, 3)).astype("f4")}
    if lengths:
        given["lengths"] = np.array([7, 3, 1, 5], "i4")
    state = random.normal(size=(4, directions, 5) if layout else (directions, 4, 5)).astype("f4")
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    given |= dict.fromkeys(states, state)
    more = {"layout": layout, "linear_before_reset": 1} if kind == "GRU" else {"layout": layout}
    outputs = ["y", *(f"last_{name}" for name in states)]
    inputs = ["x", "w", "r", "b", "lengths" if lengths else "", *states]
    node = helper.make_node(kind, inputs, outputs, hidden_size=5, direction=direction, **more)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    ports = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in given.items()]
    ends = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
    graph = helper.make_graph([node], "g", ports, ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), given


def own_recurrent_layers(folder):
    plain = lowering.backend
    for number, (kind, direction) in enumerate(itertools.product(GATES, ("forward", "reverse", "bidirectional"))):
        model, given = recurrent(kind, direction, lengths=number % 2, layout=int(number % 4 > 1))
        shapes = {name: list(array.shape) for name, array in given.items()}
        dynamic = {name: [-1 if size in (4, 7) else size for size in shape] for name, shape in shapes.items()}
        found = backend_suite.paddle(model, given, dynamic)
        with mock.patch.object(lowering, "backend", lambda each: replace(plain(each), recurrent=lambda *_: None)):
            stepwise = backend_suite.paddle(model, given, shapes)
        for name, array in stepwise.items():
            assert array.std() > 0.1, f"{kind}, {direction}: {name} says nothing"
            np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=f"{kind}, {direction}: {name}")


programs.run(
    clip_to_0_and_6,
    unknown_input,
    drawn,
    weight_in_a_loop,
    sum_of_nothing,
    outputs_of_one_value,
    own_recurrent_layers,
)
