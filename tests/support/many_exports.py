"""The jobs of many exports in one process, so that a test pays for one import of a framework.

    python many_exports.py PACKAGE convert|verify FORMAT,... EXPORT...

Each EXPORT has an `onnx` that was verified; its verification job gives signature and batches. The functions are the
worker's own, and a toolchain's Python runs them. Prints a JSON object: export -> format -> "made", the parity with
the shortfall, or the error.
"""

from __future__ import annotations

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

ARTIFACTS = {
    "saved_model": ("lowering", "onnx/model.onnx", "many/saved_model/saved_model"),
    "graphdef": ("freeze", "many/saved_model/saved_model", "many/graphdef/model.pb"),
    "paddle": ("lowering", "onnx/model.onnx", "many/paddle/inference_model"),
    "tfjs": ("tensorflowjs", "many/saved_model/saved_model", "many/tfjs/model.json"),
    "tflite": ("tensorflow", "many/saved_model/saved_model", "many/tflite/model.tflite"),
    "tflite-fp16": ("quantizer", "many/tflite/model.tflite", "many/tflite-fp16/model.tflite"),
    "tflite-w8": ("quantizer", "many/tflite/model.tflite", "many/tflite-w8/model.tflite"),
    "ncnn": ("pnnx", "onnx/model.onnx", "many/ncnn/model.ncnn.param"),
    "ncnn-fp16": ("pnnx", "onnx/model.onnx", "many/ncnn-fp16/model.ncnn.param"),
    "onnx-web": ("onnx", "onnx/model.onnx", "many/onnx-web/model.onnx"),
    "rknn": ("onnx", "onnx/model.onnx", "many/rknn/model.rknn"),
    "rknn-int8": ("onnx", "onnx/model.onnx", "many/rknn-int8/model.rknn"),
    "rknn-int8.hybrid": ("hybrid", "onnx/model.onnx", "many/rknn-int8.hybrid/model.rknn"),
    "tensorrt-rtx": ("onnx", "onnx/model.onnx", "many/tensorrt-rtx/model.engine"),
    "tflite-int8": ("quantizer", "many/tflite/model.tflite", "many/tflite-int8/model.tflite"),
}
"""Route, source and target; behind a point of a name stands another route than its first."""


def one(root: Path, kind: str, name: str) -> object:
    """Convert, or verify on every batch."""
    from polyexport import worker
    from polyexport.serialization import encode
    from polyexport.workers.job import Convert, Verify, read_job

    given = next((root / "source" / "jobs").glob("onnx.*.verify.json"))
    route, source, target = ARTIFACTS[name]
    judge = read_job(given)
    assert isinstance(judge, Verify), given
    ranges = replace(judge.spec, calibration=(Path(judge.batches[0].path),))
    try:
        if kind == "convert":
            worker.convert(
                root, Convert(format=name.partition(".")[0], source=source, spec=ranges, route=route, target=target)
            )
            return "made"
        found = worker.verify(root, replace(judge, format=name.partition(".")[0], source=target))
        return {**encode(found["parity"]), "shortfall": found["shortfall"]}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(package: str, kind: str, formats: str, *roots: str) -> None:
    """Do the jobs; see the module's docstring."""
    module = types.ModuleType("polyexport")
    module.__path__ = [package]
    sys.modules["polyexport"] = module
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # converters print
    found = {root: {name: one(Path(root), kind, name) for name in formats.split(",")} for root in roots}
    answers.write(json.dumps(found))
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
