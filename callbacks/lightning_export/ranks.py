"""Distributed training: rank zero exports, and the other ranks wait for it outside of any collective.

A collective fails after the process group's timeout, which an export may exceed; and if `fit` ended without waiting,
the next collective of the script (in `trainer.test`, for example) would. So the ranks talk through the store of the
process group's rendezvous.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from torch import distributed

_TURNS = itertools.count(1)
_PAUSE_SECONDS, _PATIENCE_SECONDS = 0.2, 30.0


def turn() -> str:
    """A name for rank zero's next task, the same on all ranks, since they run the same script."""
    return f"lightning_export/{next(_TURNS)}"


def _store(trainer: Any) -> Any | None:
    if trainer.world_size == 1 or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def tell(trainer: Any, name: str, message: str) -> None:
    """Announce that rank zero has finished the task `name`, with a message.

    Returns when all ranks have read it, since the store may live in this process; waits only briefly for a dead rank.
    """
    store = _store(trainer)
    if store is None:
        return
    store.set(name, message)
    end = time.monotonic() + _PATIENCE_SECONDS
    while store.add(_heard(name), 0) < trainer.world_size - 1 and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)


def hear(trainer: Any, name: str) -> str:
    """Wait until rank zero has finished the task `name`; returns its message.

    Raises:
        RuntimeError: rank zero is gone.
    """
    store = _store(trainer)
    if store is None:
        return ""
    while not store.check([name]):  # not `store.wait`, which Ctrl-C cannot interrupt
        time.sleep(_PAUSE_SECONDS)
    message = str(store.get(name).decode())
    store.add(_heard(name), 1)
    return message


def _heard(name: str) -> str:
    return f"{name}/heard"
