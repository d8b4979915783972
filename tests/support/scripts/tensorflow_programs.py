"""In the toolchain of TensorFlow: programs about the lowering, whose answers the tests look at.

python scripts/tensorflow_programs.py FOLDER
"""

import math

import numpy as np
import onnx
import tensorflow as tf
from onnx import helper, numpy_helper

import bare  # noqa: F401  # before our package
import programs
from polyexport.formats import saved_model, tflite
from polyexport.lowering.tensorflow import lower_model
from polyexport.spec import ExportSpec, TensorSpec


def unknown_input(folder):
    return programs.refusal("tensorflow")


def drawn(folder):
    return programs.drawn("tensorflow")


def names(folder):
    inputs = ("ä", "日本", "x", "X", "_0", "serving_default_x", "StatefulPartitionedCall")
    outputs = ("ö", "Y", "y", "_1", "Identity", "Identity_1", "PartitionedCall")
    nodes = [helper.make_node("Neg", [one], [other]) for one, other in zip(inputs, outputs, strict=True)]
    ports = [[helper.make_tensor_value_info(name, 1, ["n", 2]) for name in names] for names in (inputs, outputs)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ports), opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "m.onnx")
    tensors = [tuple(TensorSpec(name, "float32", ("n", 2)) for name in names) for names in (inputs, outputs)]
    spec = ExportSpec(*tensors, {"n": 3})
    saved_model.convert(folder / "m.onnx", folder / "saved", spec)
    tflite.convert_saved_model(folder / "saved", folder / "m.tflite", spec)
    given = {name: np.full((3, 2), index, np.float32) for index, name in enumerate(inputs)}
    found = [saved_model.load(folder / "saved", spec, threads=1)(given)]
    found.append(tf.lite.Interpreter(str(folder / "m.tflite")).get_signature_runner()(**given))
    for answer in found:
        for index, name in enumerate(outputs):
            np.testing.assert_array_equal(answer[name], np.full((3, 2), -index, np.float32), name)
    signature = tf.saved_model.load(str(folder / "saved")).signatures["serving_default"]
    assert set(signature.structured_input_signature[1]) == set(inputs)


def transposes(folder):
    weight = numpy_helper.from_array(np.random.rand(4, 4, 3, 3).astype(np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["e", "e"], ["y"], axis=1),
    ]

    def port(name):
        return helper.make_tensor_value_info(name, 1, [None] * 4)

    model = helper.make_model(helper.make_graph(nodes, "g", [port("x")], [port("y")], [weight]))
    lowered = lower_model(model, [tf.TensorSpec([None, 4, 8, 8], tf.float32, "x")])
    return [node.op for node in lowered.forward.graph.as_graph_def().node].count("Transpose")


def plain(folder):
    constants = {"step": 4, "window": np.hanning(16).astype("f4"), "last": -1}
    constants |= {"places": [[0], [0]], "rows": np.ones((2, 64), "f4")}
    weights = [numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()]
    nodes = [
        helper.make_node("STFT", ["x", "step", "window"], ["spectrum"]),
        helper.make_node("CumSum", ["x", "last"], ["sums"]),
        helper.make_node("ScatterND", ["x", "places", "rows"], ["added"], reduction="add"),
    ]

    def port(name, *sizes):
        return helper.make_tensor_value_info(name, 1, sizes or None)

    outputs = [port(name) for name in ("spectrum", "sums", "added")]
    graph = helper.make_graph(nodes, "g", [port("x", None, 64)], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    lowered = lower_model(model, [tf.TensorSpec([None, 64], tf.float32, "x")])
    nodes = lowered.forward.graph.as_graph_def().node
    lacking = sorted({node.op for node in nodes} & {"Complex", "FFT", "TensorScatterAdd"})
    axis = next(node for node in nodes if node.op == "Cumsum").input[1]
    axes = [tf.make_ndarray(node.attr["value"].tensor).item() for node in nodes if node.name == axis]
    return [lacking, axes]


FUNCTIONS = {
    "Acos": np.arccos,
    "Asin": np.arcsin,
    "Atan": np.arctan,
    "Atanh": np.arctanh,
    "Asinh": np.arcsinh,
    "Cosh": np.cosh,
    "Sinh": np.sinh,
    "Tan": np.tan,
    "Cos": np.cos,
    "Sin": np.sin,
    "Tanh": np.tanh,
    "Erf": np.vectorize(math.erf),
    "Exp": np.exp,
    "Abs": np.abs,
    "Sign": np.sign,
    "Ceil": np.ceil,
    "Floor": np.floor,
    "Round": np.round,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Softplus": lambda x: np.log1p(np.exp(x)),
    "Acosh": lambda x: np.full_like(x, np.nan),
    "Sqrt": np.sqrt,
    "Log": np.log,
    "IsNaN": np.isnan,
    "IsInf": np.isinf,
}
"""Elementary operators, and how numpy computes them."""

WEIGHTS = {
    "regions": np.float32([[0, 0, 5, 4], [1, 1, 8, 5], [0, 2, 3, 5]]),
    "owner": np.array([0, 1, 2]),
    "kernel": np.random.default_rng(1).random((18, 2, 3, 3), np.float32) / 9,
    "lengths": np.array([3, 1]),
    "parts": np.array([2, 3]),
    "fourth": np.array([4]),
    "fifth": np.array([5]),
    "new": np.array([2, 3]),
    "seventh": np.array([7]),
    "divisor": np.float32(-0.3),
    "size": np.array([2, 3]),
}
"""Constants of the operators that TFLite lacks, or runs with few axes."""

SIZES = {"x": (None, 5), "rows": (4, 2, None), "image": (None, 2, 6, 9)}


def elementary(folder):
    random = np.random.default_rng(0)
    x = np.float32([[-0.9, -0.4, 0.0, 0.3, 0.99], [0.5, -0.5, 0.7, 0.1, -0.1]])
    rows, image = (random.random(shape, np.float32) for shape in ((4, 2, 3), (3, 2, 6, 9)))
    model = elementary_model()
    lowered = lower_model(model, [tf.TensorSpec(shape, tf.float32, name) for name, shape in SIZES.items()])
    found = by_tflite(lowered, folder / "made", x=x, rows=rows, image=image)
    for name, expected in right(x, rows, image).items():
        np.testing.assert_allclose(found[name], expected, atol=2e-6, rtol=2e-6, err_msg=name)
    answer = lowered.forward(*map(tf.constant, (x, rows, image)))
    for name in ("RoiAlign", "DeformConv"):
        np.testing.assert_allclose(found[name], answer[name], atol=1e-5, err_msg=name)
    arrays = dict(zip(SIZES, (x, rows, image), strict=True))
    whole = lower_model(model, [tf.TensorSpec(array.shape, tf.float32, name) for name, array in arrays.items()])
    static = whole.forward(*map(tf.constant, (x, rows, image)))["Resize"]
    np.testing.assert_allclose(found["Resize"], static, atol=1e-5)
    assert found["Resize"].shape == (3, 2, 2, 3)


def elementary_model():
    nodes = [helper.make_node(op, ["x"], [op]) for op in FUNCTIONS] + [
        helper.make_node("Mod", ["x", "divisor"], ["Mod"], fmod=1),
        helper.make_node("ReverseSequence", ["rows", "lengths"], ["ReverseSequence"], batch_axis=1, time_axis=0),
        helper.make_node("Cast", ["Ceil"], ["integers"], to=7),
        helper.make_node("Split", ["integers", "parts"], ["rest", "Split"], axis=1),
        helper.make_node("Unsqueeze", ["image", "new"], ["six axes"]),
        helper.make_node("Slice", ["six axes", "fourth", "seventh", "fifth"], ["Slice"]),
        helper.make_node("Shape", ["image"], ["kept"], end=2),
        helper.make_node("Concat", ["kept", "size"], ["sizes"], axis=0),
        helper.make_node("Resize", ["image", "", "", "sizes"], ["Resize"], mode="cubic", antialias=1),
        helper.make_node(
            "RoiAlign", ["image", "regions", "owner"], ["RoiAlign"], output_height=2, output_width=3, sampling_ratio=2
        ),
        helper.make_node("Conv", ["image", "kernel"], ["moves"]),
        helper.make_node("DeformConv", ["image", "kernel", "moves"], ["DeformConv"]),
    ]
    dtypes = {"IsNaN": 9, "IsInf": 9, "Split": 7}
    names = [*FUNCTIONS, "Mod", "Split", "Slice", "ReverseSequence", "Resize", "RoiAlign", "DeformConv"]

    def value(name):
        return helper.make_tensor_value_info(name, dtypes.get(name, 1), None)

    constants = [numpy_helper.from_array(np.asarray(each), name) for name, each in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "g", [value(name) for name in SIZES], [value(name) for name in names], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def by_tflite(lowered, folder, **inputs):
    """Convert a lowered model to TFLite without TensorFlow's operators, and run it."""
    tf.saved_model.save(lowered, str(folder), signatures={"serving_default": lowered.forward})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner()(**inputs)


def right(x, rows, image):
    """What numpy computes for the operators that it has."""
    turned = rows.copy()
    turned[:3, 0] = rows[2::-1, 0]
    with np.errstate(all="ignore"):
        found = {name: function(x) for name, function in FUNCTIONS.items()}
    found |= {"Mod": np.fmod(x, np.float32(-0.3)), "ReverseSequence": turned}
    return found | {"Split": np.ceil(x).astype("i8")[:, 2:], "Slice": image[:, :, None, None, :, 4:7]}


def infinities(folder):
    """Looked for by their operator, and by a comparison with constants of which TFLite makes the greatest float."""
    x = np.float32([[np.inf, -np.inf, np.nan, 0, 3.4028235e38], [1, np.inf, -np.inf, -1, np.nan]])
    borders = {"border": np.float32(-np.inf), "row": np.float32([np.inf, -np.inf, 0, 0, np.inf])}
    nodes = [
        helper.make_node("IsInf", ["x"], ["any"]),
        helper.make_node("IsInf", ["x"], ["above"], detect_negative=0),
        helper.make_node("Equal", ["x", "border"], ["same"]),
        helper.make_node("Equal", ["row", "x"], ["same in a row"]),
    ]
    values = [helper.make_tensor_value_info(node.output[0], 9, None) for node in nodes]
    given = [helper.make_tensor_value_info("x", 1, ["n", 5])]
    constants = [numpy_helper.from_array(array, name) for name, array in borders.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", given, values, constants))
    found = by_tflite(lower_model(model, [tf.TensorSpec([None, 5], tf.float32, "x")]), folder / "made", x=x)
    expected = (np.isinf(x), x == np.inf, x == borders["border"], x == borders["row"])
    for node, right_answer in zip(nodes, expected, strict=True):
        np.testing.assert_array_equal(found[node.output[0]], right_answer, node.output[0])


def integers(folder):
    """Of int64, which few of TFLite's operators take; quotients at both ends of it too."""
    a = np.array([[7, -7, 6, 0, 2**62 + 3], [-(2**53) - 1, 2**40, 2**63 - 1, -(2**62), 5]])
    b = np.array([[2, 2, -3, 4, 3], [3, -7, 1, 2**31 + 1, -5]])
    nodes = [
        *(helper.make_node(op, ["a"], [op]) for op in ("Abs", "Sign")),
        *(helper.make_node(op, ["a"], [op], axis=1, keepdims=0) for op in ("ArgMax", "ArgMin")),
        helper.make_node("Div", ["a", "b"], ["Div"]),
    ]
    values = {name: helper.make_tensor_value_info(name, 7, None) for name in ("a", "b", *(n.op_type for n in nodes))}
    graph = helper.make_graph(nodes, "g", [values.pop("a"), values.pop("b")], list(values.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    lowered = lower_model(model, [tf.TensorSpec([None, 5], tf.int64, name) for name in "ab"])
    found = by_tflite(lowered, folder / "made", a=a, b=b)
    pairs = [(int(x), int(y)) for x, y in zip(a.flat, b.flat, strict=True)]
    quotients = [x // y if (x < 0) == (y < 0) else -(-x // y) for x, y in pairs]
    expected = {"Abs": abs(a), "Sign": np.sign(a), "ArgMax": a.argmax(1), "ArgMin": a.argmin(1)}
    for name, right in (expected | {"Div": np.reshape(quotients, a.shape)}).items():
        np.testing.assert_array_equal(found[name], right, err_msg=name)


def distinct(folder):
    """Distinct rows, and updates of one place that are reduced, which TFLite has no single operator for."""
    nodes = [
        helper.make_node("Unique", ["x"], ["rows", "first", "inverse", "counts"], axis=0),
        helper.make_node("Unique", ["x"], ["numbers", "", "", "times"], sorted=0),
        *(
            helper.make_node("ScatterElements", ["y", "at", "x"], [how], axis=1, reduction=how)
            for how in ("max", "min", "mul")
        ),
    ]
    ports = {name: (1, ["n", 3]) for name in ("x", "y")} | {"at": (7, ["n", 3])}
    made = {
        name: (7 if name in ("first", "inverse", "counts", "times") else 1, None) for n in nodes for name in n.output
    }
    inputs, outputs = (
        [helper.make_tensor_value_info(name, *told) for name, told in each.items() if name] for each in (ports, made)
    )
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)]
    )
    given = [tf.TensorSpec([None, 3], tf.int64 if name == "at" else tf.float32, name) for name in ports]
    x = np.random.default_rng(0).integers(-1, 2, (9, 3)).astype(np.float32)
    y, at = np.float32([[5, -np.inf, np.inf]] * 9), np.array([[0, 0, 2]] * 9)
    found = by_tflite(lower_model(model, given), folder / "made", x=x, y=y, at=at)
    rows = np.unique(x, axis=0, return_index=True, return_inverse=True, return_counts=True)
    expected = dict(zip(("rows", "first", "inverse", "counts"), rows, strict=True))
    numbers, first, times = np.unique(x, return_index=True, return_counts=True)
    came = np.argsort(first)
    expected |= {"numbers": numbers[came], "times": times[came]}
    for how, reduce in (("max", np.maximum), ("min", np.minimum), ("mul", np.multiply)):
        right = y.copy()
        for column, place in enumerate(at[0]):
            right[:, place] = reduce(right[:, place], x[:, column])
        expected[how] = right
    for name, right in expected.items():
        np.testing.assert_array_equal(found[name], right.reshape(found[name].shape), err_msg=name)


programs.run(unknown_input, drawn, names, transposes, plain, elementary, infinities, integers, distinct)
