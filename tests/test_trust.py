"""An export of somebody else runs no code of theirs: its pickles are loaded with `--trust` only."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import polyexport
from polyexport import BadRequest, Engine, Report, Request
from polyexport.cli import app
from polyexport.engine.request import interrupted, write
from polyexport.formats import known
from polyexport.report.folders import let_go, unfinished


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture
def theirs(small: Report, tmp_path: Path) -> Path:
    """A copy whose every pickle leaves the file `ran`."""
    folder = tmp_path / "theirs"
    shutil.copytree(small.folder, folder)
    pickled = io.BytesIO()
    torch.save((Touch(tmp_path / "ran"),), pickled)
    for file in (folder / "source").glob("*.pkl"):
        file.unlink()  # it may be a link
        file.write_bytes(pickled.getvalue())
    program = folder / "pt2" / "model.pt2"
    with zipfile.ZipFile(small.folder / "pt2" / "model.pt2") as good:
        program.unlink()
        with zipfile.ZipFile(program, "w") as bad:
            for member in good.infolist():
                held = pickled.getvalue() if "sample_inputs" in member.filename else good.read(member)
                bad.writestr(member, held)
    return folder


def test_a_program_of_ours_holds_no_inputs(small: Report) -> None:
    """They are real rows, in a pickle that whoever loads it would run."""
    with zipfile.ZipFile(small.folder / "pt2" / "model.pt2") as program:
        (inputs,) = (member for member in program.infolist() if "sample_inputs" in member.filename)
    assert inputs.file_size == 0


def test_our_own_exports_are_verified_without_trust(small: Report) -> None:
    done = CliRunner().invoke(app, ["verify", str(small.folder), "--json"])
    assert [outcome["state"] for outcome in json.loads(done.stdout)["outcomes"]] == ["verified"] * 3


def test_a_pickle_in_an_artifact_runs_with_trust_only(theirs: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(theirs), "--json"])
    torchscript, pt2, onnx = json.loads(done.stdout)["outcomes"]
    assert not (tmp_path / "ran").exists()
    assert done.exit_code == 1
    assert pt2["state"] == "unverified"
    assert pt2["reason"].endswith("give --trust")
    assert (torchscript["state"], onnx["state"]) == ("verified", "verified")
    CliRunner().invoke(app, ["verify", str(theirs), "--trust"])
    assert (tmp_path / "ran").exists()


def test_the_module_of_an_export_is_timed_with_trust_only(theirs: Path, tmp_path: Path) -> None:
    with Engine() as engine:
        timed = engine.sweep(Report.load(theirs), trust=False, most=1)
        assert {name for name, _ in timed} == {"torchscript", "onnx"}
        assert not (tmp_path / "ran").exists()
        engine.sweep(Report.load(theirs), most=1)
    assert (tmp_path / "ran").exists()


def test_an_artifact_that_is_run_unpickles_nothing(theirs: Path, tmp_path: Path) -> None:
    shutil.copy(theirs / "validation_batch.npz", tmp_path / "batch.npz")
    done = CliRunner().invoke(app, ["run", str(theirs / "pt2"), "--inputs", str(tmp_path / "batch.npz")])
    assert done.exit_code == 1
    assert "give --trust" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("words", [("verify", "X"), ("run", "X/onnx", "--inputs", "X/validation_batch.npz")])
@pytest.mark.parametrize("link", ["logs/onnx.log", "source/jobs", "source/jobs/.onnx.again.json.tmp"])
def test_links_that_lead_out_of_an_export_are_not_written_to(
    small: Report, tmp_path: Path, link: str, words: tuple[str, ...]
) -> None:
    folder, outside = tmp_path / "X", tmp_path / "outside"
    shutil.copytree(small.folder, folder)
    outside.mkdir()
    (outside / "mine").write_text("mine")
    place = folder / link
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to(outside if link == "source/jobs" else outside / "mine")
    done = CliRunner().invoke(app, [word.replace("X", str(folder)) for word in words])
    assert done.exit_code == 2
    assert f"'{link}' is outside of the export" in done.stderr
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine": "mine"}


@pytest.mark.parametrize("linked", ["onnx/model.onnx", "onnx"])
def test_an_artifact_that_is_a_link_out_of_its_export_is_not_loaded(small: Report, tmp_path: Path, linked: str) -> None:
    """The link may name any file of the user's, which a runtime would run and a kit copy."""
    folder, outside = tmp_path / "X", tmp_path / "outside"
    shutil.copytree(small.folder, folder)
    shutil.copytree(small.folder, outside)
    place = folder / linked
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(outside / linked)
    for path in (folder / "onnx", folder / "onnx" / "model.onnx"):
        for given in (path, f"file://{path}"):
            with pytest.raises(BadRequest, match=rf"{place} is a link that leads out of {folder}"):
                polyexport.load(given)
    for words in (["run", "X", "--inputs", "X/../validation_batch.npz"], ["kit", "X"]):
        words = [word.replace("X", str(folder / "onnx")) for word in words]
        assert CliRunner().invoke(app, words).exit_code == 2


def test_links_of_the_users_own_are_followed(small: Report, tmp_path: Path) -> None:
    """To a format's folder, within an export, and in the cache of Hugging Face's hub."""
    hub = tmp_path / "models--me--digits"
    model = hub / "snapshots" / "0123abc" / "mine" / "onnx" / "model.onnx"
    shutil.copytree(small.folder, model.parents[1])
    for target in (model.parents[1] / "logs" / "shared.onnx", hub / "blobs" / "f0"):
        target.parent.mkdir(exist_ok=True)
        model.rename(target)
        model.symlink_to(target)
        assert polyexport.load(model)({"input": torch.rand(4, 4).numpy()}).keys() == {"output_0"}
        model.unlink()
        target.rename(model)
    (tmp_path / "app").symlink_to(model.parent)
    assert polyexport.load(tmp_path / "app")({"input": torch.rand(4, 4).numpy()}).keys() == {"output_0"}


def test_what_a_leftover_names_is_removed_only_if_it_is_our_link(tmp_path: Path) -> None:
    """A leftover in somebody else's folder may name any path; or be a link, which gets no lock."""
    (tmp_path / "mine").mkdir()
    for name in ("one", "two"):
        left = tmp_path / "theirs" / f".unfinished-{name}"
        (left / "source").mkdir(parents=True)
        (left / "source" / "elsewhere.txt").write_text(str(tmp_path / "mine"))
    (tmp_path / "theirs" / ".unfinished-link").symlink_to(tmp_path / "mine")
    done = CliRunner().invoke(app, ["resume", str(tmp_path / "theirs")])
    assert done.exit_code == 2
    assert list((tmp_path / "mine").iterdir()) == []
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == [".unfinished-link"]


def test_an_interrupted_export_of_somebody_else_is_resumed_with_trust_only(tmp_path: Path) -> None:
    """A copy is another's as far as anybody can tell: what is sealed is the place where it was begun."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    work = unfinished(ours)
    write(Request(work, "best", (known()["onnx"],)))
    let_go(work)
    shutil.copytree(ours, theirs)
    with pytest.raises(BadRequest, match="was not begun by you in that folder"):
        interrupted(theirs, trust=False)
    done = CliRunner().invoke(app, ["resume", str(theirs)])
    assert done.exit_code == 2
    assert "give --trust" in done.stderr
    assert interrupted(ours, trust=False).name == "best"
    assert interrupted(theirs, trust=True).name == "best"
