"""The same checkpoint gives the same bytes: each format's conversion, run again in a process of its own.

That is forked, as an engine's workers are.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from zipfile import ZipFile

import pytest

from every_format import Everything
from isolated import Program, run_all
from polyexport import FORMATS, Outcome
from polyexport.formats.mnn import settle_id
from polyexport.formats.rknn import same
from polyexport.report.folders import DESCRIPTION
from polyexport.workers import toolchain
from polyexport.workers.toolchain import Toolchain

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


def converter(outcome: Outcome) -> Toolchain:
    """The toolchain of the route that was taken."""
    (route,) = (each for each in FORMATS[outcome.format].routes if each.name == outcome.route)
    return toolchain.find(route.toolchain)


@pytest.fixture(scope="module")
def again(everything: Everything, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Of each format why its conversion failed when it was run again, and the folder that it was told to write to."""
    programs = {}
    for outcome in everything.report.outcomes:
        folder = tmp_path_factory.mktemp("again")
        words = tuple(shlex.split(outcome.reproduce)[1:])
        words = words[words[0] == "-P" :]
        programs[outcome.format] = Program(converter(outcome), words, folder, {"TMPDIR": str(folder)})
    return {name: (why, programs[name].folder) for name, why in run_all(programs).items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_that_is_run_again_writes_the_same_bytes(
    name: str, everything: Everything, again: dict[str, tuple[str, Path]]
):
    outcome, (failed, folder) = everything.report[name], again[name]
    assert outcome.artifact, outcome.reason
    assert ".convert.json" in outcome.reproduce
    assert not failed
    (made,) = folder.glob("polyexport-*")
    first = everything.report.folder / name
    assert contents(made) == contents(first)
    assert all(same(file.read_bytes(), (first / file.name).read_bytes()) for file in made.glob("*.rknn"))


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
