"""In the toolchain of ncnn: graphs against ONNX Runtime, row by row. `python ncnn_graphs.py FOLDER`.

Prints a JSON object: graph -> "agrees", or what does not.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import bare  # noqa: F401  # before our package
from polyexport.formats import ncnn
from polyexport.spec import ExportSpec, TensorSpec

ROWS = 4

RANDOM = np.random.default_rng(0)

GRAPHS = {
    # the ids are numbers too, so that they are no integers in ncnn, and places are computed
    "positions": """(int64[n, 6] ids, bool[n, 6] mask) => (float[n, 6, 4] y, int64[n, 6] kept)
{
    padded = Equal(ids, three)
    real = Not(padded)
    seen = And(real, mask)
    kept = Cast<to = 7>(seen)
    place = Mul(kept, ids)
    few = Min(place, three)
    word = Gather(table, ids)
    where = Gather(table, few)
    y = Add(word, where)
}""",
    "ids": """(int64[n, 6] ids) => (float[n, 6, 4] y)
{
    y = Gather<axis = 0>(table, ids)
}""",
    "extremes": """(float[n, 3, 5] x) => (float[n, 3] most, float[n, 1, 5] least, float[n] all, int64[n, 5] first,
                                          int64[n, 3, 1] last)
{
    most = ReduceMax<keepdims = 0>(x, axis_2)
    least = ReduceMin(x, axis_1)
    all = ReduceMax<keepdims = 0>(x, axes)
    rough = Round(x)
    first = ArgMax<axis = 1, keepdims = 0>(rough)
    last = ArgMin<axis = 2, select_last_index = 1>(rough)
}""",
    "reductions": """(float[n, 3, 5] x) => (float[n, 3] sum, float[n, 1, 5] mean, float[n, 5] l1, float[n, 3] l2,
                                            float[n, 3, 1] squares, float[n] log)
{
    sum = ReduceSum<keepdims = 0>(x, axis_2)
    mean = ReduceMean(x, axis_1)
    l1 = ReduceL1<keepdims = 0>(x, axis_1)
    l2 = ReduceL2<keepdims = 0>(x, axis_2)
    squares = ReduceSumSquare(x, axis_2)
    log = ReduceLogSumExp<keepdims = 0>(x, axes)
}""",
    "picks": """(float[n, 6, 2] x) => (float[n, 4, 2] some, float[n, 2] one, float[n, 6, 3] elements)
{
    some = Gather<axis = 1>(x, indices)
    one = Gather<axis = 1>(x, minus_one)
    elements = Gather<axis = 2>(x, axes_back)
}""",
    "chosen": """(float[n, 4] x, bool[n, 4] mask) => (float[n, 4] y, float[n, 4] soft)
{
    hidden = Where(mask, x, minus_infinity)
    y = Softmax(hidden)
    far = Mul(x, hundred)
    soft = Softplus(far)
}""",
    "unread": """(float[n, 3] x, float[n, 2] unread) => (float[n, 3] y)
{
    y = Relu(x)
}""",
    "lacking": """(float[n, 4] x) => (float[n, 4] y)
{
    y = Hardmax(x)
}""",
}

WEIGHTS = {
    "table": RANDOM.normal(size=(9, 4)).astype(np.float32),
    "three": np.array(3),
    "axis_1": np.array([1]),
    "axis_2": np.array([2]),
    "axes": np.array([1, 2]),
    "indices": np.array([5, 0, 1, -2]),
    "minus_one": np.array(-1),
    "axes_back": np.array([1, 1, 0]),
    "minus_infinity": np.array(-np.inf, np.float32),
    "hundred": np.array(100, np.float32),
}


def tensors(values: object) -> tuple[TensorSpec, ...]:
    found = []
    for value in values:
        info = value.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.elem_type)).name
        found.append(TensorSpec(value.name, dtype, ("n", *(dim.dim_value for dim in info.shape.dim[1:]))))
    return tuple(found)


def drawn(tensor: TensorSpec) -> np.ndarray:
    shape = (ROWS, *tensor.shape[1:])
    if tensor.dtype == "bool":
        return RANDOM.random(shape) < 0.7
    return RANDOM.integers(0, 9, shape) if tensor.dtype == "int64" else RANDOM.normal(size=shape).astype(np.float32)


def tried(name: str, folder: Path) -> str:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {name} {GRAPHS[name]}')
    used = {each for node in model.graph.node for each in node.input}
    weights = (onnx.numpy_helper.from_array(array, each) for each, array in WEIGHTS.items() if each in used)
    model.graph.initializer.extend(weights)
    source, target = folder / f"{name}.onnx", folder / name / "model.ncnn.param"
    onnx.save(model, source)
    target.parent.mkdir()
    spec = ExportSpec(tensors(model.graph.input), tensors(model.graph.output), {"n": ROWS})
    feed = {tensor.name: drawn(tensor) for tensor in spec.inputs}
    expected = onnxruntime.InferenceSession(str(source)).run(None, feed)
    ncnn._converter(half=False)(source, target, spec)
    loaded = ncnn.load(target, spec, threads=1)
    for (output, answer), right in zip(loaded(feed).items(), expected, strict=True):
        assert answer.dtype == right.dtype, output
        np.testing.assert_allclose(answer, right, rtol=1e-5, atol=1e-5, err_msg=output)
    return f"agrees, reads {', '.join(f'{each.name}: {each.dtype}' for each in loaded.signature.inputs)}"


def main(folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # pnnx prints
    found = {}
    for name in GRAPHS:
        try:
            found[name] = tried(name, folder)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    answers.write(json.dumps(found))


main(Path(sys.argv[1]))
