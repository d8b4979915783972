"""A model repository as NVIDIA's Triton Inference Server itself loads and serves it, by KServe's protocol.

The server is the one in `nvidia-pytriton`, which has the backend for Python alone: ONNX Runtime is a backend of a few
lines here, and what Triton reads is the repository as it was written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyexport import Report
from polyexport.errors import ToolMissing
from polyexport.publish.triton import TritonRepository
from polyexport.workers.toolchain import Toolchain

BACKEND = """
import json, os, sys
sys.path.insert(0, SITE)
import onnxruntime
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, given):
        self.outputs = [each["name"] for each in json.loads(given["model_config"])["output"]]
        path = os.path.join(given["model_repository"], given["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path)

    def execute(self, requests):
        return [triton.InferenceResponse(self.answered(request)) for request in requests]

    def answered(self, request):
        names = [each.name for each in self.session.get_inputs()]
        feed = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        return list(map(triton.Tensor, self.outputs, self.session.run(self.outputs, feed)))
"""


@pytest.fixture(scope="module")
def site() -> Path:
    """The packages of an environment with the server; its stub for Python was built for NumPy 1."""
    chain = Toolchain("triton-server", ("nvidia-pytriton==0.7.0", "onnxruntime", "numpy<2"))
    try:
        python = chain.interpreter(print)
    except ToolMissing as error:
        pytest.skip(f"the wheel with Triton is for Linux on x86-64: {error}")
    return next(python.parents[1].glob("lib/python*/site-packages"))


@pytest.fixture
def server(site: Path, small: Report, tmp_path: Path) -> Iterator[str]:
    """The address of a server of the small model's repository."""
    TritonRepository(tmp_path / "models", name="digits")(small)
    shutil.rmtree(tmp_path / "models" / "digits_torchscript")  # its backend is not in the wheel
    here = site / "pytriton" / "tritonserver"
    shutil.copytree(here / "backends", tmp_path / "backends")
    version = site.parent.name.removeprefix("python")
    stub = here / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, tmp_path / "backends" / "python")
    (tmp_path / "backends" / "onnxruntime").mkdir()
    (tmp_path / "backends" / "onnxruntime" / "model.py").write_text(BACKEND.replace("SITE", repr(str(site))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [here / "bin" / "tritonserver", "--model-repository", tmp_path / "models"]
    words += ["--backend-directory", tmp_path / "backends", "--http-address", "127.0.0.1", "--http-port", port]
    words += ["--allow-grpc", "false", "--allow-metrics", "false"]
    libraries = (str(site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR"))
    around = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, words)), env=around, stdout=log, stderr=log, process_group=0)
    try:
        address = f"http://127.0.0.1:{port}/v2"
        wait_for(f"{address}/health/ready", process, tmp_path / "log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its processes for Python, which would go on without it
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(address).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(log.read_text()[-3000:])


def asked(address: str, question: Any = None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data=data)) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_triton_itself_serves_the_repository(server: str, small: Report):
    about = asked(f"{server}/models/digits_onnx")
    assert (about["platform"], about["versions"]) == ("onnxruntime_onnx", ["1"])
    assert [(each["name"], each["datatype"], each["shape"]) for each in about["inputs"]] == [("input", "FP32", [-1, 4])]
    with np.load(small.folder / "validation_batch.npz") as batch:
        x, expected = batch["input"], batch["output_0"]
    for rows in (len(x), 1):
        given = {"name": "input", "datatype": "FP32", "shape": x[:rows].shape, "data": x[:rows].ravel().tolist()}
        (output,) = asked(f"{server}/models/digits_onnx/infer", {"inputs": [given]})["outputs"]
        assert (output["name"], output["shape"]) == ("output_0", [rows, 3])
        assert np.allclose(np.reshape(output["data"], output["shape"]), expected[:rows], atol=1e-6)
