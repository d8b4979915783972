"""Labels and metadata: inside each artifact, beside it, in the report, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import polyexport
from polyexport import BadRequest, ExportSpec, Options, Report, TensorSpec
from polyexport.engine.labels import labeled
from polyexport.format import Route
from polyexport.formats import resolve
from polyexport.formats.tflite import packed
from polyexport.report.html import page
from polyexport.report.outcome import Model
from polyexport.report.tables import embedded
from polyexport.spec import LABELS

NAMES = ("cat", "guinea pig", "Wölfin", "")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Report:
    module = torch.nn.Linear(4, 4)
    formats = ["torchscript", "pt2", "onnx", "openvino"]
    into = tmp_path_factory.mktemp("named") / "out"
    about = {"labels": NAMES, "metadata": {"license": "MIT"}}
    return polyexport.export(module, torch.rand(4, 4), formats, into, bench=False, **about)


def test_every_artifact_gives_back_what_travels_in_it(named: Report):
    for outcome in named.outcomes:
        folder = named.folder / outcome.format
        loaded = polyexport.load(folder)
        assert loaded.labels == NAMES
        assert loaded.metadata["license"] == "MIT"
        assert loaded.metadata["checkpoint_sha256"] == named.checkpoint.sha256
        assert (folder / LABELS).read_text(encoding="utf-8") == "cat\nguinea pig\nWölfin\n\n"
        assert outcome.state == "verified", outcome.reason


def test_each_formats_own_tools_read_it(named: Report):
    import onnxruntime
    import openvino

    session = onnxruntime.InferenceSession(str(named.folder / "onnx" / "model.onnx"))
    entries = session.get_modelmeta().custom_metadata_map
    assert json.loads(entries["labels"]) == list(NAMES)
    assert entries["license"] == "MIT"
    model = openvino.Core().read_model(named.folder / "openvino" / "model.xml")
    assert model.get_rt_info(["model_info", "labels"]).value == "cat guinea_pig Wölfin _"
    assert model.get_rt_info(["polyexport", "license"]).value == "MIT"
    wanted = {LABELS: "", "polyexport.json": ""}
    torch.jit.load(named.folder / "torchscript" / "model.torchscript", _extra_files=wanted)
    assert wanted[LABELS].decode().splitlines() == list(NAMES)
    wanted = {LABELS: "", "polyexport.json": ""}
    torch.export.load(named.folder / "pt2" / "model.pt2", extra_files=wanted)
    assert wanted[LABELS].splitlines() == list(NAMES)
    assert json.loads(wanted["polyexport.json"])["license"] == "MIT"


def test_a_tflite_file_has_labels_appended(tmp_path: Path):
    spec = ExportSpec((), (), labels=NAMES, metadata={"license": "MIT"})
    route = Route("x", "module", "tflite", lambda source, target, spec: target.write_bytes(b"a flatbuffer") and None)
    packed(route).convert(tmp_path, tmp_path / "model.tflite", spec)
    assert (tmp_path / "model.tflite").read_bytes().startswith(b"a flatbuffer")
    with ZipFile(tmp_path / "model.tflite") as archive:
        assert archive.read(LABELS).decode().splitlines() == list(NAMES)
        assert json.loads(archive.read("polyexport.json")) == {"license": "MIT"}


def test_report_and_page_show_it(named: Report):
    for text in (str(named), page(named)):
        assert "labels: cat, guinea pig, Wölfin, ; license: MIT" in text
    assert Report.load(named.folder).model.labels == NAMES


def test_a_long_entry_is_shown_in_part_and_labels_are_the_embedded_ones():
    model = Model("Net", 1, (), (), labels=("cat",), metadata={"labels": "mine", "about": "z" * 500})
    assert embedded(model, ()) == f"labels: cat; about: {'z' * 160} …"


def test_labels_that_fit_no_output_are_left_out_with_a_note(tmp_path: Path):
    report = polyexport.export(
        torch.nn.Linear(4, 3), torch.rand(4, 4), ["torchscript"], tmp_path / "out", bench=False, labels=["cat", "dog"]
    )
    (outcome,) = report.outcomes
    why = "labels are left out: no output has 2 classes in its last axis (output_0: float32[batch, 3])"
    assert (outcome.state, outcome.reason) == ("degraded", why)
    assert polyexport.load(tmp_path / "out" / "torchscript").labels == ()
    assert not (tmp_path / "out" / "torchscript" / LABELS).exists()


def test_the_classes_of_an_image_are_on_its_second_axis():
    image = TensorSpec("mask", "float32", ("batch", 4, 8, 8))
    assert labeled(ExportSpec((), (image,)), NAMES, {})[0].labels == NAMES
    text = TensorSpec("logits", "float32", ("batch", 4, 8))
    assert labeled(ExportSpec((), (text,)), NAMES, {})[0].labels == ()


def test_the_keys_of_polyexport_are_not_overwritten():
    spec = ExportSpec((), (), metadata={"git_commit": "abc"})
    assert labeled(spec, (), {"git_commit": "mine", "a": "b"})[0].metadata == {"git_commit": "abc", "a": "b"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": "cat"}, "labels='cat'; give a list of strings, one for each class in order"),
        ({"labels": {"dog": 1, "cat": 0}}, "labels={'dog': 1, 'cat': 0}; give a list of strings"),
        ({"labels": {"dog"}}, "labels={'dog'}; give a list of strings"),
        ({"labels": ("cat", 3)}, "labels=('cat', 3); give a list"),
        ({"labels": ("cat\n", "dog")}, r"the label 'cat\n' has a line break; give labels of one line"),
        ({"labels": ("cat\u2028", "dog")}, r"the label 'cat\u2028' has a line break"),
        ({"labels": ("\ud800", "dog")}, r"'\ud800' in labels or metadata has half of a surrogate pair"),
        ({"metadata": {"by": "a\0b"}}, r"'a\x00b' in labels or metadata has a null character"),
        ({"metadata": {"version": 3}}, "metadata={'version': 3}; give a mapping of strings to strings"),
        ({"metadata": ["a"]}, "metadata=['a']; give a mapping of strings to strings"),
    ],
)
def test_metadata_that_cannot_be_embedded_is_refused_at_once(given: dict, message: str):
    with pytest.raises(BadRequest, match=re.escape(message)):
        Options(resolve(["onnx"]), **given)
