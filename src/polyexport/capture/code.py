"""Code in another process: what it can import, from where, and what cloudpickle has to pickle by value."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_ALONE = threading.RLock()  # registering a module with cloudpickle affects all threads


@contextlib.contextmanager
def by_value() -> Iterator[Callable[[str], None]]:
    """Yield a function that registers a module by name to be pickled by value, until the context exits."""
    import cloudpickle

    with _ALONE, contextlib.ExitStack() as stack:

        def take_along(name: str) -> None:
            home = sys.modules.get(name)
            if home is not None and name not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(home)
                stack.callback(cloudpickle.unregister_pickle_by_value, home)

        yield take_along


def importable(name: str) -> bool:
    """Whether a process with this one's import path can import a module by its name, as far as that is known.

    A module may be loaded here and not be importable there: if it was loaded from a path, as by test runners and
    plugins, or is named like an installed package, since the other process searches the script's folder after packages.
    """
    if _is_called_like_a_package(name.partition(".")[0]):
        return False
    if name == "__main__" or getattr(sys.modules.get(name), "__file__", None) is None:
        return True  # cloudpickle pickles `__main__` by value; a module without a file is part of an extension
    return _is_found(name, tuple(sys.path))


@functools.lru_cache(1024)  # each new best is pickled while training waits
def _is_found(name: str, path: tuple[str, ...]) -> bool:
    """Whether the finders of this process find a module; `path` is the import path that the answer belongs to."""
    search_path = None
    for depth in range(1, len(parts := name.split(".")) + 1):
        partial = ".".join(parts[:depth])
        looked = (finder.find_spec(partial, search_path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = next(filter(None, looked), None)
        if found is None:
            return False
        search_path = found.submodule_search_locations
    return True


def _is_called_like_a_package(name: str) -> bool:
    file, installed = getattr(sys.modules.get(name), "__file__", None), _installed(name)
    return bool(file and installed and installed != os.path.realpath(file))


@functools.cache
def _installed(name: str) -> str:
    """The file of a package or module of the standard library or of site-packages; empty if there is none."""
    folders = dict.fromkeys(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    found = PathFinder.find_spec(name, list(folders))
    return os.path.realpath(found.origin) if found and found.origin else ""


def libraries(module: nn.Module) -> tuple[str, ...]:
    """The installed Python modules, by name, that a worker imports to rebuild a module: those of its layers' classes.

    Code of the user's own is not among them, even where it is installed as an editable project.
    """
    names = {str(type(each).__module__) for each in module.modules()}
    return tuple(sorted(name for name in names if name.partition(".")[0] not in _PRESENT and _is_installed(name)))


_PRESENT = ("torch", "lightning", "pytorch_lightning")  # each worker that rebuilds a module has imported them


def _is_installed(name: str) -> bool:
    """Whether a loaded Python module is a file of site-packages."""
    file = getattr(sys.modules.get(name), "__file__", None)
    folders = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    return file is not None and not folders.isdisjoint(Path(file).parents)


def import_path() -> tuple[str, ...]:
    """This process's import path, as absolute paths, since a worker has another working folder."""
    finders = sys.path_importer_cache
    return tuple(getattr(finders.get(entry), "path", None) or os.path.abspath(entry) for entry in sys.path)


def script() -> str:
    """The file that this process runs, which no other process may import, since that would run it again.

    Empty if there is none, or if the program has imported it itself, so that others may too.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        return ""
    imported = [getattr(each, "__file__", None) for each in tuple(sys.modules.values()) if each is not main]
    return "" if file in imported else os.path.realpath(file)
