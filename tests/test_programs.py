"""Vendors' programs run where what they leave behind is removed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from polyexport.workers import programs

LEAVES = "from pathlib import Path; Path('left').touch(); Path('.hidden').touch(); print(Path.cwd())"


def test_what_a_program_leaves_where_it_runs_is_not_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = (programs.run([sys.executable, "-c", LEAVES]).stdout.strip() for _ in range(2))
    assert not [*tmp_path.iterdir()]
    assert one != other
    assert not Path(one).exists()


def test_a_program_runs_in_a_given_folder(tmp_path: Path) -> None:
    assert programs.run([sys.executable, "-c", LEAVES], tmp_path).returncode == 0
    assert (tmp_path / "left").exists()
