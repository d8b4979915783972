"""A repository of the Hugging Face Hub, by the Hub's own client, on loopback; and the card in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import hub as hubs
import polyexport
from hub import Hub
from lightning_export import HuggingFace
from made_up import outcome
from polyexport import BadRequest, Report
from polyexport.report.card import card
from polyexport.report.outcome import Checkpoint


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hubs.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own storage, which has no server of this kind
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield found


def test_artifacts_that_agree_are_uploaded_completely_and_can_be_loaded(small: Report, hub: Hub, tmp_path: Path):
    hub.files |= {"onnx/model.onnx.data": b"of an earlier export", "notes.txt": b"the user's"}
    HuggingFace("user/model")(small)
    for name, data in hub.files.items():
        file = tmp_path / "downloaded" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    assert hub.created["visibility"] == "private"
    folders = {name.partition("/")[0] for name in hub.files}
    assert folders == {"README.md", "notes.txt", "onnx", "pt2", "torchscript"}
    assert "onnx/model.onnx.data" not in hub.files
    x = np.ones((2, 4), np.float32)
    there, here = (polyexport.load(folder / "onnx")({"input": x}) for folder in (tmp_path / "downloaded", small.folder))
    assert np.array_equal(there["output_0"], here["output_0"])


def test_no_file_that_is_sent_names_a_folder_of_this_machine(small: Report, hub: Hub):
    HuggingFace("user/model")(replace(small, checkpoint=Checkpoint("/home/someone/best.ckpt")))
    texts = [data for name, data in hub.files.items() if name.endswith((".md", ".json"))]
    assert len(texts) == 1 + len(small.outcomes)
    for text in texts:
        assert str(small.folder.parent).encode() not in text
        assert b"/home/someone" not in text


def test_the_card_says_what_it_is_for_and_how_well_it_does(small: Report):
    metrics = {"val_acc": 0.9}
    outcomes = (replace(small["onnx"], metrics=metrics), outcome("tflite", "mismatch", "off by 3"))
    report = replace(small, outcomes=outcomes, metrics=metrics)
    text = card(report, "user/model", use="Reads *digits*.", license_id="mit")
    head, body = re.match(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()
    assert yaml.safe_load(head) == {"license": "mit", "tags": ["polyexport", "onnx"]}
    assert "## Intended use\n\nReads *digits*.\n" in body
    assert "| onnx | verified |" in body
    assert "| onnx | 0.9 (+0.0e+00) |" in body
    assert "tflite" not in body
    assert 'run = polyexport.load(f"{folder}/onnx")' in body
    assert "InferenceSession" in body


def test_a_card_without_an_intended_use_says_so(small: Report):
    assert "Not stated by the author." in card(small, "user/model")


def test_a_refusal_of_the_hub_is_reported(small: Report, hub: Hub):
    hub.refuses = 403
    with pytest.raises(ConnectionError, match=r"user/model: HfHubHTTPError: .*you may not write here"):
        HuggingFace("user/model")(small)
    assert not hub.files


def test_a_hub_that_does_not_answer_in_time_is_reported(small: Report, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HuggingFace, "_commit", lambda self, report: hub_is_slow())
    with pytest.raises(ConnectionError, match=r"user/model: not finished after 0.2 s"):
        HuggingFace("user/model", timeout=0.2)(small)


def hub_is_slow() -> None:
    import time

    time.sleep(1)


def test_nothing_is_uploaded_if_nothing_agrees(small: Report, hub: Hub):
    with pytest.raises(BadRequest, match="no artifact agrees with PyTorch"):
        HuggingFace("user/model")(replace(small, outcomes=(outcome("onnx", "failed", "why"),)))
    assert not hub.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repository": "model"}, "repository='model'; give 'user/model'"),
        ({"repository": "https://hub/user/model"}, "give 'user/model'"),
        ({"repository": "user/model", "timeout": 0}, "timeout=0; give the seconds"),
    ],
)
def test_an_invalid_option_is_refused_at_once(settings: dict[str, Any], message: str):
    with pytest.raises(BadRequest, match=re.escape(message)):
        HuggingFace(**settings)


def test_a_missing_client_is_reported_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("polyexport.publish.huggingface.find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"HuggingFace requires huggingface_hub; install with `pip install"):
        HuggingFace("user/model")
