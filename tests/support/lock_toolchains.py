"""Resolves toolchains anew and writes their lock files, with what they take on the disk: `make lock`, or names of some.

Each is installed once, since only its packages tell what they ask of each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from polyexport.workers import disk, installer, locks, provision, toolchain
from polyexport.workers.process import Workers
from polyexport.workers.toolchain import Toolchain

ALLOWED = SpecifierSet(">=3.11")  # as in pyproject.toml

NEEDS = """
import sys
from importlib import metadata
from packaging.requirements import Requirement
for line in (line for found in metadata.distributions(path=sys.argv[1:]) for line in found.requires or ()):
    needed = Requirement(line)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        print(f"{needed.name}{needed.specifier}")
"""


def resolved(chain: Toolchain, folder: Path) -> str:
    """The lock of a toolchain, without what is measured: neither where it was made nor a registry stands in it."""
    asked, unheard, pins = folder / "asked.txt", folder / "overrides.txt", folder / "pins.txt"
    asked.write_text("\n".join([*chain.requirements, *locks.ALWAYS]), encoding="utf-8")
    unheard.write_text(chain.overrides, encoding="utf-8")
    lowest = min(each.version for each in SpecifierSet(chain.python or "") & ALLOWED if each.operator == ">=")
    plain = ("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links")
    command = [installer.uv(), "pip", "compile", "--quiet", "--universal", "--generate-hashes", *plain]
    command += ["--python-version", lowest, "--overrides", str(unheard), str(asked), "--output-file", str(pins)]
    subprocess.run(command, check=True, env={**os.environ, **installer.pip_indexes()})
    return pins.read_text(encoding="utf-8")


def measured(chain: Toolchain, lock: locks.Lock, folder: Path) -> locks.Lock:
    """The lock with the disk that its environment takes, and what the packages in that ask of each other."""
    bare = replace(chain, lock=lock, delete=(), convert_imports=(), run_imports=())  # all that it ever takes
    provision.provision(replace(bare.recipe, folder=folder), Workers(), print)
    packages = next(folder.glob("lib/python*/site-packages"))
    listed = subprocess.run([sys.executable, "-c", NEEDS, packages], check=True, capture_output=True, text=True).stdout
    below = ("torch",) if chain.layered else ()
    needs = {name: SpecifierSet() for name in (*(pin.name for pin in lock.packages), *below)}
    asked = [
        each for each in map(Requirement, listed.splitlines()) if canonicalize_name(each.name) not in chain.without
    ]
    for needed in [*map(Requirement, chain.requirements), *asked]:
        name = canonicalize_name(needed.name)
        if name in needs and (needed.marker is None or needed.marker.evaluate()):
            needs[name] &= needed.specifier
    listed_needs = tuple(sorted((name, str(need)) for name, need in needs.items()))
    bytecode = sum(file.stat().st_size for file in packages.rglob("*.py"))  # is about as large as its source
    return replace(lock, bytes=disk.size_bytes(folder) + bytecode, needs=listed_needs)


def main() -> None:
    """Write the lock of each toolchain that is named, or of all."""
    for name in sys.argv[1:] or toolchain.names():
        chain = replace(toolchain.find(name), lock=None)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["POLYEXPORT_CACHE"] = folder
            # as it is in an environment that has torch and nothing else of it
            lock = measured(chain, locks.Lock(resolved(chain, Path(folder))), Path(folder, "environment"))
        toolchain.lock_file(name).write_text(locks.write(lock), encoding="utf-8")
        print(f"{name}: {len(lock.packages)} packages, {disk.gigabytes(lock.bytes)}", flush=True)


if __name__ == "__main__":
    main()
