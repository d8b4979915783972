"""The same checkpoint gives the same bytes: each format's conversion, run again in a process of its own."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from every_format import Everything
from polyexport import FORMATS
from polyexport.formats.mnn import settle_id
from polyexport.formats.rknn import same
from polyexport.report.folders import DESCRIPTION

NAMES = [each.name for each in FORMATS.values() if not each.uses_gpu and not each.lacks()]

_STACK = (".debug_pkl", "serialization_id")
"""Entries of a TorchScript file with Python's stack when it was traced, in which stands how the worker was started."""


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of what is in each file."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DESCRIPTION):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".torchscript":
            with ZipFile(file) as archive:
                kept = [each for each in archive.namelist() if not each.endswith(_STACK)]
                found |= {f"{name}/{each}": hashlib.sha256(archive.read(each)).hexdigest() for each in kept}
        elif file.suffix != ".rknn":  # which `rknn.same` compares
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_that_is_run_again_writes_the_same_bytes(name: str, everything: Everything, tmp_path: Path):
    outcome = everything.report[name]
    assert outcome.artifact, outcome.reason
    assert ".convert.json" in outcome.reproduce
    around = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(shlex.split(outcome.reproduce), capture_output=True, text=True, check=False, env=around)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = tmp_path.glob("polyexport-*")
    folder = everything.report.folder / name
    assert contents(made) == contents(folder)
    assert all(same(file.read_bytes(), (folder / file.name).read_bytes()) for file in made.glob("*.rknn"))


def test_an_id_that_was_drawn_becomes_one_of_the_content(tmp_path: Path):
    ids = (b"94959206-c849-4cf2-9758-618e0764364d", b"9ab38e7a-0fa8-4f8d-8ad3-22ea78a8c301")
    files = [tmp_path / "one", tmp_path / "other", tmp_path / "else"]
    for file, content in zip(files, (b"weights" + ids[0], b"weights" + ids[1], b"others!" + ids[0]), strict=True):
        file.write_bytes(content)
        settle_id(file)
    one, other, different = (file.read_bytes() for file in files)
    assert one == other
    assert len(one) == len(b"weights" + ids[0])
    assert one[7:] != different[7:]
