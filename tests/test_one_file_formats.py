"""ExecuTorch and MNN, which are also the proof that a format is one file and one requirement file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import polyexport
import zoo

NAMES = ("executorch", "mnn")


@pytest.mark.slow  # its environment is a large one
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_verified_at_every_batch_size(name: str, tmp_path: Path) -> None:
    module, inputs = zoo.build("dict_output")
    report = polyexport.export(module, inputs, [name], tmp_path / "export", bench=False)
    (outcome,) = report.outcomes
    assert outcome.state == "verified", outcome.reason
    assert {sizes["batch"] for sizes in outcome.parity.batches} == {1, 3, zoo.BATCH}


@pytest.mark.parametrize("name", NAMES)
def test_no_other_file_of_the_library_knows_of_it(name: str) -> None:
    package = Path(polyexport.__file__).parent
    found = subprocess.run(["grep", "-rliw", "--include=*.py", "--include=*.txt", name, str(package)],
                           capture_output=True, text=True, check=True)  # fmt: skip  # one command
    files = {Path(line).relative_to(package).as_posix() for line in found.stdout.split()}
    assert files == {f"formats/{name}.py", f"toolchains/{name}.txt"}
