"""Whatever goes wrong during an export, training ends as it does without it, and the report is right.

The faults, and what is expected of each, are the table in `faults.py`.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from faults import FAULTS, MARK, SHADOWS, Matrix, Seen, table, unfinished_in, workers_of


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What becomes of each fault that was asked for, two at a time."""
    made = Matrix(tmp_path_factory.mktemp("faults"))
    asked = [
        item.callspec.params["fault"]
        for item in request.session.items
        if hasattr(item, "callspec") and item.fspath == request.path
    ]
    with ThreadPoolExecutor(2) as pool:
        futures = {each.name: pool.submit(made.seen, each) for each in asked if not each.cannot()}
        yield lambda fault: futures[fault.name].result()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.name)
def test_a_fault_does_not_disturb_training_and_its_state_is_right(matrix, fault):
    if why := fault.cannot():
        pytest.skip(why)
    seen: Seen = matrix(fault)
    assert seen.identical, seen.log
    assert set(seen.exit_codes) == {seen.reference_exit_code}, seen.log
    assert seen.state == fault.state, seen.log
    assert [Path(each).name.split("-")[0] for each in seen.left] == [".unfinished"] * fault.resumable
    if seen.states:
        assert seen.states["faulty"][1].startswith(fault.reason)
        assert bool(seen.states["faulty"][1]) == bool(fault.reason)
        assert seen.states["good"][0] == fault.good
        assert set(map(str, seen.told)) == {str(dict(seen.states))}, "what fit tells is what lies on disk"


@pytest.mark.parametrize("fault", SHADOWS.values(), ids=lambda fault: fault.name)
def test_a_disturbed_training_would_be_noticed(matrix, fault):
    seen: Seen = matrix(fault)
    assert seen.identical == (fault.name != "a callback draws")
    assert (set(seen.exit_codes) == {seen.reference_exit_code}) == (fault.name != "fit fails")


def test_a_folder_that_is_left_behind_would_be_noticed(tmp_path):
    (tmp_path / "exports" / ".unfinished-1").mkdir(parents=True)
    assert unfinished_in(tmp_path) == (str(tmp_path / "exports" / ".unfinished-1"),)


def test_a_process_that_is_left_behind_would_be_noticed(tmp_path):
    (tmp_path / "run0").mkdir()
    for given in ({"env": {MARK: str(tmp_path)}}, {"cwd": tmp_path / "run0"}):
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, **given)
        try:
            assert len(workers_of(tmp_path)) == 1
        finally:
            orphan.kill()
            orphan.communicate()
        assert workers_of(tmp_path) == ()


def test_the_table_has_a_row_for_each_fault_and_says_what_was_seen():
    harmed = Seen({"faulty": ["failed", "because"], "good": ["verified", ""]}, (None,), False, (1,), 0, ("x",), "")
    rows = table(dict.fromkeys(FAULTS, harmed)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in FAULTS]
    assert all(row.endswith("`failed` | because | verified | NO | 1 (without: 0) | 1 |") for row in rows)
