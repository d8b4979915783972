"""Real Lightning packages, each in an environment of its own: fitted with the callback, and exported. `make test-real`.

A package is a file beside this one: what it needs, which states are right, and a few steps of training.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path

import pytest

import environments
from outcome_table import OUTCOMES, cell, page, record, recorded, write
from polyexport.errors import ToolMissing
from polyexport.report.report import Report
from real.training import FORMATS

TESTS = Path(__file__).parents[1]
RECORD = OUTCOMES / "real.jsonl"
PACKAGES = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in ("packages", "training"))


@pytest.fixture(scope="session", autouse=True)
def written():
    """The page, once all have run; it is written where `POLYEXPORT_PAGE` names one."""
    yield
    if path := os.environ.get("POLYEXPORT_PAGE"):
        about = (
            "Written by `make test-real`: models of real Lightning packages, each trained for a few steps with the "
            "callback in an environment of its own, and exported from its best checkpoint."
        )
        cells = recorded(RECORD)
        Path(path).write_text(page("Real packages", about, cells, PACKAGES, FORMATS), encoding="utf-8")
        write(RECORD, cells)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_comes_out_as_it_should(name, tmp_path):
    package = importlib.import_module(f"real.{name}")
    try:
        python = environments.interpreter(f"real-{name.replace('_', '-')}", *package.REQUIREMENTS)
    except ToolMissing as error:
        pytest.skip(f"{name} cannot be installed: {error}")
    path = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'support'}"}
    # -P: the working folder is no place to find packages
    command = [str(python), "-P", "-m", f"real.{name}", str(tmp_path)]
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = Report.load(tmp_path / "exports" / "best")
    record(RECORD, name, {each.format: cell(each.state, each.reason, each.route) for each in report.outcomes})
    found = {each.format: each.state for each in report.outcomes}
    assert found == package.STATES, "\n".join(f"{each.format}: {each.reason}" for each in report.outcomes)
