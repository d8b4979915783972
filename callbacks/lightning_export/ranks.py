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


def turn() -> str:
    """A name for what rank zero is to do next: all ranks run the same script, so they count alike."""
    return f"lightning_export/{next(_TURNS)}"


def _store(trainer: Any) -> Any | None:
    if trainer.world_size == 1 or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def tell(trainer: Any, name: str, message: str) -> None:
    """Rank zero is done with what is called `name`, and has this to say."""
    store = _store(trainer)
    if store is not None:
        store.set(name, message)


def hear(trainer: Any, name: str, *, pause_seconds: float = 0.2) -> str:
    """Wait until rank zero is done with what is called `name`; returns what it said.

    Raises:
        RuntimeError: rank zero is gone.
    """
    store = _store(trainer)
    if store is None:
        return ""
    while not store.check([name]):  # not `store.wait`, which no Ctrl-C can end
        time.sleep(pause_seconds)
    return str(store.get(name).decode())
