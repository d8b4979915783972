"""In the toolchain of MNN: convolutions over one axis, threads, loops, int8 at every size, a share in float.

python mnn_axes.py FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

import bare  # noqa: F401  # before our package
from polyexport.formats import known
from polyexport.formats.mnn import convert, has_loops, load, load_int8, load_w4, quantize_unrolled
from polyexport.measure.drafts import distance
from polyexport.spec import ExportSpec, TensorSpec, write_arrays

MODEL = """
<ir_version: 10, opset_import: ["": 20]>
graph (float[n, 3, 10] x) => (float[n, 5, 8] last, float[n, 5, 8] lifted, float[n, 8, 5] turned, float[n, 3, 12] up)
{
    last = Conv(x, w)
    lifted = Relu(last)
    turned = Transpose<perm = [0, 2, 1]>(lifted)
    up = ConvTranspose(x, v)
}
"""

folder = Path(sys.argv[1])
model = onnx.parser.parse_model(MODEL)
random = np.random.default_rng(0)
weights = {"w": random.random((5, 3, 3), np.float32), "v": random.random((3, 3, 3), np.float32)}
model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
onnx.save(model, folder / "m.onnx")
shapes = {"last": (4, 5, 8), "lifted": (4, 5, 8), "turned": (4, 8, 5), "up": (4, 3, 12)}
outputs = tuple(TensorSpec(name, "float32", ("n", *shape[1:])) for name, shape in shapes.items())
spec = ExportSpec((TensorSpec("x", "float32", ("n", 3, 10)),), outputs, {"n": 4})
convert(folder / "m.onnx", folder / "m.mnn", spec)
x = random.random((4, 3, 10), np.float32)
threads = len(list(Path("/proc/self/task").iterdir()))
found = load(folder / "m.mnn", spec, threads=1)({"x": x})
assert len(list(Path("/proc/self/task").iterdir())) == threads
windows = np.lib.stride_tricks.sliding_window_view(x, 3, axis=2)
expected = np.einsum("ncdk,ock->nod", windows, weights["w"])
assert {name: array.shape for name, array in found.items()} == shapes
np.testing.assert_allclose(found["last"], expected, rtol=1e-4)
np.testing.assert_allclose(found["turned"], expected.transpose(0, 2, 1), rtol=1e-4)
assert not has_loops((folder / "m.mnn").read_bytes())

RECURRENT = """
<ir_version: 10, opset_import: ["": 20]>
graph (float[5, n, 3] x) => (float[5, 1, n, 4] y) { y = GRU<hidden_size = 4, linear_before_reset = 1>(x, w, r, b) }
"""
model = onnx.parser.parse_model(RECURRENT)
weights = {
    name: random.random(shape, np.float32) for name, shape in (("w", (1, 12, 3)), ("r", (1, 12, 4)), ("b", (1, 24)))
}
model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
onnx.save(model, folder / "r.onnx")
convert(folder / "r.onnx", folder / "r.mnn", spec)
assert has_loops((folder / "r.mnn").read_bytes())

RECURRENT = """
<ir_version: 10, opset_import: ["": 20]>
graph (float[5, n, 3] x, float[1, n, 4] first) => (float[5, 1, n, 4] y)
{ y = GRU<hidden_size = 4, linear_before_reset = 1>(x, w, r, b, , first) }
"""
given = (TensorSpec("x", "float32", (5, "n", 3)), TensorSpec("first", "float32", (1, "n", 4)))
spec = ExportSpec(given, (TensorSpec("y", "float32", (5, 1, "n", 4)),), {"n": 8}, calibration=(folder / "x.npz",))
batch = {"x": random.normal(size=(5, 8, 3)), "first": random.normal(size=(1, 8, 4))}
batch = {name: array.astype(np.float32) for name, array in batch.items()}
write_arrays(folder / "x.npz", batch)
model = onnx.parser.parse_model(RECURRENT)
model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
onnx.save(model, folder / "g.onnx")
convert(folder / "g.onnx", folder / "g.mnn", spec)
quantize_unrolled(folder / "g.onnx", folder / "q.mnn", spec)  # which the quantizer crashes on in a loop
assert not has_loops((folder / "q.mnn").read_bytes())
exact = load(folder / "g.mnn", spec, threads=1)(batch)["y"]
assert np.abs(load_int8(folder / "q.mnn", spec, threads=1)(batch)["y"] - exact).max() < 0.05 * np.abs(exact).max()

LAYERS = """
<ir_version: 10, opset_import: ["": 20]>
graph (float[n, 10] x) => (float[n, 12] hidden, float[n, 3] y)
{
    sums = Gemm<transB = 1>(x, w, b)
    hidden = Gelu(sums)
    last = Gemm<transB = 1>(hidden, v, c)
    y = Softplus(last)
}
"""
model = onnx.parser.parse_model(LAYERS)
shapes = {"w": (12, 10), "b": (12,), "v": (3, 12), "c": (3,)}
weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
onnx.save(model, folder / "l.onnx")
batch = random.normal(size=(4, 10)).astype(np.float32)
write_arrays(folder / "x.npz", {"x": batch})
outputs = tuple(TensorSpec(name, "float32", ("n", size)) for name, size in (("hidden", 12), ("y", 3)))
spec = ExportSpec((TensorSpec("x", "float32", ("n", 10)),), outputs, {"n": 4}, calibration=(folder / "x.npz",))
convert(folder / "l.onnx", folder / "l.mnn", spec)
unrolled, from_mnn, *_ = known()["mnn-int8"].routes
from_mnn.convert(folder / "l.mnn", folder / "i.mnn", spec)
run = load_int8(folder / "i.mnn", spec, threads=1)
for rows in (4, 1, 7, 1):  # one module that is resized so crashes
    x = {"x": np.concatenate([batch, batch])[:rows]}
    exact = load(folder / "l.mnn", spec, threads=1)(x)
    assert max(np.abs(run(x)[name] - array).max() / np.abs(array).max() for name, array in exact.items()) < 0.1

x = {"x": batch}
exact, errors = [load(folder / "l.mnn", spec, threads=1)(x)], []
for share in (0.0, 0.5):  # half of the layers go back to float
    (folder / "4.mnn").unlink(missing_ok=True)
    known()["mnn-w4"].routes[0].convert(folder / "l.mnn", folder / "4.mnn", replace(spec, in_float=share))
    loaded = load_w4(folder / "4.mnn", spec, threads=1)
    errors.append(distance(exact, [loaded(x)]))
assert errors[1] < errors[0]
assert "kept in float, each with the error that it alone causes: " in loaded.remark + loaded.shortfall
assert "% of its weights in 4 bits" in loaded.remark + loaded.shortfall
