"""Sessions of pytest that share the tests of a folder: each test runs once, and slow fixtures are made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sharing

CONFTEST = """
import pytest
from sharing import pytest_addoption, pytest_configure

@pytest.fixture(scope="session")
def exported():
    print("[made]")
"""


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    """A folder with tests in three files, two of which use what is dear."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    for name, arguments in (("a", ""), ("b", "exported"), ("c", "exported")):
        (folder / f"test_{name}.py").write_text(f"def test_{name}({arguments}): print('[{name}]')\n")
    (tmp_path / "shared").mkdir()
    return folder


def ran(tests: Path) -> list[str]:
    """What a session says that shares the tests with others, in its order."""
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        [*words, "--share", str(tests.parent / "shared")],
        cwd=tests,
        env={"PYTHONPATH": str(Path(sharing.__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.strip(".") for line in done.stdout.splitlines() if line.startswith(("[", ".["))]


def test_tests_that_share_a_slow_fixture_stay_together_and_come_first(tests: Path) -> None:
    assert ran(tests) == ["[made]", "[b]", "[c]", "[a]"]
    assert sorted(path.name for path in (tests.parent / "shared").iterdir()) == ["exported", "test_a.py"]


def test_what_another_session_has_begun_is_left_to_it(tests: Path) -> None:
    (tests.parent / "shared" / "exported").mkdir()
    assert ran(tests) == ["[a]"]
