"""Toolchains: the pinned packages that a route needs, and an interpreter that has them.

A toolchain is a requirement file in `toolchains/`, with a lock file next to it. If the training environment satisfies
the requirements, it is used. If not, uv makes an environment under the user's cache folder, once per set of pins, with
the locked packages (see `polyexport.workers.locks`). The training environment is never changed.

Seven directives may be in the file's comments:

    # polyexport: layered              on top of the training environment's packages, so that torch is the same
    # polyexport: without a b          packages that others require and no route imports
    # polyexport: python >=3.11,<3.13  the interpreter it needs, if that differs from the training environment's
    # polyexport: npm                  npm packages too, by toolchains/NAME/package-lock.json
    # polyexport: delete a/b *.map     what no route reads of its packages, such as C++ headers: paths in site-packages
                                       or node_modules, where * matches any characters, / too
    # polyexport: convert-imports a b? modules that its conversions import, for a server to import (see
                                       `polyexport.workers.server`); with ? only if this process has imported it,
                                       after a + while the first conversions run, and for @c those of the file c.txt
    # polyexport: run-imports a        the same for its runtime, and nothing else, since its memory is measured
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from packaging.requirements import Requirement
from platformdirs import user_cache_path

from polyexport.versions import versions
from polyexport.workers import disk, locks, provision
from polyexport.workers.process import Workers
from polyexport.workers.server import LATER

_WORKER = Path(__file__).parents[1] / "worker.py"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A named set of pins.

    Attributes:
        name: The requirement file's name without its extension.
        requirements: PEP 508 requirements.
        layered: Whether its environment has the training environment's packages below its own.
        python: A PEP 440 specifier of the interpreter, or None for the training environment's.
        npm: Content of the npm lock file, empty if no npm packages are needed.
        without: Packages that are left out, or installed as `requirements` say, whatever others require of them.
        delete: Patterns, as `fnmatch` reads them, of files and folders that are deleted after the installation, as
            paths in `site-packages` or `node_modules`.
        lock: All of its packages with versions; None if versions are resolved at installation.
        convert_imports: Modules that a server imports before it forks for a conversion; those with `?` at the end only
            if this process has imported them, and those after `+` while the first conversions run.
        run_imports: The same for running an artifact.
    """

    name: str
    requirements: tuple[str, ...]
    layered: bool = False
    python: str | None = None
    npm: str = ""
    without: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    lock: locks.Lock | None = None
    convert_imports: tuple[str, ...] = ()
    run_imports: tuple[str, ...] = ()

    def unmet(self) -> tuple[str, ...]:
        """The requirements that the training environment does not satisfy."""
        return tuple(line for line in self.requirements if not _satisfied(line))

    @property
    def in_host(self) -> bool:
        """Whether the training environment satisfies the requirements."""
        return not self.npm and not self.unmet()

    @property
    def folder(self) -> Path:
        """Path of its own environment, made or not; the name changes with every pin."""
        below = [sys.prefix, *versions(("torch",)).values(), *self.provided.items()] if self.layered else []
        tree = [] if self.lock is None else [self.lock.text]
        pins = "\n".join(map(str, [sys.version, self.python, *self.requirements, *below, self.npm, *tree]))
        return cache_folder() / f"{self.name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"

    @property
    def overrides(self) -> str:
        """Overrides for uv: a layered environment installs no torch, and `without` is left out."""
        return locks.overrides(self.requirements, self.without) + (locks.left_out("torch") if self.layered else "")

    @property
    def provided(self) -> Mapping[str, str]:
        """Name and version of the locked packages that the training environment provides."""
        return locks.provided(self.lock) if self.lock is not None and self.layered else {}

    @property
    def room_bytes(self) -> int:
        """Disk space that its environment will take at most; 0 if it exists already, or the size is unknown."""
        return 0 if self.ready or self.lock is None else self.lock.bytes

    @property
    def ready(self) -> bool:
        """Whether its interpreter exists already; `interpreter` also checks its packages."""
        return self.in_host or provision.exists(self.folder)

    def interpreter(
        self,
        say: provision.Say = lambda line: None,
        workers: Workers | None = None,
        *,
        patience: float = provision.PATIENCE_SECONDS,
    ) -> Path:
        """The Python that satisfies the pins, installed now if there is none yet; `workers` can end the installer.

        Safe to call from several processes at once, and after an interrupted call: the environment counts only once its
        marker is written, under a lock, which this waits for at most `patience` seconds. A damaged one is made again.

        Raises:
            Busy: another process is still installing it.
            ToolMissing: it cannot be installed; the message has the installer's output.
        """
        if self.in_host:
            return Path(sys.executable)
        return provision.interpreter(self.recipe, say, workers or Workers(), patience)

    @property
    def recipe(self) -> provision.Recipe:
        """What its own environment is made of."""
        imports = {*self.imports(converts=True), *self.imports(converts=False)} - {LATER}
        return provision.Recipe(
            name=self.name,
            folder=self.folder,
            requirements=self.requirements,
            overrides=self.overrides,
            lock=self.lock,
            provided=self.provided,
            python=self.python or sys.executable,
            layered=self.layered,
            npm=_file(self.name).with_suffix("") if self.npm else None,
            delete=self.delete,
            imports=tuple(sorted(imports)),
        )

    def imports(self, *, converts: bool) -> tuple[str, ...]:
        """The modules that a server imports for conversions, or for running artifacts."""
        listed = self.convert_imports if converts else self.run_imports
        return tuple(name.rstrip("?") for name in listed if not name.endswith("?") or name.rstrip("?") in sys.modules)

    def command(self, workers: Workers | None = None) -> tuple[str, ...]:
        """The command that starts a worker in it; a job file is to be appended.

        Raises:
            ToolMissing: see `interpreter`.
        """
        if self.in_host:
            # -P, so that files in the working folder do not shadow packages
            return (sys.executable, "-P", "-m", "polyexport.worker")
        # by path, so that nothing of the training environment is importable; -P keeps this folder off sys.path
        return (str(self.interpreter(workers=workers)), "-P", str(_WORKER))


def find(toolchain: str | Toolchain) -> Toolchain:
    """The toolchain of a requirement file by name; a `Toolchain` is returned as it is.

    Raises:
        KeyError: there is no such file; a bug in a format.
    """
    if isinstance(toolchain, Toolchain):
        return toolchain
    return HOST if toolchain == HOST.name else _of_file(toolchain)


def names() -> tuple[str, ...]:
    """Every toolchain that has a requirement file, in alphabetical order."""
    files = (resources.files("polyexport") / "toolchains").iterdir()
    return tuple(sorted(Path(file.name).stem for file in files if file.name.endswith(".txt")))


@cache
def _of_file(name: str) -> Toolchain:
    file = _file(name)
    if not file.is_file():
        raise KeyError(f"no toolchain {name!r}: {file} is missing")
    toolchain = parse(name, file.read_text(encoding="utf-8"))
    npm = (_file(name).with_suffix("") / provision.NPM_LOCK).read_text(encoding="utf-8") if toolchain.npm else ""
    locked = lock_file(name)
    return replace(toolchain, npm=npm, lock=locks.read(locked.read_text("utf-8")) if locked.is_file() else None)


def _file(name: str) -> Path:
    return Path(str(resources.files("polyexport"))) / "toolchains" / f"{name}.txt"


def lock_file(name: str) -> Path:
    """Path of the lock file of a built-in toolchain."""
    return _file(name).with_suffix(".lock")


def parse(name: str, text: str) -> Toolchain:
    """Read a requirement file: one requirement per line, `#` comments, and directives."""
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    directives = [match.group(1).strip() for line in lines if (match := re.match(r"#\s*polyexport:(.*)", line))]
    python = next((each.removeprefix("python").strip() for each in directives if each.startswith("python")), None)
    pins = tuple(line for line in lines if line and not line.startswith("#"))
    npm = "npm" if "npm" in directives else ""
    return Toolchain(
        name,
        pins,
        layered="layered" in directives,
        python=python,
        npm=npm,
        without=_listed("without", directives),
        delete=_listed("delete", directives),
        convert_imports=_imports("convert-imports", directives),
        run_imports=_imports("run-imports", directives),
    )


def _listed(what: str, directives: Sequence[str]) -> tuple[str, ...]:
    """The arguments of the directive `what`."""
    return tuple(word for line in directives if line.split()[0] == what for word in line.split()[1:])


def _imports(what: str, directives: Sequence[str]) -> tuple[str, ...]:
    """The modules that the directive `what` names, with those of other files in place of these."""
    words = _listed(what, directives)
    return tuple(name for word in words for name in (_imports_of(what, word[1:]) if word[0] == "@" else (word,)))


def _imports_of(what: str, other: str) -> tuple[str, ...]:
    """The modules that the directive `what` of another requirement file names."""
    toolchain = parse(other, _file(other).read_text(encoding="utf-8"))
    return toolchain.convert_imports if what == "convert-imports" else toolchain.run_imports


_TRACING = _imports_of("convert-imports", "torch")

HOST = Toolchain("host", (), convert_imports=_TRACING, run_imports=_TRACING)
"""The toolchain that is the training environment itself, whose server imports what tracing in PyTorch needs."""


def environments() -> tuple[disk.Environment, ...]:
    """The environments in the cache folder, including those of other pins and training environments."""
    return tuple(disk.environments(cache_folder(), provision.COMPLETE))


def cache_folder() -> Path:
    """The folder of environments: `$POLYEXPORT_CACHE`, or the user's cache folder."""
    given = os.environ.get("POLYEXPORT_CACHE")
    return Path(given) if given else user_cache_path("polyexport") / "toolchains"


def _satisfied(line: str) -> bool:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
