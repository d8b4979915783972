"""The fault matrix: what can go wrong beside a training, how each fault is made, and what is expected of it.

    python tests/support/faults.py [NAME ...]

Each fault happens to a `fit` in a process of its own, while training waits in the middle of an epoch and then goes on.
The same training without the callback, and without what happens outside of it, is the reference. Two formats are asked
for: `faulty`, which most faults are made in, and `good`. Prints what was seen as a Markdown table.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import forked
import planted
import runs
from fault_causes import (
    Compiles,
    Corrupts,
    Diverges,
    DrawsARandomNumber,
    GoesBackInTime,
    HasFilesCalledLikePackages,
    HasLittleMemory,
    HasNoNetwork,
    HasNoRoomForAWhile,
    HasNoToolchains,
    IsInterrupted,
    Looks,
    LosesItsCheckpoint,
    LosesItsWorkingFolder,
    Numb,
    Raises,
    RaisesWarnings,
    TakesAProxy,
    Unpicklable,
    Waits,
    file_in_the_way,
    killer,
    no_memory_groups,
    phone_home,
    privileged,
    small_disk,
)
from lightning_export import ExportCallback
from planted import GOOD, planted as plant
from polyexport import Format, Report, Toolchain
from polyexport.report.folders import finished
from polyexport.workers import process as workers
from polyexport.workers.servers import SWITCH

TIMEOUT = 15.0  # of the hang; the other jobs take a few seconds each
MARK = "FAULT_FOLDER"  # in the environment of every worker that a run starts


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the matrix.

    Attributes:
        name: What goes wrong.
        made: How the test makes it.
        state: Expected of `faulty`; "no export" where none may be left.
        reason: How its reason has to begin.
        good: The state that is expected of `good`, which stands for all other formats.
        faulty: How `faulty` is made.
        model: What is trained.
        callbacks: What happens in the training process, with the export callback and without.
        around: What happens outside of it, given the folder.
        export: Further arguments of the export callback.
        resumable: Whether an export is left that `polyexport resume` finishes.
        runs: How many trainings go at once and write to the same folder.
        servers: Whose servers fork its jobs: those that all these trainings share, or its own; without any, a process
            is spawned for each job.
        cannot: Tells why this machine cannot make the fault; an empty string where it can.
    """

    name: str
    made: str
    state: str
    reason: str = ""
    good: str = "verified"
    faulty: Format = field(default_factory=lambda: plant("faulty", planted.replay))
    model: type[LightningModule] = Numb
    callbacks: tuple[type[Callback], ...] = (Waits,)
    around: Callable[[Path], AbstractContextManager[None]] = lambda folder: nullcontext()
    export: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = False
    runs: int = 1
    servers: Literal["shared", "own", "none"] = "shared"
    cannot: Callable[[], str] = str


PYPI_ONLY = Toolchain("remote", ("toposort==1.10",))
IMPOSSIBLE = Toolchain("impossible", ("toposort==1.10", "toposort==1.9"))

FAULTS = {
    each.name: each
    for each in (
        Fault(
            "converter crashes",
            "SIGSEGV in the worker",
            "failed",
            "killed by SIGSEGV",
            faulty=plant("faulty", planted.segfaults),
        ),
        Fault(
            "worker is killed",
            "SIGKILL from outside",
            "failed",
            "killed by SIGKILL",
            faulty=plant("faulty", planted.waits_to_be_killed),
            around=killer,
        ),
        Fault(
            "memory runs out",
            "a limit of 3 GB, of which training has 2",
            "failed",
            "killed by SIGKILL, since memory ran out",
            faulty=plant("faulty", planted.takes_all_memory),
            callbacks=(HasLittleMemory, Waits),
            export={"workers": 1},
            servers="own",  # in the group
            cannot=no_memory_groups,
        ),
        Fault(
            "converter hangs",
            "sleeps for ten minutes",
            "failed",
            f"timed out after {TIMEOUT:g} s",
            faulty=plant("faulty", planted.hangs),
        ),
        Fault(
            "disk is full",
            "64 MB written to a tmpfs of 4 MB",
            "failed",
            "OSError: [Errno 28] No space left on device",
            faulty=plant("faulty", planted.writes_too_much),
            around=small_disk,
            export={"workers": 1},
            cannot=lambda: privileged("--mount", "true"),
        ),
        Fault(
            "disk has no room for the inputs",
            "a tmpfs of 8 KB",
            "no export",
            around=functools.partial(small_disk, size="8k"),
            cannot=lambda: privileged("--mount", "true"),
        ),
        Fault(
            "disk is full for a while",
            "filled when training starts, and freed when it ends",
            "verified",
            callbacks=(HasNoRoomForAWhile, Waits),
            around=small_disk,
            cannot=lambda: privileged("--mount", "true"),
        ),
        Fault("folder cannot be written", "a file in its place", "no export", around=file_in_the_way),
        Fault(
            "Ctrl-C",
            "SIGINT in the middle of a conversion",
            "no export",
            callbacks=(IsInterrupted,),
            faulty=plant("faulty", planted.hangs),
            resumable=True,
            servers="own",
        ),
        Fault(
            "training raises",
            "ValueError in the middle of a conversion",
            "no export",
            callbacks=(Raises,),
            faulty=plant("faulty", planted.hangs),
            resumable=True,
        ),
        Fault(
            "working folder is removed",
            "while training runs",
            "verified",
            callbacks=(LosesItsWorkingFolder, Waits),
        ),
        Fault("checkpoint is deleted", "unlinked after it was written", "verified", callbacks=(LosesItsCheckpoint,)),
        Fault(
            "checkpoint is corrupt",
            "cut to 1000 bytes",
            "failed",
            "the module cannot be rebuilt: ",
            good="failed",
            callbacks=(Corrupts, Waits),
        ),
        Fault(
            "weights are NaN",
            "set before the first step",
            "unverified",
            "PyTorch itself returns only NaN",
            good="unverified",
            model=Diverges,
        ),
        Fault("module cannot be pickled", "holds a generator", "verified", model=Unpicklable),
        Fault(
            "toolchain cannot be installed",
            "two versions of one package",
            "skipped",
            "toolchain impossible cannot be installed: ",
            callbacks=(HasNoToolchains, Waits),
            faulty=plant("faulty", planted.replay, toolchain=IMPOSSIBLE),
        ),
        Fault(
            "no network",
            "an empty network namespace",
            "skipped",
            "toolchain remote cannot be installed: ",
            callbacks=(HasNoNetwork, Waits),
            faulty=plant("faulty", planted.replay, toolchain=PYPI_ONLY),
            export={"publish": [phone_home]},
            cannot=lambda: privileged("--net", "true"),
        ),
        Fault("two runs, one folder", "the same training twice at once", "verified", runs=2),
        Fault(
            "a file is called like a package",
            "queue.py and onnx.py in the working folder",
            "verified",
            callbacks=(HasFilesCalledLikePackages, Waits),
            servers="own",
        ),
        Fault(
            "forward's argument cannot be copied",
            "a mapping proxy",
            "verified",
            model=TakesAProxy,
        ),
        Fault("the module is pickled in validation", "pickle and deepcopy in its first batch", "verified", model=Looks),
        Fault(
            "warnings are errors",
            "-W error, a part compiled, no pickle",
            "verified",
            model=Compiles,
            callbacks=(RaisesWarnings, Waits),
            servers="none",
        ),
        Fault("clock goes backwards", "an hour at each look", "verified", callbacks=(GoesBackInTime, Waits)),
    )
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a fault.

    Attributes:
        states: State and reason of each format on disk; empty where no export is.
        told: The same as each training's own callback has it; None where `fit` did not end.
        identical: Whether weights, optimizer, metrics and random states are the reference's, bit for bit.
        exit_codes: Of each training.
        reference_exit_code: Of the training without the callback.
        left: Processes that still run, and folders that are not complete.
        log: What the trainings printed.
    """

    states: Mapping[str, list[str]]
    told: tuple[Mapping[str, list[str]] | None, ...]
    identical: bool
    exit_codes: tuple[int, ...]
    reference_exit_code: int
    left: tuple[str, ...]
    log: str

    @property
    def state(self) -> str:
        return self.states["faulty"][0] if self.states else "no export"


class Matrix:
    """Makes faults in `folder`; trainings without the callback are shared."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._references: dict[Any, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def seen(self, fault: Fault) -> Seen:
        """Have the fault happen."""
        folder = self._folder / fault.name.replace(" ", "-")
        folder.mkdir()
        with self._lock:  # the first to ask trains it
            key = (fault.model, fault.callbacks)
            if key not in self._references:
                [self._references[key]] = self._train(fault, folder, "reference")
        code, digest = self._references[key]
        with fault.around(folder):
            ended = self._train(fault, folder, *(f"run{index}" for index in range(fault.runs)))
            left = (*staying_workers_of(folder), *unfinished_in(folder))
        found = [folder / f"run{index}" / "told.json" for index in range(fault.runs)]
        return Seen(
            states=_states(finished(folder / "exports")),
            told=tuple(json.loads(file.read_text()) if file.exists() else None for file in found),
            identical=all(one == digest for _, one in ended),
            exit_codes=tuple(exit_code for exit_code, _ in ended),
            reference_exit_code=code,
            left=left,
            log="\n".join(file.read_text() for file in folder.glob("run*/log.txt")),
        )

    def _train(self, fault: Fault, folder: Path, *names: str) -> list[tuple[int, str]]:
        """Exit code and digest of trainings that go side by side."""
        processes = [forked.process(train, fault.name, str(folder), name) for name in names]
        for process in processes:
            process.join()
        return [
            (process.exitcode, (folder / name / "digest").read_text())
            for process, name in zip(processes, names, strict=True)
        ]


def train(fault_name: str, folder: str, name: str) -> None:
    """One training, in a process of its own; `reference` is the one without the callback."""
    fault, here = FAULTS.get(fault_name) or SHADOWS[fault_name], Path(folder, name)
    here.mkdir()
    os.chdir(here)
    os.environ[MARK] = folder
    os.environ[SWITCH] = str(int(fault.servers != "none"))
    if fault.servers != "shared":
        workers._shared = None
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a job in the background ignores it
    seed_everything(3)
    settings = {"dynamic": False, "timeout": TIMEOUT, "bench": False, "publish": ()} | fault.export
    export = ExportCallback([fault.faulty, GOOD], into=Path(folder, "exports"), **settings)
    history = History()
    callbacks = [ModelCheckpoint(monitor="val_loss"), *(each() for each in fault.callbacks), history]
    callbacks += [] if name == "reference" else [export]
    trainer = runs.trainer(here, callbacks, max_epochs=3)
    model = fault.model()
    try:
        trainer.fit(model, runs.loader(shuffle=True), runs.loader())
        if name != "reference":
            Path("told.json").write_text(json.dumps(_states([report.folder for report in export.reports])))
    finally:
        Path("digest").write_text(digest(model, trainer, history))


class History(Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def digest(model: Any, trainer: Any, history: History) -> str:
    """Of all that training is: weights, optimizer, metrics, random states, steps."""
    states = [each.state_dict()["state"] for each in trainer.optimizers]
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    tensors += [tensor for state in states for each in state.values() for tensor in each.values()]
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    found.update(repr((history.metrics, random.getstate(), trainer.global_step)).encode())
    found.update(np.random.get_state()[1].tobytes())  # type: ignore[union-attr]  # the old generator's state is a tuple
    return found.hexdigest()


def _states(folders: list[Path]) -> dict[str, list[str]]:
    outcomes = Report.load(folders[-1]).outcomes if folders else ()
    return {outcome.format: [outcome.state, outcome.reason] for outcome in outcomes}


def workers_of(folder: Path) -> tuple[str, ...]:
    """Command lines of the workers that a run in `folder` started: it gave them its environment, or that folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            marked = f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes() + b"\0"
            if marked or folder in (process / "cwd").readlink().parents:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return tuple(found)


def staying_workers_of(folder: Path) -> tuple[str, ...]:
    """The same, without those that end within seconds."""
    end = time.monotonic() + _ENDING_SECONDS
    while (found := workers_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


_ENDING_SECONDS = 5.0


def unfinished_in(folder: Path) -> tuple[str, ...]:
    """What lies among the exports and is none."""
    exports = folder / "exports"
    lying = sorted(exports.iterdir()) if exports.is_dir() else []
    return tuple(str(each) for each in lying if not (each / "report.json").exists())


# What a job's own process has to bear, where no server forked it.
FAULTS |= {
    name: replace(FAULTS[of], name=name, made=f"the same, with {SWITCH}=0", servers="none")
    for name, of in (
        ("converter crashes, spawned", "converter crashes"),
        ("converter hangs, spawned", "converter hangs"),
        ("training raises, spawned", "training raises"),
    )
}

# What the harness itself must notice: none of these may pass for harmless.
SHADOWS = {
    each.name: each
    for each in (
        Fault("a callback draws", "a random number in training", "verified", callbacks=(DrawsARandomNumber,)),
        Fault(
            "fit fails",
            "a state that fails it",
            "failed",
            export={"fail_on": ["failed"]},
            faulty=plant("faulty", planted.raises),
        ),
    )
}


def table(seen: Mapping[str, Seen | str]) -> str:
    """As Markdown; a reason in place of what was seen where this machine cannot make the fault."""
    lines = ["| fault | made by | state | reason | other format | training identical | exit code | left behind |"]
    lines.append("|" + "---|" * 8)
    for name, found in seen.items():
        fault = FAULTS[name]
        if isinstance(found, str):
            lines.append(f"| {name} | {fault.made} | not made here: {found} |" + " |" * 5)
            continue
        reason = found.states["faulty"][1].split("; ")[0] if found.states else ""
        reason = f"{reason[:60]}…" if len(reason) > 60 else reason
        codes = ", ".join(map(str, found.exit_codes))
        lines.append(
            f"| {name} | {fault.made} | `{found.state}` | {reason} | {found.states.get('good', [''])[0]} | "
            f"{'yes' if found.identical else 'NO'} | {codes} (without: {found.reference_exit_code}) | "
            f"{len(found.left) or 'nothing'} |"
        )
    return "\n".join(lines)


def main(names: list[str]) -> None:
    chosen = {name: FAULTS[name] for name in names or FAULTS}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        matrix = Matrix(Path(folder))
        seen = pool.map(lambda fault: fault.cannot() or matrix.seen(fault), chosen.values())
        print(table(dict(zip(chosen, seen, strict=True))))


if __name__ == "__main__":
    import faults  # a class that belongs to a script has no name under which a worker could import it

    faults.main(sys.argv[1:])
