"""Every example runs, as its own first lines say."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import wandb_log
import web
import zoo
from polyexport import Report

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def command(name: str) -> str:
    """The command that runs an example, by its first lines: the last one there."""
    return re.findall(r"^(?:EXPORT=\S+ uvicorn|python) .*$", (EXAMPLES / name).read_text("utf-8"), re.MULTILINE)[-1]


def run(name: str, folder: Path) -> str:
    """Run the command of an example in `folder`, as if that were the clone."""
    (folder / "examples").symlink_to(EXAMPLES)
    done = subprocess.run(
        command(name), shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report_in(folder: Path) -> Report:
    (found,) = {path.resolve() for path in folder.rglob("best/report.json")}
    return Report.load(found.parent)


def test_every_example_is_run_here():
    tested = {name for test in globals() if test.startswith("test_") for name in re.findall(r"\w+", test)}
    for example in filter(Path.is_file, EXAMPLES.iterdir()):
        assert f"test_{example.stem}" in tested, example


@pytest.mark.slow
def test_digits(tmp_path):
    printed = run("digits.py", tmp_path)
    report = report_in(tmp_path)
    states = {each.format: each.state for each in report.outcomes}
    # what is skipped needs a GPU, and a compiler that only its vendor has
    skipped = {name for name, state in states.items() if state == "skipped"}
    assert skipped <= {"tensorrt", "edgetpu"}
    verified = set(states) - skipped
    assert {states[name] for name in verified} == {"verified"}
    assert {
        "torchscript",
        "onnx",
        "openvino",
        "coreml",
        "saved_model",
        "graphdef",
        "tflite",
        "tfjs",
        "paddle",
    } <= verified
    # 100 calls, or fewer where they take longer than a runtime's share of time
    assert all(1 <= report[name].latency.samples <= 100 for name in verified - {"coreml"})
    assert report.checkpoint.monitor == "val_loss"
    assert str(report.folder / "report.html") in printed
    assert re.search(r"^epoch=\d-step=\d+ onnx \(dynamo\): verified in", printed, re.MULTILINE)
    assert "tflite-int8" in (report.folder / "report.html").read_text(encoding="utf-8")
    (path,) = tmp_path.rglob("*.wandb")
    run_found = wandb_log.read(path)
    assert len(run_found.artifacts) == len(verified)
    assert run_found.summary["export/onnx/state"] == "verified"


def test_lightning_cli(tmp_path):
    run("lightning_cli.py", tmp_path)
    report = report_in(tmp_path)
    assert [each.state for each in report.outcomes] == ["verified", "verified"]
    assert report.model.inputs[0].shape == ("rows", 1, 8, 8)
    assert report.model.class_name == "torch.nn.modules.container.Sequential"


def test_fabric(tmp_path):
    """A face for another trainer needs public names only, and little of them."""
    source = (EXAMPLES / "fabric.py").read_text(encoding="utf-8")
    assert "lightning_export" not in source
    assert len(source.splitlines()) < 150
    run("fabric.py", tmp_path)
    report = report_in(tmp_path)
    assert [each.state for each in report.outcomes] == ["verified", "verified"]
    assert report.checkpoint.monitor == "loss"


def test_without_lightning(tmp_path):
    printed = run("without_lightning.py", tmp_path)
    assert re.search(r"^attention onnx \(dynamo\): verified in \d+\.\d s, \d.* [kM]?B$", printed, re.MULTILINE)
    report = Report.load(tmp_path / "runs" / "attention")
    assert [each.state for each in report.outcomes] == ["verified", "verified"]


def test_transformer(tmp_path):
    printed = run("transformer.py", tmp_path)
    report = report_in(tmp_path)
    assert [(each.format, each.state) for each in report.outcomes] == [("onnx", "verified"), ("openvino", "verified")]
    assert [str(each) for each in report.model.inputs] == [
        "ids: int64[sentences, words]",
        "attention_mask: int64[sentences, words]",
    ]
    assert "[80, 90, 70, 3, 60]: upper half" in printed


@pytest.fixture(scope="module")
def detection(tmp_path_factory) -> tuple[Path, str]:
    """Where the example ran, and what it printed."""
    folder = tmp_path_factory.mktemp("detection")
    return folder, run("detection.py", folder)


def test_detection(detection):
    folder, printed = detection
    report = report_in(folder)
    assert [(each.format, each.state) for each in report.outcomes] == [("onnx", "verified"), ("openvino", "verified")]
    assert [str(each) for each in report.model.outputs] == [
        "boxes: float32[batch, 16, 4]",
        "scores: float32[batch, 16]",
    ]
    shown, found = (json.loads(box) for box in re.findall(r"^(?:rectangle|found): +(.*)$", printed, re.MULTILINE))
    assert np.abs(np.subtract(shown, found)).max() <= 5, "pixels"


def test_ddp(tmp_path):
    printed = run("ddp.py", tmp_path)
    report = report_in(tmp_path)
    assert [each.state for each in report.outcomes] == ["verified"]
    exports = len([path for path in report.folder.parent.iterdir() if not path.is_symlink()])
    assert len(re.findall(r"onnx \(dynamo\): verified", printed)) == exports
    assert f"rank 0: {exports} exports" in printed
    assert "rank 1: 0 exports" in printed


@pytest.fixture
def service(detection) -> Iterator[str]:
    """The address of the service that the example is."""
    folder, _ = detection
    server = subprocess.Popen(
        f"exec env {command('serve_onnx.py')} --port 0",
        shell=True,
        cwd=folder,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    while not (address := re.search(r"running on (\S+)", line := server.stderr.readline())):
        lines.append(line)
        assert line, "".join(lines)
    yield address[1]
    server.send_signal(signal.SIGINT)
    server.communicate()


def test_serve_onnx(service, detection):
    folder, _ = detection
    with np.load(report_in(folder).folder / "validation_batch.npz") as arrays:
        image, reference = arrays["image"], {name: arrays[name] for name in ("boxes", "scores")}
    reply = httpx.post(service, json={"image": image.tolist()}).raise_for_status().json()
    assert reply.keys() == reference.keys()
    for name, expected in reference.items():
        np.testing.assert_allclose(reply[name], expected, rtol=1e-3, atol=1e-4 * expected.max())
    other = httpx.post(service, json={"image": image[::-1].tolist()}).json()
    assert not np.allclose(other["boxes"], reference["boxes"], rtol=1e-3, atol=1e-2), "the shadow: other images"
    for wrong in ({}, {"image": [[1, 2], [3]]}, {"image": [1.0]}):
        assert httpx.post(service, json=wrong).status_code == 422, wrong
    assert "image" in httpx.get(f"{service}/openapi.json").json()["components"]["schemas"]["Inputs"]["properties"]


@pytest.fixture(scope="module")
def page(converted, tmp_path_factory) -> Iterator[str]:
    """The address that the example names, with the toolchain's TensorFlow.js in place of the network's."""
    root = tmp_path_factory.mktemp("clone")
    text = (EXAMPLES / "tfjs.html").read_text("utf-8")
    ((address, export),) = re.findall(r"^http://localhost:8000(\S+=/(\S+)/tfjs/model.json)$", text, re.MULTILINE)
    ((url, library, version),) = re.findall(r'"(https://[^/"]+/npm/(@tensorflow/tfjs)@([^/"]+))/', text)
    (root / export).parent.mkdir(parents=True)
    (root / export).symlink_to(converted.folder)
    (root / "examples").mkdir()
    (root / "examples" / "tfjs.html").write_text(text.replace(url, f"/node_modules/{library}"))
    with web.served(root) as host:
        package = json.loads((root / "node_modules" / library / "package.json").read_text())
        assert package["version"] == version, "it is the one that the export was verified in"
        yield host + address


def write_bmp(path: Path, pixels: np.ndarray) -> None:
    """Write `(height, width, 3)` bytes of red, green and blue; the width in bytes must be a multiple of four."""
    height, width, _ = pixels.shape
    header = struct.pack("<2sIII IiiHH6I", b"BM", 54 + pixels.size, 0, 54, 40, width, -height, 1, 24, *[0] * 6)
    path.write_bytes(header + pixels[..., ::-1].tobytes())


def answer(browser: Any, page: str, picture: Path) -> np.ndarray:
    """The numbers that the page shows for a picture."""
    browser.get(page)
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(picture))
    text = WebDriverWait(browser, 60).until(lambda _: browser.find_element(By.ID, "answer").text)
    assert text.startswith("logits: Tensor"), text
    return np.array([float(number) for number in re.findall(r"-?\d[\d.e-]*", text)])


@pytest.mark.slow
def test_tfjs(browser, page, tmp_path):
    module, _ = zoo.build("resnet")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    pictures[1, :32] //= 4
    with torch.no_grad():
        expected = module.eval()(torch.tensor(pictures / 255).float().permute(0, 3, 1, 2)).logits.numpy()
    shown = []
    for picture in pictures:
        write_bmp(tmp_path / "picture.bmp", picture)
        shown.append(answer(browser, page, tmp_path / "picture.bmp"))
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(shown, expected[::-1], rtol=1e-3, atol=1e-4), "the shadow: the other picture's answer"


@pytest.mark.parametrize("config", [path.name for path in EXAMPLES.glob("*.yaml")])
def test_a_mistake_in_the_configuration_is_told(tmp_path, config):
    wrong = tmp_path / config
    wrong.write_text((EXAMPLES / config).read_text().replace("when: fit_end", "when: never"))
    command = [sys.executable, str(EXAMPLES / config.replace(".yaml", ".py")), "fit", "--config", str(wrong)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "never" in done.stderr
