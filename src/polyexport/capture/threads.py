"""Runs what forward submits to a pool of threads in its own thread.

A trace, inference mode and whatever watches PyTorch's functions belong to one thread: what others compute would be a
constant in a trace, and a branch that they take unseen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def in_one_thread() -> Iterator[None]:
    """Make `ThreadPoolExecutor.submit`, which its `map` calls too, run the function at once, in this thread only."""
    kind: Any = ThreadPoolExecutor
    here, submit = threading.get_ident(), kind.submit

    def submitted(self: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:  # a module may be traced in the training process
            return submit(self, function, *args, **kwargs)
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # which `result` raises
            future.set_exception(error)
        return future

    kind.submit = submitted
    try:
        yield
    finally:
        kind.submit = submit
