"""AOTInductor's package: compiled here with a dynamic batch, or the reason why not. `test_formats.py` tests parity."""

from __future__ import annotations

import re
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from typer.testing import CliRunner

import polyexport
from polyexport import FORMATS, ExportSpec, Report
from polyexport.cli import app
from polyexport.errors import ToolMissing
from polyexport.formats import aoti

pytestmark = pytest.mark.skipif(bool(aoti.lacks()), reason=aoti.lacks())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    into = tmp_path_factory.mktemp("aoti") / "out"
    return polyexport.export(module, torch.rand(4, 6), ["aoti"], into, bench=False, metadata={"license": "MIT"})


def test_its_batch_stays_dynamic(compiled: Report) -> None:
    outcome = compiled["aoti"]
    assert (outcome.state, outcome.reason) == ("verified", "")
    assert [sizes["batch"] for sizes in outcome.parity.batches] == [4, 1, 3]


def test_the_report_says_what_it_was_compiled_for(compiled: Report) -> None:
    assert re.match(r"compiled for \w+ on \w+, .*CPUs?\b.*, by .* and PyTorch 2", compiled["aoti"].remark)


def test_it_holds_the_metadata_and_no_path_of_this_machine(compiled: Report) -> None:
    path = compiled.folder / "aoti" / "model.pt2"
    metadata = torch._inductor.aoti_load_package(str(path)).get_metadata()
    assert metadata["license"] == "MIT"
    assert metadata["checkpoint_sha256"] == compiled.checkpoint.sha256
    with ZipFile(path) as archive:
        content = b"".join(map(archive.read, archive.namelist()))
    assert b"/tmp" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_older_versions_of_pytorch_find_its_metadata_by_the_name_of_the_source(compiled: Report) -> None:
    with ZipFile(compiled.folder / "aoti" / "model.pt2") as archive:
        sizes = {each.filename: each.file_size for each in archive.infolist()}
    (metadata,) = (name for name in sizes if name.endswith("wrapper_metadata.json"))
    assert sizes[metadata.replace("_metadata.json", ".cpp")] == 0


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolMissing, match=r"no-such-compiler is not on PATH \(.*install.*; or set CXX to another\)"):
        aoti.convert(tmp_path / "model.pt2", tmp_path / "out.pt2", ExportSpec((), ()))
    doctor = CliRunner().invoke(app, ["doctor", "aoti"])
    assert doctor.exit_code == 1
    assert "no-such-compiler is not on" in " ".join(doctor.stdout.split())
    assert FORMATS["aoti"].lacks().startswith("it needs a C++ compiler")
