"""Code in another process: what it can import, from where, and what cloudpickle takes along by value instead."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

_ALONE = threading.RLock()  # what cloudpickle is told of a module holds for all threads


@contextlib.contextmanager
def by_value() -> Iterator[Callable[[str], None]]:
    """Give a function that names a module whose classes and functions are taken along, until this is left."""
    import cloudpickle

    with _ALONE, contextlib.ExitStack() as stack:

        def take_along(name: str) -> None:
            home = sys.modules.get(name)
            if home is not None and name not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(home)
                stack.callback(cloudpickle.unregister_pickle_by_value, home)

        yield take_along


def importable(name: str) -> bool:
    """Whether a process with this one's import path finds a module by its name, as far as that can be known.

    It may be here and not be found: one that was loaded by its file's name, as test runners and plugins are.
    """
    if name == "__main__" or getattr(sys.modules.get(name), "__file__", None) is None:
        return True  # cloudpickle takes that along by itself; what is read from no file is a part of an extension
    places = None
    for depth in range(1, len(parts := name.split(".")) + 1):
        partial = ".".join(parts[:depth])
        looked = (finder.find_spec(partial, places) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = next(filter(None, looked), None)
        if found is None:
            return False
        places = found.submodule_search_locations
    return True


def import_path() -> tuple[str, ...]:
    """Where this process finds modules, as whole paths; a program may have gone elsewhere since it named a folder."""
    finders = sys.path_importer_cache
    return tuple(getattr(finders.get(entry), "path", None) or os.path.abspath(entry) for entry in sys.path)
