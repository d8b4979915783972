"""Several sessions of pytest that share the tests: each test is run by the one that comes to it first.

    pytest tests --share FOLDER     in each of them, with one new folder

What is written there: a folder for each part that a session has begun. A part is a file, or all files whose tests use
one of the fixtures that take minutes. Long parts come first, so that the sessions end at about the same time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TOGETHER = ("exported", "everything")
"""Session fixtures that take minutes: all tests that use one run in the same session."""

LONGEST = ("exported", "everything", "test_lowering.py", "test_examples.py", "test_faults.py", "test_distributed.py")
"""The parts that come first; the others follow in the order of their names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=Path, metavar="FOLDER", help="share the tests with others who give this folder")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.share is not None:
        config.pluginmanager.register(Share(config.option.share))


class Share:
    """Decides which of all tests this session runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[Path, str] = {}
        self._ours: dict[str, bool] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            together = [fixture for fixture in TOGETHER if fixture in getattr(item, "fixturenames", ())]
            part = self._parts.setdefault(item.path, item.path.name)
            self._parts[item.path] = together[0] if together else part
        items.sort(key=lambda item: self._rank(self._parts[item.path]))

    def _rank(self, part: str) -> tuple[int, str]:
        return (LONGEST.index(part) if part in LONGEST else len(LONGEST), part)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        part = self._parts[item.path]
        if part not in self._ours:
            self._ours[part] = self._begin(part)
        return None if self._ours[part] else True

    def _begin(self, part: str) -> bool:
        """Whether this session may run a part, since no other one has begun it."""
        try:
            (self._folder / part).mkdir()
        except FileExistsError:
            return False
        return True
