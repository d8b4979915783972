"""A worker: one job in, one result out, in a process of its own that may crash or hang without harm.

    python -m polyexport.worker EXPORT/source/jobs/onnx.dynamo.convert.json [--scratch]

The job is a JSON file; its paths are relative to the export's folder. The result is written beside it, everything that
is printed goes to the caller. `--scratch` is for people: the artifact goes to a new temporary folder instead, and the
export stays as it is.

In an isolated toolchain this file is run by path, and only the standard library and numpy are there beside the
toolchain's own packages; hence the imports inside the functions.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

if not __package__:  # run by path: make the package known without its __init__, which needs more than an isolated
    # toolchain has
    _package = types.ModuleType("polyexport")
    _package.__path__ = [str(Path(__file__).parent)]
    sys.modules["polyexport"] = _package

import argparse
import hashlib
import json
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TextIO

import numpy as np

from polyexport.errors import CannotRun, ToolMissing
from polyexport.format import Format, Route, Runner
from polyexport.job import Job, result_path
from polyexport.records import decode, read_json, write_json
from polyexport.spec import Arrays


def main() -> int:
    """Do the job that the command line names; the exit code is 0 when its result says so."""
    parser = argparse.ArgumentParser(prog="python -m polyexport.worker", description="Run one export job.")
    parser.add_argument("job", type=Path, help="the job's JSON file")
    parser.add_argument("--scratch", action="store_true", help="write into a new temporary folder, print everything")
    given = parser.parse_args()
    path = given.job.resolve()
    if not path.is_file():
        parser.error(f"no job file {given.job}")
    job = decode(Job, read_json(path))
    root = path.parent.parent.parent
    sys.path += [entry for entry in job.sys_path if entry not in sys.path]
    if given.scratch:
        if job.target:
            job = replace(job, target=str(Path(tempfile.mkdtemp(prefix="polyexport-"), Path(job.target).name)))
        print(json.dumps(_JOBS[job.kind](root, job), indent=2, default=str))
        return 0
    answers = _keep_stdout()
    if job.kind == "bench":
        return bench(root, job, answers)
    _end_with_parent()
    result: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        result["value"] = _JOBS[job.kind](root, job)
    except BaseException as error:  # whatever a converter raises, SystemExit included, is this job's result
        traceback.print_exc()
        result |= {"error": _one_line(error), "error_kind": _kind(error)}
    result["seconds"] = time.perf_counter() - start
    write_json(result_path(path), result)
    return 0 if "value" in result else 1


# --- the jobs ---------------------------------------------------------------------------------------------------------


def prepare(root: Path, job: Job) -> Any:
    """Make the reference; see `polyexport.reference`."""
    from polyexport.reference import make

    return make(root, root / job.source, job.options["dynamic"])


def convert(root: Path, job: Job) -> Any:
    """Run one route of a format."""
    each, route = _declared(root, job)
    assert job.spec is not None, "a convert job has its signature"
    assert route is not None, "a convert job names its route"
    target = root / job.target  # an absolute target stays as it is
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        route.convert(root / job.source, target, job.spec)
    except BaseException:
        shutil.rmtree(target.parent, ignore_errors=True)  # it may have filled the disk, and the result needs room
        raise
    if not target.exists():
        raise RuntimeError(f"the converter ended without an error, but wrote no {each.artifact}")
    from polyexport.versions import versions

    return {"packages": versions(job.options.get("packages", ()))}


def verify(root: Path, job: Job) -> Any:
    """Load the artifact from disk, run it on every batch, compare."""
    from polyexport.parity import compare, merge

    each, _ = _declared(root, job)
    artifact = root / job.source
    runner = _load(root, job)
    results = []
    for batch in job.batches:
        inputs, reference = _arrays(root / batch.path, job)
        if not any(_says_something(array) for array in reference.values()):
            raise CannotRun("PyTorch itself answers nothing but NaN or infinity, which proves nothing")
        results.append(compare(runner(inputs), reference, each.limits, job.noise if batch is job.batches[0] else None))
    folder = artifact if artifact.is_dir() else artifact.parent
    verified_by = getattr(runner, "verified_by", None)
    parity = replace(merge(results, [batch.sizes for batch in job.batches]), verified_by=verified_by)
    return {"parity": parity, **_fingerprint(folder)}


def bench(root: Path, job: Job, answers: TextIO) -> int:
    """Time an artifact in rounds: each line on standard input asks for one, each line of output answers it.

    The first answer comes unasked, once the artifact is loaded and warm.
    """
    from polyexport.latency import sample_ms, timed_ms, warm_up

    inputs, _ = _arrays(root / job.batches[0].path, job)
    start = time.perf_counter()
    runner = _load(root, job)
    load_seconds = time.perf_counter() - start

    def call() -> Arrays:
        return runner(inputs)

    first_ms = timed_ms(call)
    warm_up(call)
    _answer(answers, {"load_seconds": load_seconds, "first_ms": first_ms})
    for _ in sys.stdin:
        warm_up(call, count=2, seconds=0.05)  # the runtime before may still have threads that spin
        _answer(answers, {"samples_ms": sample_ms(call), "peak_memory_bytes": _peak_memory()})
    return 0


_JOBS: Mapping[str, Callable[[Path, Job], Any]] = {"prepare": prepare, "convert": convert, "verify": verify}


# --- their pieces -----------------------------------------------------------------------------------------------------


def _declared(root: Path, job: Job) -> tuple[Format, Route | None]:
    if job.declared:
        import cloudpickle

        each: Format = cloudpickle.loads((root / job.declared).read_bytes())
    else:
        from polyexport.formats import known

        each = known()[str(job.format)]
    return each, next((route for route in each.routes if route.name == job.route), None)


def _load(root: Path, job: Job) -> Runner:
    assert job.spec is not None, "a job that runs an artifact has its signature"
    if job.format is None:
        from polyexport.reference import eager

        return eager(root / job.source, threads=job.threads)
    each, _ = _declared(root, job)
    if each.load is None:
        raise CannotRun(f"no machine can run {each.name} directly")
    return each.load(root / job.source, job.spec, threads=job.threads)


def _arrays(path: Path, job: Job) -> tuple[Arrays, Arrays]:
    assert job.spec is not None, "a job that runs an artifact has its signature"
    with np.load(path) as arrays:
        return (
            {tensor.name: arrays[tensor.name] for tensor in job.spec.inputs},
            {tensor.name: arrays[tensor.name] for tensor in job.spec.outputs},
        )


def _says_something(array: np.ndarray) -> bool:
    return not np.issubdtype(array.dtype, np.inexact) or not array.size or bool(np.isfinite(array).any())


def _fingerprint(folder: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of all files of a folder, names included."""
    digest, count = hashlib.sha256(), 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        count += file.stat().st_size
    return {"bytes": count, "sha256": digest.hexdigest()}


def _peak_memory() -> int | None:
    """Resident peak of this process in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    own = isinstance(error, ToolMissing | CannotRun)
    return (text if own else f"{type(error).__name__}: {text}")[:500]


def _kind(error: BaseException) -> str:
    if isinstance(error, ToolMissing | ModuleNotFoundError):
        return "missing"
    return "cannot run" if isinstance(error, CannotRun) else "raised"


def _keep_stdout() -> TextIO:
    """Standard output for our answers alone; what converters and runtimes print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _end_with_parent() -> None:
    """End this process and its children when the one that started it is gone: then standard input closes."""

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock would be held while the interpreter ends
            pass
        if hasattr(os, "killpg"):
            os.killpg(0, 9)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    code = main()
    # not sys.exit: a runtime that crashes while it is torn down has done its job
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
