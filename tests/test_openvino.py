"""Graphs that OpenVINO's converter would get wrong are rewritten for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from polyexport.formats.openvino import convert_onnx, load
from polyexport.spec import ExportSpec, TensorSpec


@pytest.mark.parametrize(("start", "end", "axis"), [(0, 4, -1), (1, 2**62, 2), (-5, -1, 2), (2, 8, 1)])
def test_rows_of_a_slice_are_gathered_by_indices_that_a_model_computes(
    start: int, end: int, axis: int, tmp_path: Path
) -> None:
    """As boxes by the indices of the best scores."""
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 9, 6]),
        helper.make_tensor_value_info("places", TensorProto.INT64, ["batch", 3, 1]),
    ]
    width = len(range(6)[start:end]) if axis != 1 else 6
    weights = {"starts": [start], "ends": [end], "axes": [axis], "sizes": [1, 1, width]}
    nodes = [
        helper.make_node("Slice", ["x", "starts", "ends", "axes"], ["part"]),
        helper.make_node("Expand", ["places", "sizes"], ["wide"]),
        helper.make_node("GatherElements", ["part", "wide"], ["y"], axis=1),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, width])
    constants = [numpy_helper.from_array(np.array(each, np.int64), name) for name, each in weights.items()]
    graph = helper.make_graph(nodes, "g", ports, [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    inputs = (TensorSpec("x", "float32", ("batch", 9, 6)), TensorSpec("places", "int64", ("batch", 3, 1)))
    spec = ExportSpec(inputs, (TensorSpec("y", "float32", ("batch", 3, width)),))
    convert_onnx(tmp_path / "m.onnx", tmp_path / "m.xml", spec)
    random = np.random.default_rng(0)
    x, places = random.random((5, 9, 6), np.float32), random.integers(0, 6, (5, 3, 1))
    found = load(tmp_path / "m.xml", spec, threads=1)({"x": x, "places": places})["y"]
    cut = x[:, start:end] if axis == 1 else x[..., start:end]
    np.testing.assert_array_equal(found, np.take_along_axis(cut, np.broadcast_to(places, (5, 3, width)), 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.onnx", "m.xml"]


@pytest.mark.parametrize("largest", [0, 1])
def test_equal_elements_keep_their_order_in_a_sort(largest: int, tmp_path: Path) -> None:
    values, places = (
        helper.make_tensor_value_info(*each)
        for each in (("values", TensorProto.FLOAT, None), ("places", TensorProto.INT64, None))
    )
    nodes = [helper.make_node("TopK", ["x", "all"], ["values", "places"], axis=1, largest=largest)]
    count = numpy_helper.from_array(np.array([40]), "all")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 40])
    graph = helper.make_graph(nodes, "g", [given], [values, places], [count])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    answers = (TensorSpec("values", "float32", ("batch", 40)), TensorSpec("places", "int64", ("batch", 40)))
    spec = ExportSpec((TensorSpec("x", "float32", ("batch", 40)),), answers)
    convert_onnx(tmp_path / "m.onnx", tmp_path / "m.xml", spec)
    x = np.random.default_rng(0).integers(0, 5, (6, 40)).astype(np.float32)
    found = load(tmp_path / "m.xml", spec, threads=1)({"x": x})
    np.testing.assert_array_equal(found["places"], np.argsort(-x if largest else x, axis=1, kind="stable"))
