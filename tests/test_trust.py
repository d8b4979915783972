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
