"""A worker: runs one job in a process of its own, which may crash or hang without harm.

    python -m polyexport.worker EXPORT/source/jobs/onnx.dynamo.convert.json [--scratch]

The job is a JSON file; its paths are relative to the export's folder. The result is written next to it, and output is
printed. `--scratch` is for people: the artifact goes to a new temporary folder, and the export stays as it is. With
`--server` it runs no job itself; see `polyexport.workers.server`.

In an isolated toolchain this file is run by path, and only the standard library, numpy and the toolchain's own packages
are there; hence the imports inside functions.
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
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TextIO

import numpy as np

from polyexport.errors import BadRequest, CannotRun, NothingToDo, ToolMissing, line, redacted
from polyexport.format import Format, Loaded
from polyexport.report.escape import printable
from polyexport.report.folders import DESCRIPTION, link
from polyexport.report.outcome import Calibration
from polyexport.serialization import encode, read_json, write_json
from polyexport.spec import LABELS, Arrays, ExportSpec, read_arrays, write_arrays
from polyexport.workers import server
from polyexport.workers.job import (
    LAYERS,
    NOISE,
    OUTPUTS,
    PARENT,
    READS,
    Bench,
    Convert,
    Explain,
    FormatJob,
    Inspect,
    Job,
    Prepare,
    Serve,
    Verify,
    read_job,
    result_path,
)
from polyexport.workers.lifetime import end_with_parent, outlive_signals
from polyexport.workers.refusals import NotAgain, cause, refuse_pickles


def main() -> int:
    """Run the job named on the command line; the exit code is 0 if it succeeds."""
    parser = argparse.ArgumentParser(prog="python -m polyexport.worker", description="Run one export job.")
    parser.add_argument("job", type=Path, nargs="?", help="the job's JSON file")
    parser.add_argument("--scratch", action="store_true", help="write into a new temporary folder, print everything")
    parser.add_argument("--server", nargs="*", metavar="MODULE", help="import these, and fork a child for each job")
    given = parser.parse_args()
    if PARENT in os.environ:
        outlive_signals()
    if given.server is not None:
        return server.run(given.server, work)
    if given.job is None or not given.job.is_file():
        parser.error(f"no job file {given.job}")
    path = given.job.resolve()
    if given.scratch:
        root, job = _opened(path)
        if isinstance(job, Convert):
            job = replace(job, target=str(Path(tempfile.mkdtemp(prefix="polyexport-"), Path(job.target).name)))
        print(json.dumps(_value(root, job), indent=2, default=str))
        return 0
    return work(path)


def work(path: Path) -> int:
    """Run the job in this file, for the process that started this one; the exit code is 0 if it succeeds."""
    root, job = _opened(path)
    answers, lines = _keep_stdout(), end_with_parent()
    if isinstance(job, Bench):
        return bench(root, job, lines, answers)
    if isinstance(job, Serve):
        return serve(root, job, lines, answers)
    return 0 if _done(path, root, job) else 1


def _opened(path: Path) -> tuple[Path, Job]:
    """The export's folder and the job, whose import path becomes this process's."""
    job = read_job(path)
    if not job.trusted:
        sys.addaudithook(refuse_pickles)
    sys.path += [entry for entry in job.sys_path if entry not in sys.path]
    if job.script:
        sys.meta_path.insert(0, NotAgain(job.script))
    return path.parent.parent.parent, job


def _done(path: Path, root: Path, job: Job) -> bool:
    """Run one job and write its result; returns whether it succeeded."""
    result: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        result["value"] = _value(root, job)
    except BaseException as error:  # whatever a converter raises, SystemExit included, is this job's result
        traceback.print_exc()
        result |= {"error": _one_line(cause(error)), "error_kind": _kind(cause(error))}
    result["seconds"] = time.perf_counter() - start
    sys.stdout.flush()
    write_json(result_path(path), result)
    return "value" in result


def _value(root: Path, job: Job) -> Any:
    """Run a job that has one result, and return that; others answer requests."""
    match job:
        case Prepare():
            return prepare(root, job)
        case Convert():
            return convert(root, job)
        case Verify():
            return verify(root, job)
        case Inspect():
            return inspect(root, job)
        case Explain():
            return explain(root, job)
    raise TypeError(f"{type(job).__name__} answers requests, and has no single result")


# --- the jobs ---------------------------------------------------------------------------------------------------------


def prepare(root: Path, job: Prepare) -> Any:
    """Make the reference, of the module or of what is left of it; see `polyexport.measure.reference`."""
    from polyexport.capture.processing import part
    from polyexport.capture.snapshot import leave_out
    from polyexport.measure.reference import below, make

    home = part(job.outside) if job.outside else ""
    if job.outside:
        shutil.rmtree(root / home, ignore_errors=True)  # from an earlier try
        (root / home / "source").mkdir(parents=True)
        for file in (file for file in (root / job.source).iterdir() if file.suffix in (".pkl", ".pt")):
            link(file, root / home / "source" / file.name)
        leave_out(root / home / "source", job.outside)
    return below(make(root / home, root / home / "source", job.dynamic, job.git_commit, sha256=job.sha256), home)


def convert(root: Path, job: Convert) -> Any:
    """Run one route of a format."""
    each = _format(root, job)
    route = next(route for route in each.routes if route.name == job.route)
    target = root / job.target  # an absolute target stays as it is
    target.parent.mkdir(parents=True, exist_ok=True)
    calibrates = each.calibrated and (route.completes or not route.trained)
    made_from = _calibration(root, job.spec) if calibrates else None
    taken = job.spec.calibration if made_from is None else map(Path, made_from.batches)
    spec = replace(job.spec, calibration=tuple(root / path for path in taken))
    from polyexport.tracing.reads import frozen_sites

    try:
        with frozen_sites() as frozen:
            route.convert(root / job.source, target, spec)
    except BaseException:
        # the artifact may have filled the disk, and the result needs space
        shutil.rmtree(target if each.artifact == "." else target.parent, ignore_errors=True)
        raise
    if not target.exists():
        raise RuntimeError(f"the converter ended without an error but wrote no {each.artifact}")
    if job.spec.labels:
        folder = target if each.artifact == "." else target.parent
        (folder / LABELS).write_text(spec.label_lines, encoding="utf-8")
    from polyexport.versions import versions

    calibrated = None if made_from is None else encode(made_from)
    return {"packages": versions(job.packages), "frozen": sorted(frozen), "calibration": calibrated}


def _calibration(root: Path, spec: ExportSpec) -> Calibration:
    """The batches that can be used for calibration: those without NaN or infinity.

    Raises:
        BadRequest: there are none.
    """
    taken, left_out, rows = [], [], 0
    for path in spec.calibration:
        arrays = read_arrays(root / path, spec.input_names).values()
        if all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
            taken.append(path.as_posix())
            rows += max((len(array) for array in arrays if array.ndim), default=1)
        else:
            left_out.append(path.as_posix())
    if not taken:
        raise BadRequest(
            f"no batch to calibrate with: {', '.join(left_out)} has NaN or infinity; give validation data without them"
        )
    return Calibration(tuple(taken), rows, tuple(left_out))


def verify(root: Path, job: Verify) -> Any:
    """Load the artifact from disk, run it on every batch, compare.

    If it disagrees only on batches of other values, `elsewhere` says on which, and how.
    """
    from polyexport.measure.verification import fingerprint, verified

    limits, artifact, loaded = _format(root, job).limits, root / job.source, _load(root, job)
    parity, elsewhere, lost = verified(loaded, root, job.batches, job.spec, limits, job.noise, loaded.others)
    observed = loaded.observed().verified_by
    parity = replace(parity, verified_by=observed, off_device=bool(loaded.stand_in))
    remark = loaded.remark
    if loaded.emulator is not None and parity.passed:
        from polyexport.measure.emulator import tried

        why, more = tried(loaded.emulator, root, job.batches[0], job.spec, limits, job.noise)
        parity = replace(parity, passed=not why, reason=why)
        remark = "; ".join(filter(None, [remark, more]))
    count, sha256 = fingerprint(artifact if artifact.is_dir() else artifact.parent, DESCRIPTION)
    shortfall = "; ".join(filter(None, [loaded.shortfall, lost]))
    own = {"signature": loaded.signature, "shortfall": shortfall, "remark": remark}
    return {"parity": parity, "elsewhere": elsewhere, **own, "bytes": count, "sha256": sha256}


def inspect(root: Path, job: Inspect) -> Any:
    """Write the outputs of PyTorch's layers, and their noise floors."""
    from polyexport.capture.layers import computed
    from polyexport.capture.snapshot import load
    from polyexport.measure.layers import output
    from polyexport.measure.other_values import jittered
    from polyexport.measure.parity import noise_floor
    from polyexport.tracing.attention import plain_attention

    model = load(root / job.source)
    inputs = read_arrays(root / job.batch, model.input_names)
    found, moved = (plain_attention()(computed)(model, given) for given in (inputs, jittered(inputs)))
    outputs, moved_outputs = ({output(key): a for key, a in each.outputs.items()} for each in (found, moved))
    floors = noise_floor(found.values | outputs, moved.values | moved_outputs)
    for name, arrays in ((LAYERS, found.values), (OUTPUTS, outputs), (NOISE, floors)):
        write_arrays(root / job.target / name, arrays)
    write_json(root / job.target / READS, found.reads | {output(key): named for key, named in found.answers.items()})
    return {}


def explain(root: Path, job: Explain) -> Any:
    """Compare an artifact's intermediate tensors and outputs with those of PyTorch's layers."""
    from polyexport.measure.layers import compared, judged, output

    each, inputs, there = _format(root, job), _inputs(root / job.batch, job), root / job.layers
    if each.intermediates is None:
        raise BadRequest(f"{each.name} gives no access to intermediate tensors, so layers cannot be compared")
    expected, right, noise = (read_arrays(there / name) for name in (LAYERS, OUTPUTS, NOISE))
    answer = _load(root, job)(inputs)
    outputs = [judged(output(name), right[output(name)], a, each.limits, noise, name) for name, a in answer.items()]
    found = each.intermediates(root / job.source, job.spec, inputs, threads=job.threads)
    return encode(compared(expected, found, read_json(there / READS), each.limits, noise, outputs))


def bench(root: Path, job: Bench, lines: Iterator[bytes], answers: TextIO) -> int:
    """Time an artifact in rounds: each line on standard input requests one, each line of output answers it.

    The first answer is sent unasked, once the artifact is loaded and warm. A stand-in for the artifact's own runtime is
    not timed: its only answer says why. Calls with one row get a part of the time of each round.
    """
    from polyexport.measure.dynamic_axes import one_row
    from polyexport.measure.latency import ROUNDS, SECONDS, sample_ms, timed_ms, warm_up
    from polyexport.workers.priority import first_waited_seconds

    inputs = _inputs(root / job.batch, job)
    start = time.perf_counter()
    loaded = _load(root, job)
    load_seconds = time.perf_counter() - start
    if loaded.stand_in:
        _answer(answers, {"stand_in": loaded.stand_in})
        return 0

    def call() -> Arrays:
        return loaded(inputs)

    row = one_row(inputs, job.spec) if job.one_row else None
    first_ms = timed_ms(call)
    start = time.perf_counter()
    warm_up(call, at_most=SECONDS - first_ms / 1e3)
    left = SECONDS - first_ms / 1e3 - (time.perf_counter() - start)
    observed = loaded.observed()
    first_ms = first_ms if observed.first_ms is None else observed.first_ms
    _answer(answers, {"load_seconds": load_seconds, "first_ms": first_ms, "device": observed.device})
    waited = spent = 0.0
    for _ in lines:
        start = time.perf_counter()
        warm_up(call, count=2, seconds=0.05, at_most=left / 2)  # threads of the previous runtime may still be spinning
        before = first_waited_seconds()
        samples_ms = sample_ms(call, seconds=min(left, SECONDS / ROUNDS)) if left > 0 or not spent else []
        waited, spent = waited + first_waited_seconds() - before, spent + sum(samples_ms) / 1e3
        one_row_ms = _one_row_ms(loaded, row, seconds=min(left, SECONDS / ROUNDS) / 5) if row and left > 0 else []
        left -= time.perf_counter() - start
        peak_memory_bytes = loaded.observed().peak_memory_bytes or _peak_memory()
        costs = {"peak_memory_bytes": peak_memory_bytes, "waited": min(waited / spent, 1.0)}
        _answer(answers, {"samples_ms": samples_ms, "one_row_ms": one_row_ms, **costs})
    return 0


def _one_row_ms(loaded: Loaded, row: Arrays, *, seconds: float) -> list[float]:
    """Milliseconds of calls with one row; empty if the artifact does not take one."""
    from polyexport.measure.latency import sample_ms, warm_up

    try:
        warm_up(lambda: loaded(row), count=2, seconds=0.0, at_most=seconds)
        return sample_ms(lambda: loaded(row), seconds=seconds)
    except Exception:  # a runtime may refuse a shape with any exception
        traceback.print_exc()
        return []


def serve(root: Path, job: Serve, lines: Iterator[bytes], answers: TextIO) -> int:
    """Run an artifact on request: each line on standard input is a JSON pair of `.npz` paths, of inputs and outputs.

    Each line of output answers one, with an `error` if it failed; the first is sent unasked, once the artifact is
    loaded.
    """
    try:
        loaded = _load(root, job)
    except Exception as error:
        _answer(answers, {"error": _one_line(cause(error))})
        return 1
    _answer(answers, {})
    for asked in lines:
        source, target = json.loads(asked)
        try:
            write_arrays(Path(target), loaded(_inputs(Path(source), job)))
            _answer(answers, {})
        except Exception as error:  # the artifact may fail on these inputs and run on the next
            traceback.print_exc()
            _answer(answers, {"error": _one_line(cause(error))})
    return 0


# --- their pieces -----------------------------------------------------------------------------------------------------


def _format(root: Path, job: FormatJob) -> Format:
    if job.declared:
        import cloudpickle

        own: Format = cloudpickle.loads((root / job.declared).read_bytes())
        return own
    from polyexport.formats import known

    return known()[str(job.format)]


def _load(root: Path, job: FormatJob) -> Loaded:
    if job.format is None:
        from polyexport.measure.reference import eager

        return Loaded(eager(root / job.source, threads=job.threads))
    return _format(root, job).open(root / job.source, job.spec, threads=job.threads)


def _inputs(path: Path, job: FormatJob) -> Arrays:
    return read_arrays(path, job.spec.input_names)


def _peak_memory() -> int | None:
    """Peak resident memory of this process in bytes, without its server's later imports; None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024) - server.later_bytes


def _one_line(error: BaseException) -> str:
    own = isinstance(error, ToolMissing | CannotRun | BadRequest | NothingToDo)
    return " ".join(printable(redacted(str(error)) if own else line(error)).split())[:500]


def _kind(error: BaseException) -> str:
    if isinstance(error, ToolMissing | ModuleNotFoundError):
        return "missing"
    if isinstance(error, BadRequest):
        return "bad request"
    if isinstance(error, NothingToDo):
        return "nothing to do"
    return "cannot run" if isinstance(error, CannotRun) else "raised"


def _keep_stdout() -> TextIO:
    """Reserve standard output for answers; what converters and runtimes print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    code = main()
    # not sys.exit: a runtime that crashes at exit has done its job
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
