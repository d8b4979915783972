"""The module without processing steps, for formats that cannot have them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from polyexport.capture.processing import part
from polyexport.capture.snapshot import PROCESSING
from polyexport.engine import routes
from polyexport.engine.dispatch import PREPARE_LOG, Dispatcher
from polyexport.engine.labels import with_labels
from polyexport.engine.request import Request
from polyexport.measure.reference import Reference
from polyexport.serialization import decode
from polyexport.workers import toolchain
from polyexport.workers.job import Prepare


def parts(request: Request, whole: Reference, dispatcher: Dispatcher) -> dict[tuple[str, ...], routes.Part]:
    """The module without processing steps, for formats that cannot have them: the last step is left out first."""
    if not (request.work / "source" / PROCESSING).exists():  # there are none, or they are in the module's trace
        return {}
    steps = tuple(request.processing)
    ways = dict.fromkeys([*((step,) for step in reversed(steps)), steps])
    return {outside: functools.partial(_part, request, whole, dispatcher, outside) for outside in ways}


def _part(request: Request, whole: Reference, dispatcher: Dispatcher, outside: tuple[str, ...]) -> Reference | None:
    """The reference of the module without these steps; None if it cannot be run, which the log explains."""
    dynamic = request.dynamic
    if "preprocess" in outside and isinstance(dynamic, Mapping):  # which has the names of its inputs
        dynamic = bool(dynamic)
    commit, sha256 = whole.environment["git_commit"], whole.checkpoint_sha256
    job = Prepare(dynamic=dynamic, git_commit=commit, sha256=sha256, outside=outside)
    ended = dispatcher.run(job, toolchain.HOST, f"prepare.{Path(part(outside)).name}", PREPARE_LOG)
    return with_labels(request, decode(Reference, ended.value)) if ended.ok else None
