"""A user's own folders are never replaced, whatever an export is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import polyexport
from planted import GOOD
from polyexport import BadRequest, Engine, Report
from polyexport.report.folders import (
    BEST,
    check_name,
    foreign,
    free_name,
    may_become_export,
    may_point_best,
    point_best,
    short_name,
)
from test_engine import request
from users import another_user, shared as shared

REPORT = '{"version": 1, "checkpoint": {}, "outcomes": []}'


def a_folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "may"),
    [
        ({}, True),
        ({"report": REPORT}, True),
        ({"report": REPORT.replace("1", "99")}, True),
        ({"report": REPORT, "notes": ""}, False),
        ({"report": REPORT.replace("[]", '[{"format": "onnx"}, 3]'), "manifest": "", "bom": ""}, True),
        ({"notes": ""}, False),
        ({"report": '{"passed": 3}'}, False),
        ({"report": "[]"}, False),
        ({"report": "no JSON"}, False),
    ],
    ids=[
        "empty",
        "an export",
        "one of another version",
        "one with notes",
        "all of it",
        "notes",
        "of another tool",
        "a list",
        "broken",
    ],
)
def test_only_an_export_and_an_empty_folder_may_be_replaced(tmp_path, files, may):
    folder = a_folder(tmp_path / "x", **files)
    assert may_become_export(folder) == may
    assert free_name(tmp_path, "x") == ("x" if may else "x-2")


def test_a_file_and_a_link_of_the_users_may_not_be_replaced(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(a_folder(tmp_path / "export", report=REPORT))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert [may_become_export(tmp_path / name) for name in ("file", "link", "dangling", "new")] == [False] * 3 + [True]


def test_a_name_that_is_too_long_for_a_folder_is_cut():
    """`ModelCheckpoint` may write `val/loss=0.5.ckpt`, whose parts together are the name of the export."""
    long = "é" * 200
    assert len(short_name(long).encode()) < 255
    assert short_name(long) != short_name(long + "x")
    assert short_name("epoch=1-step=8") == "epoch=1-step=8"


def test_an_export_of_another_user_is_not_replaced(shared):
    a_folder(shared / "x", report=REPORT)
    with another_user():
        assert not may_become_export(shared / "x")
        assert free_name(shared, "x") == "x-2"
        with pytest.raises(BadRequest, match="x cannot be written; give another folder"):
            polyexport.export(nn.Linear(5, 3), torch.rand(4, 5), [GOOD], shared / "x", bench=False)


def test_an_export_with_a_users_files_is_not_replaced(tmp_path):
    first = polyexport.export(nn.Linear(5, 3), torch.rand(4, 5), [GOOD], tmp_path / "out", bench=False).folder
    (first / "notes").write_text("mine")
    with pytest.raises(BadRequest, match="is an export that also has notes, which would be lost; move that"):
        polyexport.export(nn.Linear(5, 3), torch.rand(4, 5), [GOOD], tmp_path / "out", bench=False)
    assert (first / "notes").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["out"]
    (first / "notes").unlink()
    assert foreign(first) == []


@pytest.mark.parametrize("kind", ["folder", "file", "report of another tool"])
def test_a_folder_that_is_not_an_export_is_refused_before_anything_is_done(tmp_path, kind):
    into = tmp_path / "mine"
    if kind == "file":
        into.write_text("mine")
    else:
        a_folder(into, **{"report" if "report" in kind else "thesis": '{"years": 4}'})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadRequest, match=f"{into} exists and is not an export; give a new or empty folder"):
        polyexport.export(nn.Linear(5, 3), torch.rand(4, 5), [GOOD], into, bench=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_file", [True, False])
def test_a_users_own_folder_named_best_stays(tmp_path, is_file):
    best = tmp_path / BEST
    if is_file:
        best.write_text("the best of times")
    else:
        a_folder(best, thesis="")
    assert not may_point_best(best)


def test_our_best_link_is_replaced_even_if_its_export_is_gone(tmp_path):
    for name in ("one", "two"):
        point_best(a_folder(tmp_path / name, report=REPORT))
        assert may_point_best(tmp_path / BEST)
    (tmp_path / "two").rename(tmp_path / "gone")
    assert may_point_best(tmp_path / BEST)
    (tmp_path / BEST).unlink()
    (tmp_path / BEST).symlink_to(a_folder(tmp_path / "theirs", thesis=""))
    assert not may_point_best(tmp_path / BEST)


def test_a_checkpoint_named_like_a_users_folder_is_exported_next_to_it(tmp_path):
    a_folder(tmp_path / "model", weights="")
    a_folder(tmp_path / BEST, thesis="")
    with Engine(timeout=30) as engine:
        first = engine.submit(request(tmp_path, name="model")).result()
        second = engine.submit(request(tmp_path, name="model")).result()
    assert (first.folder, second.folder) == (tmp_path / "model-2",) * 2
    assert sorted(os.listdir(tmp_path)) == [BEST, "model", "model-2"]
    assert os.listdir(tmp_path / "model") == ["weights.json"]
    notes = Report.load(tmp_path / "model-2").notes
    assert [note.text.split(" ", 1)[1].split(",")[0] for note in notes] == [
        "is not an export and is left alone",
        "does not point to an export and is left alone",
    ]


@pytest.mark.usefixtures("own_servers")
def test_a_folder_may_have_letters_that_the_locale_lacks_and_bytes_that_are_no_text(tmp_path, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)  # for workers
    folder = tmp_path / os.fsdecode("größe-".encode() + b"\xe9")
    report = polyexport.export(nn.Linear(2, 1), torch.rand(3, 2), ["torchscript"], folder, bench=False)
    assert [outcome.state for outcome in report.outcomes] == ["verified"]
    assert Report.load(folder).outcomes == report.outcomes


def test_a_folder_that_this_locale_cannot_write_is_refused():
    with pytest.raises(BadRequest, match="lacks; set PYTHONUTF8=1 or LC_ALL=C"):
        check_name("exports-\ud800")
