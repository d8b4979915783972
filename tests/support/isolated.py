"""Scripts in an isolated toolchain, which has our package and the tests' modules by their files only."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polyexport
from polyexport.workers import toolchain

HERE = Path(__file__).parent
PACKAGE = Path(polyexport.__file__).parent
AS_PACKAGE = f"""
import sys, types
module = types.ModuleType("polyexport"); module.__path__ = [{str(PACKAGE)!r}]; sys.modules["polyexport"] = module
sys.path.insert(0, {str(HERE)!r})
"""
"""How a script in an isolated toolchain begins, which has our package and the tests' modules by their files only."""


def in_toolchain(name: str, *words: str) -> str:
    """Run a script in a toolchain, as a worker is run there; returns what it prints (see `bare`)."""
    python = toolchain.find(name).interpreter()
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [str(python), "-P", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def many(toolchain: str, kind: str, formats: Sequence[str], roots: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same job for many formats of many exports; see `many_exports`."""
    words = ("many_exports.py", str(PACKAGE), kind, ",".join(formats), *roots)
    found: dict[str, dict[str, Any]] = json.loads(in_toolchain(toolchain, *words))
    return found
