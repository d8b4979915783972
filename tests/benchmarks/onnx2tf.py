"""Our SavedModel of ResNet-18 against onnx2tf's: seconds to convert, after the imports, and latency of the artifact.

    python tests/benchmarks/onnx2tf.py [--size 224] [--rounds 5] [--onnx2tf PYTHON]

Both start from the same ONNX file, batch 1, random weights, and keep PyTorch's shapes. onnx2tf runs in an environment
that uv makes for it and that is thrown away; the sample data that it would download is laid beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import polyexport
from polyexport import Toolchain
from polyexport.workers import toolchain

ONNX2TF = Toolchain("onnx2tf", ("onnx2tf==1.29.24", "tensorflow==2.19.0"), python=">=3.11,<3.12")
SAMPLE = "calibration_image_sample_data_20x128x128x3_float32.npy"

OURS = """
import sys, time, types
package = types.ModuleType("polyexport"); package.__path__ = [sys.argv[1]]; sys.modules["polyexport"] = package
from pathlib import Path
from typing import Any
import tensorflow
from polyexport.formats.saved_model import convert
from polyexport.workers.job import read_job
import polyexport.lowering.tensorflow
job = read_job(Path(sys.argv[4]))
start = time.perf_counter()
convert(Path(sys.argv[2]), Path(sys.argv[3]), job.spec)
print(time.perf_counter() - start)
"""

THEIRS = """
import sys, time
import onnx2tf
start = time.perf_counter()
onnx2tf.convert(input_onnx_file_path=sys.argv[1], output_folder_path=sys.argv[2], output_signaturedefs=True,
    keep_shape_absolutely_input_names=[sys.argv[3]], non_verbose=True)
print(time.perf_counter() - start)
"""

LATENCY = """
import json, sys, time
import numpy as np, tensorflow as tf
batch = np.load(sys.argv[1])
runs = [tf.saved_model.load(path) for path in sys.argv[3:]]
signatures = [each.signatures["serving_default"] for each in runs]
names = [list(each.structured_input_signature[1])[0] for each in signatures]
calls = [lambda f=f, n=n: next(iter(f(**{n: tf.constant(batch)}).values())).numpy() for f, n in zip(signatures, names)]
answers = [call() for call in calls for _ in range(5)][4::5]
samples = [[], []]
for _ in range(int(sys.argv[2])):
    for call, times in zip(calls, samples):
        call()
        for _ in range(20):
            start = time.perf_counter(); call(); times.append((time.perf_counter() - start) * 1e3)
print(json.dumps([[float(np.median(times)) for times in samples], float(np.abs(answers[0] - answers[1]).max())]))
"""


def said(python: Path, script: str, *words: object, cwd: Path | None = None) -> str:
    """The last line that a script prints."""
    command = [str(python), "-P", "-c", script, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.strip().splitlines()[-1]


def thrown_away(folder: Path) -> Path:
    """An interpreter that has onnx2tf, in an environment inside `folder`."""
    os.environ["POLYEXPORT_CACHE"] = str(folder)
    try:
        return ONNX2TF.interpreter(print)
    finally:
        del os.environ["POLYEXPORT_CACHE"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onnx2tf", type=Path, help="a Python that has it; by default one is made")
    given = parser.parse_args()

    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes: Any = {
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
        "layer_type": "basic",
        "num_labels": 1000,
    }
    config = ResNetConfig(**sizes)
    image = torch.rand(1, 3, given.size, given.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = {"pixel_values": image}
        report = polyexport.export(ResNetForImageClassification(config), inputs, ["onnx"], folder / "x", bench=False)
        assert report["onnx"].artifact is not None, report["onnx"].reason
        source = report.folder / report["onnx"].artifact.path
        job = next((report.folder / "source" / "jobs").glob("onnx.*.verify.json"))
        np.save(folder / "batch.npy", image.numpy())
        np.save(folder / SAMPLE, np.random.default_rng(0).random((20, 128, 128, 3), dtype=np.float32))
        theirs = given.onnx2tf.absolute() if given.onnx2tf else thrown_away(folder / "environment")
        ours = toolchain.find("tensorflow").interpreter()
        package = Path(polyexport.__file__).parent
        one = float(said(ours, OURS, package, source, folder / "ours", job))
        other = float(said(theirs, THEIRS, source, folder / "theirs", "pixel_values", cwd=folder))
        measured = said(ours, LATENCY, folder / "batch.npy", given.rounds, folder / "ours", folder / "theirs")
    (our_ms, their_ms), difference = json.loads(measured)
    table = Table("", "ours", "onnx2tf", "ratio", title="ResNet-18 to SavedModel")
    table.add_row("convert s", f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}")
    table.add_row("p50 ms", f"{our_ms:.1f}", f"{their_ms:.1f}", f"{our_ms / their_ms:.2f}")
    Console().print(table)
    print(f"greatest difference of their answers: {difference:.1e}", file=sys.stderr)


if __name__ == "__main__":
    main()
