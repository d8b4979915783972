"""Programs in an isolated toolchain, many in one process, since each import of a framework takes seconds."""

import json
import sys
import traceback
from pathlib import Path

import numpy as np


def run(*programs):
    """Call each with a folder of its own, in the one that the command line names.

    Prints a JSON object as its last line: function name -> its answer, or the traceback of what it raised.
    """
    found = {}
    for program in programs:
        folder = Path(sys.argv[1], program.__name__)
        folder.mkdir()
        try:
            found[program.__name__] = {"answer": program(folder)}
        except Exception:
            found[program.__name__] = {"error": traceback.format_exc()}
    print(json.dumps(found))


def refusal(target):
    """How a lowering refuses an input that only the run knows, where the graph cannot be made without it."""
    from onnx import helper

    import backend_suite

    ports = [helper.make_tensor_value_info("x", 1, [1, 3]), helper.make_tensor_value_info("last", 7, [1])]
    node = helper.make_node("Squeeze", ["x", "last"], ["y"])
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    inputs = {"x": np.zeros((1, 3), "f4"), "last": np.array([0])}
    try:
        backend_suite.TARGETS[target](model, inputs, {"x": [1, 3], "last": [1]})
    except Exception as error:
        return str(error)


def drawn(target):
    """Mean and deviation of what each random operator draws, a few thousand numbers."""
    from onnx import helper, numpy_helper

    import backend_suite

    normal, even = {"mean": 2.0, "scale": 3.0}, {"low": -1.0, "high": 3.0}
    nodes = [
        helper.make_node("RandomNormal", [], ["normal"], shape=[100, 100], **normal),
        helper.make_node("RandomNormalLike", ["x"], ["normal_like"], **normal),
        helper.make_node("RandomUniform", [], ["uniform"], shape=[100, 100], **even),
        helper.make_node("RandomUniformLike", ["x"], ["uniform_like"], **even),
        helper.make_node("Bernoulli", ["x"], ["bernoulli"], dtype=6),
        helper.make_node("Multinomial", ["chances"], ["multinomial"], sample_size=10000),
    ]
    chances = numpy_helper.from_array(np.log(np.float32([[0.1, 0.2, 0.7]])), "chances")
    outputs = [helper.make_tensor_value_info(node.output[0], 1, None) for node in nodes]
    given = helper.make_tensor_value_info("x", 1, [100, 100])
    graph = helper.make_graph(nodes, "g", [given], outputs, [chances])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    x = np.full((100, 100), 0.3, "f4")
    found = backend_suite.TARGETS[target](model, {"x": x}, {"x": [None, None]})
    return {name: [float(numbers.mean()), float(numbers.std())] for name, numbers in found.items()}
