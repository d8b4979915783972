"""The page beside an artifact for browsers, opened in one: it answers as PyTorch does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyexport
import web
import zoo
from isolated import many
from polyexport import FORMATS, Report
from polyexport.measure.parity import compare
from polyexport.report.html import page
from polyexport.spec import ONE_ROW, ExportSpec, TensorSpec
from polyexport.web.page import write

TOOLCHAINS = {"onnx-web": "onnx_web", "tfjs": "tfjs", "tflite-web": "litert_web"}
NAMES = list(TOOLCHAINS)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Ids and a mask: an int64 and a bool, of which JavaScript has neither as PyTorch has them."""
    module, inputs = zoo.build("two_inputs")
    return polyexport.export(module, inputs, NAMES, tmp_path_factory.mktemp("pages") / "out", bench=False)


BACKENDS = [*((name, "") for name in NAMES), ("onnx-web", "webgpu"), ("tflite-web", "webgpu")]
"""A runtime's own choice, and WebGPU; which browsers without a GPU have by SwiftShader, so nothing is timed."""

COUNTS_SUBMITTED = """
window.submitted = 0;
const submit = window.GPUQueue?.prototype.submit;
if (submit) GPUQueue.prototype.submit = function (...buffers) { submitted += 1; return submit.apply(this, buffers); };
"""
"""What a page runs first, so that it is known whether the GPU was given anything to do."""


@pytest.fixture
def counting(browser: Any) -> Iterator[Any]:
    """The browser, whose pages have in `submitted` how often they gave WebGPU work."""
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": COUNTS_SUBMITTED})
    yield browser
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def opened(browser: Any, site: str) -> str:
    browser.get(site)
    said = browser.find_element("id", "said")
    for _ in range(600):
        if said.text != "loading":
            break
        browser.execute_async_script("setTimeout(arguments[0], 100)")
    return str(said.text)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_it_runs_the_artifact_and_answers_as_pytorch_does(
    counting: Any, report: Report, tmp_path: Path, name: str, backend: str
) -> None:
    assert (report[name].state, report[name].reason) == ("verified", "")
    with np.load(report.folder / "validation_batch.npz") as arrays:
        rows = slice(1 if report[name].remark == ONE_ROW else None)
        batch = {key: array[rows] for key, array in arrays.items()}
    given = {
        tensor.name: {"values": batch[tensor.name].astype(float).ravel().tolist(), "shape": batch[tensor.name].shape}
        for tensor in report.model.inputs
    }
    site = Path(shutil.copytree(report.folder / name, tmp_path / "site"))
    with web.served(site, web.PACKAGES[TOOLCHAINS[name]]) as address:
        said = opened(counting, f"{address}/index.html?backend={backend}")
        if backend and not counting.execute_script("return navigator.gpu?.requestAdapter()"):
            pytest.skip("this browser has no adapter for WebGPU")
        assert said.startswith("ran in ")
        found = counting.execute_script("return run(arguments[0])", given)
        assert bool(counting.execute_script("return submitted")) == bool(backend)
    reference = {tensor.name: batch[tensor.name] for tensor in report.model.outputs}
    answers = {
        key: np.array(each["values"], reference[key].dtype).reshape(each["shape"]) for key, each in found.items()
    }
    agreed = compare(answers, reference, FORMATS[name].limits)
    assert (agreed.passed, agreed.reason) == (True, "")
    answers["output_0"][0, 0] += 1
    assert not compare(answers, reference, FORMATS[name].limits).passed


@pytest.mark.slow
def test_the_report_links_it(report: Report) -> None:
    links = re.findall(r'href="([^"]*index\.html)"', page(report))
    assert links == [f"{name}/index.html" for name in (each.format for each in report.outcomes) if name in NAMES]
    assert all((report.folder / link).is_file() for link in links)


@pytest.mark.parametrize(
    ("toolchain", "package", "pinned"),
    [
        ("litert_web", "@litertjs/core", ""),
        ("onnx_web", "onnxruntime-web", ""),
        ("tfjs", "@tensorflow/tfjs", "@tensorflow/tfjs-core"),
    ],
)
def test_it_names_the_runtime_by_version_and_no_name_ends_its_script(
    tmp_path: Path, toolchain: str, package: str, pinned: str
) -> None:
    tensor = TensorSpec("</script>{{runtime}}", "float32", ("batch", 3))
    write(tmp_path / "model", ExportSpec((tensor,), ()), toolchain, package, pinned)
    text = (tmp_path / "index.html").read_text()
    assert re.search(rf'RUNTIME = {{"package": "{package}", "version": "\d+\.\d+\.\d+"}}', text)
    assert '"shape": [1, 3]' in text
    assert text.count("</script>") == 1
    assert "{{artifact}}" not in text


@pytest.mark.slow
def test_every_model_agrees_in_node_at_three_batch_sizes(exported) -> None:
    roots = [str(exported(model).folder) for model in (*zoo.GROUND, *zoo.FURTHER)]
    assert all(made == {"onnx-web": "made"} for made in many("onnx_web", "convert", ("onnx-web",), roots).values())
    judged = many("onnx_web", "verify", ("onnx-web",), roots)
    cells = {Path(root).name: found["onnx-web"] for root, found in judged.items()}
    assert {model: said for model, said in cells.items() if not isinstance(said, dict) or not said["passed"]} == {}
    assert all(len(said["batches"]) == 3 for said in cells.values())
