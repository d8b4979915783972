"""Every example runs, as its own docstring says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import wandb_log
from polyexport import Report

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, folder: Path) -> str:
    """Run the command in the docstring of an example, in `folder`."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    (words,) = re.findall(r"^\s*python (examples/.*)$", source.split('"""')[1], re.MULTILINE)
    command = [sys.executable, *(word.replace("examples/", f"{EXAMPLES}/") for word in words.split())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report_in(folder: Path) -> Report:
    (found,) = {path.resolve() for path in folder.rglob("best/report.json")}
    return Report.load(found.parent)


def test_every_example_is_run_here():
    tested = {name for test in globals() if test.startswith("test_") for name in re.findall(r"\w+", test)}
    for example in EXAMPLES.glob("*.py"):
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
    assert all(report[name].latency.samples == 100 for name in verified - {"coreml"})
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


def test_without_lightning(tmp_path):
    printed = run("without_lightning.py", tmp_path)
    assert re.search(r"^attention onnx \(dynamo\): verified in \d+\.\d s, \d.* [kM]?B$", printed, re.MULTILINE)
    report = Report.load(tmp_path / "runs" / "attention")
    assert [each.state for each in report.outcomes] == ["verified", "verified"]


@pytest.mark.parametrize("config", [path.name for path in EXAMPLES.glob("*.yaml")])
def test_a_mistake_in_the_configuration_is_told(tmp_path, config):
    wrong = tmp_path / config
    wrong.write_text((EXAMPLES / config).read_text().replace("when: fit_end", "when: never"))
    command = [sys.executable, str(EXAMPLES / config.replace(".yaml", ".py")), "fit", "--config", str(wrong)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "never" in done.stderr
