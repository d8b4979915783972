"""Latency of what came out, on an NVIDIA GPU: python tests/benchmarks/gpu.py

Each call begins and ends with arrays in host memory, so it waits for the GPU. Prints a Markdown table; TF32 is off
everywhere. ONNX Runtime needs `pip install onnxruntime-gpu`; without it its columns are left out.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import polyexport
import zoo
from polyexport.measure.latency import sample_ms, warm_up
from polyexport.spec import Arrays, read_arrays

ROWS = 64


def in_pytorch(module: Any, given: Arrays) -> Callable[[], object]:
    """A call of a module on the GPU."""
    module = module.eval().cuda()

    def call() -> object:
        with torch.inference_mode():
            answer = module(*(torch.from_numpy(array).cuda() for array in given.values()))
            return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, answer)

    return call


def in_package(path: Path, given: Arrays) -> Callable[[], object]:
    """A call of AOTInductor's package."""
    package = torch._inductor.aoti_load_package(str(path))

    def call() -> object:
        with torch.inference_mode():
            return [each.cpu() for each in package(*(torch.from_numpy(array).cuda() for array in given.values()))]

    return call


def in_onnxruntime(path: Path, given: Arrays) -> Callable[[], object]:
    """A call of an ONNX file by CUDA."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=[("CUDAExecutionProvider", {"use_tf32": "0"})])
    feed = {each.name: given[each.name] for each in session.get_inputs()}
    return lambda: session.run(None, feed)


def runs(call: Callable[[], object]) -> bool:
    """Warm it up; a trace that holds tensors of the CPU cannot be moved."""
    try:
        warm_up(call)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False
    return True


def rows(array: np.ndarray) -> np.ndarray:
    """As many rows as are measured."""
    return np.ascontiguousarray(np.resize(array, (ROWS, *array.shape[1:])))


def main() -> None:
    """Export, time each artifact in turn, print."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    import onnxruntime

    by_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    names = ["eager PyTorch", "torchscript", "aoti-cuda", *(["onnx", "onnx-fp16"] if by_cuda else [])]
    print(f"{torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}, batch {ROWS}, p50 ms\n")
    print("| model |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for model in ("resnet", "vit", "bert", "lstm"):
        module, inputs = zoo.build(model)
        with tempfile.TemporaryDirectory() as folder:
            report = polyexport.export(module, inputs, names[1:], Path(folder, "out"), bench=False)
            assert report.model is not None
            batch = read_arrays(report.folder / "validation_batch.npz", [each.name for each in report.model.inputs])
            given = {name: rows(array) for name, array in batch.items()}
            traced = torch.jit.load(str(report.folder / "torchscript" / "model.torchscript"), map_location="cuda")
            calls = [in_pytorch(module, given), in_pytorch(traced, given)]
            calls += [in_package(report.folder / "aoti-cuda" / "model.pt2", given)]
            calls += [in_onnxruntime(report.folder / name / "model.onnx", given) for name in names[3:]]
            samples: list[list[float]] = [[] for _ in calls]
            running = [index for index, call in enumerate(calls) if runs(call)]
            for _ in range(3):  # in turn, so that what disturbs one disturbs all
                for index in running:
                    samples[index] += sample_ms(calls[index], seconds=0.5)
        cells = (f"{statistics.median(found):.2f}" if found else "does not run" for found in samples)
        print(f"| {model} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
