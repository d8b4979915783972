"""A converted model in a real browser: loaded over HTTP as a web app would, it answers as PyTorch does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import web
from polyexport import FORMATS, Report
from polyexport.measure.parity import Parity, compare

BACKENDS = ("cpu", "wasm")

PAGE = """
<!doctype html>
<title>model</title>
<script src="/node_modules/@tensorflow/tfjs-core/dist/tf-core.min.js"></script>
<script src="/node_modules/@tensorflow/tfjs-converter/dist/tf-converter.min.js"></script>
<script src="/node_modules/@tensorflow/tfjs-backend-cpu/dist/tf-backend-cpu.min.js"></script>
<script src="/node_modules/@tensorflow/tfjs-backend-wasm/dist/tf-backend-wasm.min.js"></script>
<script>
  tf.wasm.setWasmPaths("/node_modules/@tensorflow/tfjs-backend-wasm/dist/");
  async function run(folder, backend, given) {
    if (!(await tf.setBackend(backend))) throw new Error("no backend " + backend);
    const model = await tf.loadGraphModel(`/${folder}/model.json`);
    const { inputs, outputs } = model.modelSignature;
    const feed = {};
    for (const [name, { values, shape, dtype }] of Object.entries(given))
      feed[inputs[name].name] = tf.tensor(values, shape, dtype);
    const names = Object.keys(outputs);
    const made = [].concat(await model.executeAsync(feed, names.map((name) => outputs[name].name)));
    const answer = { backend: tf.getBackend() };
    for (const [i, name] of names.entries())
      answer[name] = { values: Array.from(await made[i].data()), shape: made[i].shape };
    return answer;
  }
</script>
"""


@pytest.fixture(scope="module")
def site(converted: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page beside the model, a spoiled copy of it, and TensorFlow.js."""
    root = tmp_path_factory.mktemp("site")
    (root / "index.html").write_text(PAGE)
    shutil.copytree(converted.folder / "tfjs", root / "good")
    shutil.copytree(converted.folder / "tfjs", root / "spoiled")
    weights = next((root / "spoiled").glob("*.bin"))
    content = bytearray(weights.read_bytes())
    content[_classifier(root / "spoiled" / "model.json") + 3] ^= 0x80  # the sign of its first float32
    weights.write_bytes(content)
    with web.served(root) as address:
        yield f"{address}/index.html"


def _classifier(model: Path) -> int:
    """Where the classifier's weight, the only float matrix of a ResNet, begins in its file."""
    (group,) = json.loads(model.read_text())["weightsManifest"]
    kinds = [(each["dtype"], len(each["shape"])) for each in group["weights"]]
    assert {dtype for dtype, _ in kinds} <= {"float32", "int32"}, "four bytes each"
    sizes = [int(np.prod(each["shape"])) * 4 for each in group["weights"]]
    return sum(sizes[: kinds.index(("float32", 2))])


def answered(browser: Any, site: str, report: Report, folder: str, backend: str) -> Parity:
    """Open the page, run the validation batch in it, and hold the answer against PyTorch's."""
    assert report.model is not None
    with np.load(report.folder / "validation_batch.npz") as arrays:
        given = {
            tensor.name: {
                "values": arrays[tensor.name].ravel().tolist(),
                "shape": arrays[tensor.name].shape,
                "dtype": tensor.dtype,
            }
            for tensor in report.model.inputs
        }
        reference = {tensor.name: arrays[tensor.name] for tensor in report.model.outputs}
    browser.get(site)
    found = browser.execute_script("return run(...arguments)", folder, backend, given)
    assert found.pop("backend") == backend
    outputs = {
        name: np.array(each["values"], reference[name].dtype).reshape(each["shape"]) for name, each in found.items()
    }
    return compare(outputs, reference, FORMATS["tfjs"].limits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_web_page_answers_as_pytorch_does(browser: Any, site: str, converted: Report, backend: str) -> None:
    assert converted["tfjs"].state == "verified"
    parity = answered(browser, site, converted, "good", backend)
    assert (parity.passed, parity.reason) == (True, "")


@pytest.mark.slow
def test_a_web_page_with_one_wrong_weight_does_not(browser: Any, site: str, converted: Report) -> None:
    assert not answered(browser, site, converted, "spoiled", "wasm").passed
