"""Another user of this machine, for folders that are not ours."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may write to, as /tmp; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """In this context the process may do to files what another user may; skips the test without root's rights."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
