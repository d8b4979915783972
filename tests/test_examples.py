"""Every example runs, as its own first lines say."""

from __future__ import annotations

import contextlib
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

import forked
import polyexport
import wandb_log
import web
import zoo
from environments import RUNTIMES
from polyexport import Report, Toolchain
from polyexport.kit.make import make
from polyexport.kit.prove import PROGRAM

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def command(name: str) -> str:
    """The command that runs an example, by its first lines: the last one there."""
    return re.findall(r"^(?:[A-Z]+=\S+ uvicorn|python) .*$", (EXAMPLES / name).read_text("utf-8"), re.MULTILINE)[-1]


def run(name: str, folder: Path, *more: str) -> str:
    """Run the command of an example in `folder`, as if that were the clone, with `more` at its end."""
    (folder / "examples").symlink_to(EXAMPLES)
    python, *words = command(name).split()
    assert python == "python"
    done = forked.script(*words, *more, cwd=folder, environment=ENVIRONMENT)
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
    """In a few formats: `make demo` makes all, and `test_names.py` sees that each of them is verified."""
    printed = run("digits.py", tmp_path, "torchscript", "onnx", "openvino", "tensorrt", "mnn")
    report = report_in(tmp_path)
    states = {each.format: each.state for each in report.outcomes}
    # what is skipped needs a GPU
    skipped = {name for name, state in states.items() if state == "skipped"}
    assert skipped <= {"tensorrt"}
    verified = set(states) - skipped
    assert {states[name] for name in verified} == {"verified"}
    assert {"torchscript", "onnx", "openvino", "mnn"} <= verified
    # 100 calls, or fewer where they take longer than a runtime's share of time
    assert all(1 <= report[name].latency.samples <= 100 for name in verified)
    assert report.checkpoint.monitor == "val_loss"
    assert str(report.folder / "report.html") in printed
    assert re.search(r"^epoch=\d-step=\d+ onnx \(dynamo\): verified in", printed, re.MULTILINE)
    assert "openvino" in (report.folder / "report.html").read_text(encoding="utf-8")
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


def test_qat(tmp_path):
    printed = run("qat.py", tmp_path, "onnx-int8")
    accuracies = [float(each) for each in re.findall(r"PyTorch (\S+)$", printed, re.MULTILINE)]
    assert min(accuracies) > 0.8
    rows = re.findall(r"^  (\S+) \((.+)\): (\S+), (\w+)$", printed, re.MULTILINE)
    assert {state for *_, state in rows} == {"verified"}
    assert [route == "trained scales" for _, route, *_ in rows] == [False, True]


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


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[str]:
    """The address of the service that an example is, in the folder of the one that it needs."""
    server = subprocess.Popen(
        f"exec env {command(name)} --port 0",
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


@pytest.fixture
def service(detection) -> Iterator[str]:
    with serving("serve_onnx.py", detection[0]) as address:
        yield address


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


@contextlib.contextmanager
def paged(name: str, exported: Path, root: Path) -> Iterator[str]:
    """The address that an example's page names, with the toolchain's TensorFlow.js in place of the network's."""
    text = (EXAMPLES / name).read_text("utf-8")
    ((address, export),) = re.findall(r"^http://localhost:8000(\S+=/(\S+)/tfjs/model.json)$", text, re.MULTILINE)
    ((url, library, version),) = re.findall(r'"(https://[^/"]+/npm/(@tensorflow/tfjs)@([^/"]+))/', text)
    (root / export).parent.mkdir(parents=True)
    (root / export).symlink_to(exported)
    (root / "examples").mkdir()
    (root / "examples" / name).write_text(text.replace(url, f"/node_modules/{library}"))
    with web.served(root) as host:
        package = json.loads((root / "node_modules" / library / "package.json").read_text())
        assert package["version"] == version, "it is the one that the export was verified in"
        yield host + address


@pytest.fixture(scope="module")
def page(converted, tmp_path_factory) -> Iterator[str]:
    with paged("tfjs.html", converted.folder, tmp_path_factory.mktemp("clone")) as address:
        yield address


def write_bmp(path: Path, pixels: np.ndarray) -> None:
    """Write `(height, width, 3)` bytes of red, green and blue; the width in bytes must be a multiple of four."""
    height, width, _ = pixels.shape
    header = struct.pack("<2sIII IiiHH6I", b"BM", 54 + pixels.size, 0, 54, 40, width, -height, 1, 24, *[0] * 6)
    path.write_bytes(header + pixels[..., ::-1].tobytes())


def shown_for(browser: Any, page: str, picture: Path) -> str:
    """What a page shows for a picture that one chooses."""
    browser.get(page)
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(picture))
    return WebDriverWait(browser, 60).until(lambda _: browser.find_element(By.ID, "answer").text)


def answer(browser: Any, page: str, picture: Path) -> np.ndarray:
    """The numbers that the page shows for a picture."""
    text = shown_for(browser, page, picture)
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


# --- from bytes to labels, in the hands of others ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def hand_over(tmp_path_factory) -> tuple[Path, str]:
    """Where the example ran, and which digit it says that its picture shows."""
    folder = tmp_path_factory.mktemp("hand_over")
    printed = run("hand_over.py", folder, "onnx", "tfjs")
    return folder, re.findall(r"^picture.bmp shows a (\w+)$", printed, re.MULTILINE)[0]


def test_hand_over(hand_over, tmp_path):
    folder, digit = hand_over
    report = report_in(folder)
    assert {each.format: each.state for each in report.outcomes} == dict.fromkeys(("onnx", "tfjs"), "verified")
    assert [str(each) for each in report.model.inputs] == ["pixels: uint8[batch, 32, 32, 3]"]
    assert report.model.processing["preprocess"] == "pixels"
    loaded = polyexport.load(report.folder / "onnx")
    best = loaded({"pixels": picture(folder)})["output_0"].argmax(-1)
    assert loaded.labels[best[0]] == digit
    kit = make(report.folder / "onnx", tmp_path / "kit")
    python = str(Toolchain("kit", RUNTIMES).interpreter(print))
    done = subprocess.run([python, "-I", str(kit / PROGRAM)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("onnx agrees with PyTorch\n")


def picture(folder: Path) -> np.ndarray:
    """The example's picture as one row of bytes, red first."""
    data = np.frombuffer((folder / "runs" / "hand_over" / "picture.bmp").read_bytes()[54:], np.uint8)
    return data.reshape(1, 32, 32, 3)[..., ::-1].copy()


@pytest.mark.slow
def test_hand_over_in_a_page(hand_over, browser, tmp_path):
    folder, digit = hand_over
    with paged("hand_over.html", report_in(folder).folder, tmp_path) as address:
        shown = shown_for(browser, address, folder / "runs" / "hand_over" / "picture.bmp")
    assert re.fullmatch(rf"{digit}: \d+\.\d %", shown)


ASK = """
import json, sys
import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
client = InferenceServerClient(sys.argv[1])
assert client.is_server_ready()
about = client.get_model_metadata("digits_onnx")
pixels = np.load(sys.argv[2])
given = InferInput("pixels", list(pixels.shape), "UINT8")
given.set_data_from_numpy(pixels, binary_data=False)
wanted = InferRequestedOutput("output_0", binary_data=False, class_count=1)
print(json.dumps([about, client.infer("digits_onnx", [given], outputs=[wanted]).get_response()]))
"""


def test_serve_triton(hand_over, tmp_path):
    """Triton's own client asks, by the protocol that Triton and KServe have."""
    folder, digit = hand_over
    np.save(tmp_path / "pixels.npy", picture(folder))
    python = str(Toolchain("triton-http", ("tritonclient[http]",)).interpreter(print))
    with serving("serve_triton.py", folder) as address:
        host = address.removeprefix("http://")
        asked = [python, "-c", ASK, host, str(tmp_path / "pixels.npy")]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        wrong = {"inputs": [{"name": "pixels", "shape": [1, 2], "datatype": "UINT8", "data": [1, 2]}]}
        assert httpx.post(f"{address}/v2/models/digits_onnx/infer", json=wrong).status_code == 400
        assert httpx.get(f"{address}/v2/models/nothing").status_code == 404
    assert done.returncode == 0, done.stderr
    about, reply = json.loads(done.stdout)
    assert about["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert reply["outputs"][0]["data"][0].endswith(f":{digit}")


@pytest.mark.parametrize("config", [path.name for path in EXAMPLES.glob("*.yaml")])
def test_a_mistake_in_the_configuration_is_reported(tmp_path, config):
    wrong = tmp_path / config
    wrong.write_text((EXAMPLES / config).read_text().replace("when: fit_end", "when: never"))
    done = forked.script(EXAMPLES / config.replace(".yaml", ".py"), "fit", "--config", wrong, cwd=tmp_path)
    assert done.returncode != 0
    assert "never" in done.stderr
