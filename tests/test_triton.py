"""A model repository, and its configuration as Triton's own client reads it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_up import outcome
from polyexport import FORMATS, BadRequest, Outcome, Report, TensorSpec
from polyexport.format import Triton
from polyexport.publish.triton import TritonRepository, config
from polyexport.workers.toolchain import Toolchain

PARSE = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
print(json_format.MessageToJson(text_format.Parse(sys.stdin.read(), model_config_pb2.ModelConfig())))
"""


@pytest.fixture(scope="session")
def client() -> str:
    """The Python of an environment with Triton's client."""
    return str(Toolchain("triton", ("tritonclient[grpc]",)).interpreter(print))


def parsed(client: str, text: str) -> dict[str, Any]:
    done = subprocess.run([client, "-c", PARSE], input=text, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def made(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...]) -> Outcome:
    return replace(outcome("onnx", "verified", megabytes=1.0, error=1e-6), inputs=inputs, outputs=outputs)


IMAGE = TensorSpec("image", "float32", ("batch", 3, "height", 8))
LOGITS = TensorSpec("logits", "float16", ("batch", 10))


def test_triton_reads_what_was_written(client: str):
    text = config('a "model"', made(IMAGE, outputs=(LOGITS,)), Triton("onnxruntime", "model.onnx"), 16, 10)
    assert parsed(client, text) == {
        "name": 'a "model"',
        "backend": "onnxruntime",
        "maxBatchSize": 16,
        "input": [{"name": "image", "dataType": "TYPE_FP32", "dims": ["3", "-1", "8"]}],
        "output": [{"name": "logits", "dataType": "TYPE_FP16", "dims": ["10"], "labelFilename": "labels.txt"}],
    }


def test_an_input_without_a_batch_keeps_all_its_axes(client: str):
    scalar = TensorSpec("count", "int64", ())
    mask = TensorSpec("mask", "bool", ("rows", 4))
    triton = Triton("tensorrt_plan", "model.plan", is_platform=True)
    found = parsed(client, config("m", made(mask, outputs=(scalar,)), triton, 16))
    assert (found["platform"], found.get("maxBatchSize", 0)) == ("tensorrt_plan", 0)
    assert found["input"] == [{"name": "mask", "dataType": "TYPE_BOOL", "dims": ["-1", "4"]}]
    assert found["output"] == [{"name": "count", "dataType": "TYPE_INT64", "dims": ["1"], "reshape": {}}]


def test_one_number_for_each_row_is_a_tensor_of_one_element(client: str):
    score = TensorSpec("score", "float32", ("batch",))
    found = parsed(client, config("m", made(IMAGE, outputs=(score,)), Triton("openvino", "model.xml"), 16))
    assert found["output"] == [{"name": "score", "dataType": "TYPE_FP32", "dims": ["1"], "reshape": {}}]


def test_torchscript_knows_tensors_by_their_index(client: str):
    triton = FORMATS["torchscript"].triton
    found = parsed(client, config("m", made(IMAGE, outputs=(LOGITS, LOGITS)), triton, 16))
    assert [each["name"] for each in (*found["input"], *found["output"])] == ["image__0", "logits__0", "logits__1"]


def test_each_export_is_the_next_version(small: Report, tmp_path: Path, client: str):
    publish = TritonRepository(tmp_path / "models", name="digits")
    publish(small)
    publish(small)
    models = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert models == ["digits_onnx", "digits_torchscript"]  # Triton serves no pt2
    for number in ("1", "2"):
        served = tmp_path / "models" / "digits_onnx" / number
        assert [file.name for file in served.iterdir()] == ["model.onnx"]
        assert (served / "model.onnx").read_bytes() == (small.folder / "onnx" / "model.onnx").read_bytes()
        assert (served.parent.with_name("digits_torchscript") / number / "model.pt").is_file()
    found = parsed(client, (tmp_path / "models" / "digits_onnx" / "config.pbtxt").read_text(encoding="utf-8"))
    assert (found["name"], found["maxBatchSize"]) == ("digits_onnx", 64)


def test_an_artifact_that_does_not_agree_is_not_served(small: Report, tmp_path: Path):
    wrong = replace(small, outcomes=tuple(replace(each, state="mismatch") for each in small.outcomes))
    with pytest.raises(
        BadRequest, match=r"no artifact that agrees with PyTorch can be served by Triton; it serves onnx"
    ):
        TritonRepository(tmp_path / "models")(wrong)
    assert not (tmp_path / "models").exists()
