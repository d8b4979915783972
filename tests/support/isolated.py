"""Scripts in an isolated toolchain, which has our package and the tests' modules by their files only."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polyexport
from polyexport.workers import toolchain
from polyexport.workers.server import LATER
from polyexport.workers.toolchain import Toolchain

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


@dataclass(frozen=True)
class Program:
    """`python WORDS` of a toolchain, in a folder; what it prints is in the file `printed` there.

    Attributes:
        environment: Additions to the environment.
    """

    chain: Toolchain
    words: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def run_all(programs: Mapping[str, Program]) -> dict[str, str]:
    """Run named programs; each toolchain imports once what they need. Why each failed, or an empty string."""
    found = {}
    for chain in dict.fromkeys(each.chain for each in programs.values()):
        alike = {name: each for name, each in programs.items() if each.chain == chain}
        told = json.dumps([(each.words, str(each.folder), dict(each.environment)) for each in alike.values()])
        command = [str(chain.interpreter()), "-P", str(HERE / "many_programs.py")]
        imports = ",".join(name for name in chain.imports(converts=True) if name != LATER)
        done = subprocess.run([*command, imports], input=told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        for (name, each), code in zip(alike.items(), json.loads(done.stdout.splitlines()[-1]), strict=True):
            found[name] = f"{code}: {(each.folder / 'printed').read_text()[-3000:]}" if code else ""
    return found


def many(toolchain: str, kind: str, formats: Sequence[str], roots: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same job for many formats of many exports; see `many_exports`."""
    words = ("many_exports.py", str(PACKAGE), kind, ",".join(formats), *roots)
    found: dict[str, dict[str, Any]] = json.loads(in_toolchain(toolchain, *words))
    return found
