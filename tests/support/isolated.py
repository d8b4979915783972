"""Scripts in an isolated toolchain, which has our package and the tests' modules by their files only."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polyexport
from polyexport.workers import toolchain

HERE = Path(__file__).parent
PACKAGE = Path(polyexport.__file__).parent


def in_toolchain(name: str, *words: str) -> str:
    """Run a script in a toolchain, as a worker is run there; returns what it prints (see `bare`)."""
    python = toolchain.find(name).interpreter()
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [str(python), "-P", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def _answers(toolchain: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        printed = in_toolchain(toolchain, f"scripts/{toolchain}_programs.py", folder)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def answer(toolchain: str, program: str) -> Any:
    """What a function of `scripts/TOOLCHAIN_programs.py` returns there; all of them run at once (see `programs`)."""
    found = _answers(toolchain)[program]
    assert "error" not in found, found["error"]
    return found["answer"]


def many(toolchain: str, kind: str, formats: Sequence[str], roots: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same job for many formats of many exports; see `many_exports`."""
    words = ("many_exports.py", str(PACKAGE), kind, ",".join(formats), *roots)
    found: dict[str, dict[str, Any]] = json.loads(in_toolchain(toolchain, *words))
    return found
