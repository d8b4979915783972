"""Runs what forward gives to other threads in its own thread.

A trace, inference mode and whatever watches PyTorch's functions belong to one thread: what others compute would be a
constant in a trace, and a branch that they take unseen.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any


@contextlib.contextmanager
def in_one_thread() -> Iterator[None]:
    """Make threads and pools of threads that this thread starts or asks run the function at once, and in this thread.

    Daemon threads are left alone: they may run for ever.
    """
    with contextlib.ExitStack() as replaced:
        for (kind, name), function in _REPLACED.items():
            replaced.enter_context(_replaced(kind, name, function))
        yield


@contextlib.contextmanager
def _replaced(kind: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Call `function` in place of a method, with that method as its first argument, if this thread calls it."""
    here, method, is_own = threading.get_ident(), getattr(kind, name), name in vars(kind)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:  # a module may be traced in the training process
            return method(self, *args, **kwargs)
        return function(method, self, *args, **kwargs)

    setattr(kind, name, called)
    try:
        yield
    finally:
        setattr(kind, name, method) if is_own else delattr(kind, name)


def _started(start: Callable[..., None], thread: Any) -> None:
    """`Thread.start` of a thread that has run already, so that it can be joined like others.

    Raises:
        RuntimeError: it waits for another thread, which cannot run meanwhile.
        Exception: whatever it raises, which may be a tracer's reason.
    """
    if not thread.daemon:
        with _replaced(threading.Condition, "wait", _refused):
            thread.run()
        thread.run = lambda: None
    start(thread)


def _refused(wait: Callable[..., Any], condition: Any, timeout: float | None = None) -> Any:
    """`Condition.wait`, by which queues and events wait."""
    if timeout is None:
        raise RuntimeError("a thread that forward starts waits for another one, which no tracer can follow")
    return wait(condition, timeout)


def _submitted(submit: Any, pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """`ThreadPoolExecutor.submit`, which its `map` calls too."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args, **kwargs))
    except Exception as error:  # which `result` raises
        future.set_exception(error)
    return future


class _Done:
    """A result of `ThreadPool.apply_async`, known at once."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def get(self, timeout: float | None = None) -> Any:
        return self._future.result()

    def wait(self, timeout: float | None = None) -> None:
        pass

    def ready(self) -> bool:
        return True

    def successful(self) -> bool:
        return self._future.exception() is None


def _applied(
    apply: Any,
    pool: Any,
    function: Callable[..., Any],
    args: Iterable[Any] = (),
    kwds: Mapping[str, Any] | None = None,
    callback: Callable[[Any], Any] | None = None,
    error_callback: Callable[[BaseException], Any] | None = None,
) -> _Done:
    """`ThreadPool.apply_async`, which its `apply` calls too."""
    future = _submitted(None, pool, function, *args, **(kwds or {}))
    error = future.exception()
    told = callback if error is None else error_callback
    if told is not None:
        told(future.result() if error is None else error)
    return _Done(future)


def _mapped(method: Any, pool: Any, function: Callable[..., Any], items: Iterable[Any], chunksize: Any = None) -> Any:
    """`ThreadPool.map`, and as an iterable also its other forms."""
    return [function(item) for item in items]


def _starred(method: Any, pool: Any, function: Callable[..., Any], items: Iterable[Any], chunksize: Any = None) -> Any:
    """`ThreadPool.starmap`."""
    return list(itertools.starmap(function, items))


def _later(found: Callable[..., Any]) -> Callable[..., _Done]:
    """`map` or `starmap` as its asynchronous form."""

    def apply(method: Any, pool: Any, function: Any, items: Any, chunksize: Any = None, *told: Any, **more: Any) -> Any:
        return _applied(None, pool, found, (method, pool, function, items), None, *told, **more)

    return apply


_REPLACED: Mapping[tuple[Any, str], Callable[..., Any]] = {
    (threading.Thread, "start"): _started,
    (ThreadPoolExecutor, "submit"): _submitted,
    (ThreadPool, "apply_async"): _applied,
    (ThreadPool, "map"): _mapped,
    (ThreadPool, "starmap"): _starred,
    (ThreadPool, "imap"): lambda *call, **more: iter(_mapped(*call, **more)),
    (ThreadPool, "imap_unordered"): lambda *call, **more: iter(_mapped(*call, **more)),
    (ThreadPool, "map_async"): _later(_mapped),
    (ThreadPool, "starmap_async"): _later(_starred),
}
