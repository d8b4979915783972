"""Formats that fail in every way a converter can, and one that works, all cheap: they need numpy only."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from polyexport import Arrays, ExportSpec, Format, Loaded, Route, Runner, Toolchain, ToolMissing
from polyexport.errors import CannotRun, NothingToDo
from polyexport.spec import calibration


def replay(source: Path, target: Path, spec: ExportSpec) -> None:
    """The artifact returns the reference itself, so its outputs are right by construction."""
    target.write_text(json.dumps({"factor": 1.0}))


def calibrates(source: Path, target: Path, spec: ExportSpec) -> None:
    """Right too; the artifact has the batches that it was calibrated with."""
    batches = [batch[spec.input_names[0]].tolist() for batch in calibration(spec)]
    target.write_text(json.dumps({"factor": 1.0, "batches": batches}))


def wrong(source: Path, target: Path, spec: ExportSpec) -> None:
    target.write_text(json.dumps({"factor": -1.0}))


def mended_by_float(source: Path, target: Path, spec: ExportSpec) -> None:
    """Wrong until a quarter of its layers are in float; the file grows with that share."""
    about = {"factor": 1.0 if spec.in_float >= 1 / 4 else -1.0, "padding": "x" * round(1000 * spec.in_float)}
    target.write_text(json.dumps(about))


def never_mended(source: Path, target: Path, spec: ExportSpec) -> None:
    wrong(source, target, spec)


def mended_not_at_all(source: Path, target: Path, spec: ExportSpec) -> None:
    """Wrong, and no layer of it can stay in float."""
    if spec.in_float:
        raise ValueError("no layer can be kept")
    wrong(source, target, spec)


def raises(source: Path, target: Path, spec: ExportSpec) -> None:
    raise NotImplementedError("no rule\nfor aten::frobnicate")


def has_nothing_to_do(source: Path, target: Path, spec: ExportSpec) -> None:
    raise NothingToDo("it would be the same again")


def segfaults(source: Path, target: Path, spec: ExportSpec) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(source: Path, target: Path, spec: ExportSpec) -> None:
    time.sleep(600)


def waits_to_be_killed(source: Path, target: Path, spec: ExportSpec) -> None:
    """Writes its process id for the test, which kills it."""
    target.with_name("pid").write_text(str(os.getpid()))
    time.sleep(600)


def waits_for_leave(source: Path, target: Path, spec: ExportSpec) -> None:
    while not Path(os.environ["LEAVE"]).exists():
        time.sleep(0.1)
    replay(source, target, spec)


def is_lost_once(source: Path, target: Path, spec: ExportSpec) -> None:
    """The first time, writes the id of its parent process, which the test kills with it; the second time succeeds."""
    mark = Path(os.environ["LOST_ONCE"])
    if not mark.exists():
        mark.write_text(str(os.getppid()))
        time.sleep(600)
    replay(source, target, spec)


def writes_too_much(source: Path, target: Path, spec: ExportSpec) -> None:
    with target.open("wb") as file:
        for _ in range(64):
            file.write(bytes(1024**2))


def takes_all_memory(source: Path, target: Path, spec: ExportSpec) -> None:
    taken = []
    while True:
        taken.append(b"x" * 2**26)


SLOW_SECONDS = 12.0
"""More than twice what a process group may wait in the tests."""


def slow(source: Path, target: Path, spec: ExportSpec) -> None:
    time.sleep(SLOW_SECONDS)
    replay(source, target, spec)


def exits(source: Path, target: Path, spec: ExportSpec) -> None:
    os._exit(3)


def gets_a_sigterm(source: Path, target: Path, spec: ExportSpec) -> None:
    """As every process of a job does when a scheduler is about to end it."""
    os.kill(os.getpid(), signal.SIGTERM)
    replay(source, target, spec)


def quits(source: Path, target: Path, spec: ExportSpec) -> None:
    raise SystemExit(0)


def writes_nothing(source: Path, target: Path, spec: ExportSpec) -> None:
    pass


def lacks_a_tool(source: Path, target: Path, spec: ExportSpec) -> None:
    raise ToolMissing("frobnicator is not on PATH; get it from its vendor")


def static_only(source: Path, target: Path, spec: ExportSpec) -> None:
    if spec.is_dynamic:
        raise ValueError("no symbolic batch")
    replay(source, target, spec)


def lacks_topk(source: Path, target: Path, spec: ExportSpec) -> None:
    if "index" in spec.output_names:
        raise NotImplementedError("no rule for aten::topk")
    replay(source, target, spec)


def lacks_bytes(source: Path, target: Path, spec: ExportSpec) -> None:
    if spec.inputs[0].dtype == "uint8":
        raise NotImplementedError("no type uint8")
    replay(source, target, spec)


def lacks_both(source: Path, target: Path, spec: ExportSpec) -> None:
    lacks_topk(source, target, spec)
    lacks_bytes(source, target, spec)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    about = json.loads(path.read_text())
    places = ("validation_batch.npz", "source/without-*/validation_batch.npz")  # a job elsewhere has one of them
    folder = next(parent for parent in path.parents if any(file for place in places for file in parent.glob(place)))
    files = [*folder.rglob("validation_batch.npz"), *folder.rglob("batch_*.npz")]

    def run(inputs: Arrays) -> Arrays:
        for file in files:
            with np.load(file) as known:
                if not {*inputs, *spec.output_names} <= set(known.files):
                    continue  # of the module with other processing steps
                if all(np.array_equal(known[name], array) for name, array in inputs.items()):
                    return {
                        name: known[name] * np.asarray(about["factor"], known[name].dtype) for name in spec.output_names
                    }
        raise AssertionError("inputs that were never run")

    return run


def load_in_steps(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Answers in the 255 steps that int8 has for a whole output."""
    run = load(path, spec, threads=threads)

    def coarse(inputs: Arrays) -> Arrays:
        steps = {name: (array, np.abs(array).max() / 127) for name, array in run(inputs).items()}
        return {name: (np.round(array / step) * step).astype(array.dtype) for name, (array, step) in steps.items()}

    return coarse


def load_without_its_half(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Runs, and lacks half of what was asked for."""
    return Loaded(load(path, spec, threads=threads), shortfall="half of its weights in float")


def load_narrow(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Right about the best classes of the first batch and of other sizes, and wrong on other values."""
    run = load(path, spec, threads=threads)
    folder = next(parent for parent in path.parents if (parent / "validation_batch.npz").exists())
    with np.load(folder / "validation_batch.npz") as first:
        known = {name: first[name] for name in spec.input_names if name in first.files}

    def narrow(inputs: Arrays) -> Arrays:
        answer = run(inputs)
        changed = any(
            inputs[name].shape == a.shape and not np.array_equal(inputs[name], a) for name, a in known.items()
        )
        return {name: -array if changed and "index" in answer else array for name, array in answer.items()}

    return narrow


def load_nowhere(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    raise CannotRun("there is no runtime for it on this machine")


def load_once(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Runs among the intermediates, where it is verified, and crashes where it is timed."""
    if "made" not in path.parts:
        os.kill(os.getpid(), signal.SIGSEGV)
    return load(path, spec, threads=threads)


def load_badly(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    raise OSError("the artifact is broken")


def planted(
    name: str,
    *converts: object,
    load: object = load,
    upstream: str = "module",
    toolchain: str | Toolchain = "host",
    **more: object,
) -> Format:
    """A format with one route per convert function."""
    routes = tuple(Route(f.__name__, upstream, toolchain, f) for f in converts)  # type: ignore[attr-defined, arg-type]
    return Format(name, "planted", "https://example.org", "model.json", routes, load, **more)  # type: ignore[arg-type]


GOOD = planted("good", replay)
