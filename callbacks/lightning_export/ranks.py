"""Several processes that train together: rank zero exports, and the others wait for it outside of any collective.

A collective gives up after the process group's timeout, which an export may exceed; and when `fit` ends without
waiting, the next collective of the script (`trainer.test`, say) does. So the ranks talk through the store by which they
found each other.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from torch import distributed

_TURNS = itertools.count(1)
_PAUSE_SECONDS, _PATIENCE_SECONDS = 0.2, 30.0


def turn() -> str:
    """A name for what rank zero is to do next: all ranks run the same script, so they count alike."""
    return f"lightning_export/{next(_TURNS)}"


def _store(trainer: Any) -> Any | None:
    if trainer.world_size == 1 or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def tell(trainer: Any, name: str, message: str) -> None:
    """Rank zero is done with what is called `name`, and has this to say.

    It stays until all have heard it, for the store may live in this process; one that has died is not waited for long.
    """
    store = _store(trainer)
    if store is None:
        return
    store.set(name, message)
    end = time.monotonic() + _PATIENCE_SECONDS
    while store.add(_heard(name), 0) < trainer.world_size - 1 and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)


def hear(trainer: Any, name: str) -> str:
    """Wait until rank zero is done with what is called `name`; returns what it said.

    Raises:
        RuntimeError: rank zero is gone.
    """
    store = _store(trainer)
    if store is None:
        return ""
    while not store.check([name]):  # not `store.wait`, which no Ctrl-C can end
        time.sleep(_PAUSE_SECONDS)
    message = str(store.get(name).decode())
    store.add(_heard(name), 1)
    return message


def _heard(name: str) -> str:
    return f"{name}/heard"
