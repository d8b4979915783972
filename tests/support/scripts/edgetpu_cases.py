"""In the toolchain of LiteRT: what becomes of files that must not pass, as JSON.

python edgetpu_cases.py EXPORT FOLDER
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from ai_edge_litert.schema_py_generated import TensorType
from ai_edge_quantizer.utils import qsv_utils, tfl_flatbuffer_utils as flatbuffers

import bare  # noqa: F401  # before our package
from polyexport import worker
from polyexport.formats import edgetpu, tflite, tflite_quantized
from polyexport.measure.drafts import distance
from polyexport.serialization import decode, encode, read_json
from polyexport.spec import ExportSpec, calibration
from polyexport.workers.job import read_job

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what runtimes print is no answer
root, elsewhere = map(Path, sys.argv[1:])


def job(name):
    return read_job(next((root / "source" / "jobs").glob(f"{name}.*.verify.json")))


jobs = {name: job(name) for name in ("tflite", "tflite-int8", "edgetpu", "ethosu")}


def verify(name, source):
    job = jobs.get(name) or replace(jobs["tflite"], format=name)
    try:
        return encode(worker.verify(root, replace(job, source=str(source))))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def with_two_channels_swapped(source):
    """A copy in which the first and the last output channel of each quantized layer have each other's weights."""
    model = flatbuffers.read_model(str(source))
    (graph,) = model.subgraphs
    for tensor in graph.tensors:
        weights = model.buffers[tensor.buffer].data
        is_in_few_bits = tensor.type in (TensorType.INT8, TensorType.INT4)
        if is_in_few_bits and weights is not None and len(tensor.shape) > 1:
            rows = np.array(weights).reshape(tensor.shape[0], -1)
            model.buffers[tensor.buffer].data = rows[[-1, *range(1, len(rows) - 1), 0]].reshape(-1)
    flatbuffers.write_model(model, str(elsewhere / "swapped.tflite"))
    return elsewhere / "swapped.tflite"


def shifted_by_a_quarter(known, new):
    """Ranges whose scales are right and whose zero points are not: LiteRT refuses a file in which one is changed."""
    least, most = np.minimum(known["min"], new["min"]), np.maximum(known["max"], new["max"])
    return {"min": least + (most - least) / 4, "max": most + (most - least) / 4}


def with_tiny_weights(source):
    """A copy whose weights of two axes are so small that half precision has no scale for them."""
    model = flatbuffers.read_model(str(source))
    for tensor in model.subgraphs[0].tensors:
        weights = model.buffers[tensor.buffer].data
        if tensor.type == TensorType.FLOAT32 and len(tensor.shape) == 2 and weights is not None:
            tiny = np.frombuffer(bytes(weights), np.float32) * np.float32(1e-6)
            model.buffers[tensor.buffer].data = np.frombuffer(tiny.tobytes(), np.uint8)
    flatbuffers.write_model(model, str(elsewhere / "tiny.tflite"))
    return elsewhere / "tiny.tflite"


def errors(source, spec):
    """The error of the outputs of what is kept in int8, and with each way to take ranges."""
    batches = list(calibration(spec))
    expected, target = tflite_quantized._answers(source, batches), elsewhere / "ranges.tflite"

    def error():
        return distance(expected, tflite_quantized._answers(target, batches))

    tflite_quantized.quantize(source, target, spec)
    found = [error()]
    for update in (qsv_utils.min_max_update, qsv_utils.moving_average_update):
        tflite_quantized._quantize(source, target, batches, update)
        found.append(error())
    return found


found = {}

for name, convert in (
    ("tflite-w8", tflite_quantized.quantize_weights),
    ("tflite-w4", tflite_quantized.quantize_weights_to_four_bits),
):
    small, spec = elsewhere / f"{name}.tflite", jobs["tflite"].spec
    convert(root / "tflite" / "model.tflite", small, spec)
    found[name] = verify(name, small)
    found[f"swapped {name}"] = verify(name, with_two_channels_swapped(small))
    found[f"not {name}"] = verify(name, root / "tflite" / "model.tflite")

tflite_quantized.quantize_weights_to_four_bits(
    with_tiny_weights(root / "tflite" / "model.tflite"),
    elsewhere / "tiny-w4.tflite",
    spec,
    rows=True,
    convolutions=True,
)
found["tiny weights in four bits"] = tflite_quantized.load_w4(elsewhere / "tiny-w4.tflite", spec, threads=1).remark

file = elsewhere / "some.tflite"
tflite_quantized.quantize_some_weights_to_four_bits(
    root / "tflite" / "model.tflite", file, replace(spec, calibration=(root / "validation_batch.npz",))
)
found["some weights in four bits"] = (
    tflite_quantized.load_w4(file, spec, threads=1).shortfall,
    verify("tflite-w4", file),
)

run, opened, artifact = tflite._run_compiled, tflite._compiled, root / "tflite" / "model.tflite"
tflite._run_compiled = lambda *words, **given: {"output_0": -run(*words, **given)["output_0"]}
found["another answer"] = verify("tflite", artifact)
tflite._compiled = lambda path, *, threads: opened(path.with_name("not there"), threads=threads)
found["refuses"] = verify("tflite", artifact)
tflite._run_compiled, tflite._compiled = run, opened

about = read_json(root / "manifest.json")["artifacts"]["edgetpu"]
run = edgetpu.load(root / about["path"], decode(ExportSpec, about), threads=1)
answer = run({"image": np.zeros((3, 3, 16, 16), np.float32)})
found["loaded"] = {name: [str(array.dtype), array.shape] for name, array in answer.items()}

batches = (root / "validation_batch.npz", root / "source" / "call_001.npz")
found["ranges"] = errors(artifact, replace(jobs["tflite-int8"].spec, calibration=batches))
spec = replace(jobs["tflite-int8"].spec, calibration=(elsewhere / "tiny.npz",))
tflite_quantized.quantize(root / "tflite" / "model.tflite", elsewhere / "tiny.tflite", spec)
(batch, *_) = calibration(replace(jobs["tflite-int8"].spec, calibration=batches))
shifted = elsewhere / "shifted.tflite"
tflite_quantized._quantize(root / "tflite" / "model.tflite", shifted, [batch, batch], shifted_by_a_quarter)
found["wrong zero points"] = verify("tflite-int8", shifted)
found["wrong ranges"] = verify("tflite-int8", elsewhere / "tiny.tflite")
found["swapped channels"] = verify("tflite-int8", with_two_channels_swapped(root / "tflite-int8" / "model.tflite"))
found["not in int8"] = verify("tflite-int8", root / "tflite" / "model.tflite")
found["unlike"] = verify("tflite", root / "edgetpu" / "model.tflite")
found["refused"] = verify("edgetpu", elsewhere / "refused" / "model_edgetpu.tflite")

shutil.copytree(root / "ethosu", elsewhere / "sine")
summary = read_json(root / "ethosu" / "vela.json") | {"operations": 4, "on_cpu": {"SIN": 3}}
(elsewhere / "sine" / "vela.json").write_text(json.dumps(summary))
found["sine"] = verify("ethosu", elsewhere / "sine" / "model_vela.tflite")

os.environ["PATH"] = ""
try:
    edgetpu.compile_int8(root / "edgetpu" / "model.tflite", elsewhere / "x.tflite", spec)
except Exception as error:
    found["no compiler"] = f"{type(error).__name__}: {error}"
files = [root / name / "model.tflite" for name in ("edgetpu", "tflite-int8", "tflite")]
found["predicted"] = [str(edgetpu.predict(file)) for file in files]
json.dump(found, answers)
answers.close()
os._exit(0)
