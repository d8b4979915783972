"""The fault matrix: what can go wrong beside a training, how each fault is made, and what is expected of it.

    python tests/support/faults.py [NAME ...]

Each fault happens to a `fit` in a process of its own, while training waits in the middle of an epoch and then goes on.
The same training without the callback, and without what happens outside of it, is the reference. Two formats are asked
for: `faulty`, which most faults are made in, and `good`. Prints what was seen as a Markdown table.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

import forked
import planted
import runs
from lightning_export import ExportCallback
from planted import GOOD, planted as plant
from polyexport import Format, Report, Toolchain
from polyexport.report.folders import finished
from polyexport.workers import process as workers
from polyexport.workers.servers import SWITCH

TIMEOUT = 15.0  # of the hang; the other jobs take a few seconds each
MARK = "FAULT_FOLDER"  # in the environment of every worker that a run starts


# --- what happens in the training process -----------------------------------------------------------------------------


class Waits(Callback):
    """Holds training in the middle of the second epoch until the export of the first is done."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        export = next((each for each in trainer.callbacks if isinstance(each, ExportCallback)), None)
        if (trainer.current_epoch, batch_idx) == (1, 2) and export is not None:
            self.wait(export)
        if (trainer.current_epoch, batch_idx) == (1, 2):
            self.then()

    def wait(self, export: Any) -> None:
        export.session.hurry()  # training waits, so that nothing else needs the machine
        export.session.wait()

    def then(self) -> None:
        """What happens after that, with the callback and without."""


class WaitsForTheConversion(Waits):
    def wait(self, export: Any) -> None:
        export.session.hurry()
        while "converting" not in export.session.doing.get("faulty", ""):
            time.sleep(0.02)


class Raises(WaitsForTheConversion):
    def then(self) -> None:
        raise ValueError("training failed")


class IsInterrupted(WaitsForTheConversion):
    def then(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


class DrawsARandomNumber(Waits):
    """Not a fault of the world: what a callback must not do, to see that it would be seen."""

    def wait(self, export: Any) -> None:
        torch.rand(1)


class LosesItsCheckpoint(Waits):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            os.unlink(trainer.checkpoint_callback.best_model_path)


class Corrupts(Checkpoint):
    """Cuts the checkpoint short once it is written; as a `Checkpoint` it comes right behind the one that writes."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.checkpoint_callback.best_model_path:
            os.truncate(trainer.checkpoint_callback.best_model_path, 1000)


class GoesBackInTime(Callback):
    """Every look at the clock, in training and in workers, is an hour before the last one."""

    PATCH = "import itertools, time\nhours = itertools.count()\ntime.time = lambda: 1.6e9 - 3600 * next(hours)\n"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        exec(self.PATCH, {})
        Path("sitecustomize.py").write_text(self.PATCH)
        os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])


class HasLittleMemory(Callback):
    """In a group of processes that may have three gigabytes, of which training has more than a worker can get."""

    TRAINING, TOGETHER = 2 * 10**9, 3 * 10**9

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.group = memory_groups() / f"polyexport-{os.getpid()}"
        self.group.mkdir()
        limit = next(
            self.group / name for name in ("memory.max", "memory.limit_in_bytes") if (self.group / name).exists()
        )
        limit.write_text(str(self.TOGETHER))
        (self.group / "cgroup.procs").write_text(str(os.getpid()))
        self.taken = b"x" * self.TRAINING

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        (self.group.parent / "cgroup.procs").write_text(str(os.getpid()))
        self.group.rmdir()


def memory_groups() -> Path:
    """Where groups of processes with a limit of memory are made, under either version of cgroups(7)."""
    root = Path("/sys/fs/cgroup")
    return root / "memory" if (root / "memory").exists() else root


def no_memory_groups() -> str:
    """Why this machine cannot limit the memory of some processes; empty where it can."""
    group = memory_groups() / f"polyexport-{os.getpid()}-try"
    try:
        group.mkdir()
    except OSError as error:
        return f"a group of processes: {error}"
    can = any(group.glob("memory.*"))
    group.rmdir()
    return "" if can else f"{memory_groups()} has no memory controller"


class HasNoToolchains(Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        os.environ["POLYEXPORT_CACHE"] = os.path.abspath("toolchains")


class HasNoNetwork(HasNoToolchains):
    """In a network namespace of its own there is no other machine."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        os.environ["UV_CACHE_DIR"] = os.path.abspath("uv")
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x40000000):  # CLONE_NEWNET; `os.unshare` came with Python 3.12
            raise OSError(ctypes.get_errno(), "unshare")


def phone_home(report: Report) -> None:
    socket.create_connection(("192.0.2.1", 80), timeout=5).close()


class Numb(runs.Noisy):
    """Only the first epoch is a best one."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "seen")
        self.log("val_loss", float(self.current_epoch))


class TakesAProxy(Numb):
    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x if isinstance(x, torch.Tensor) else x["x"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([MappingProxyType({"x": batch[0]}), batch[1]], batch_idx)


class Looks(Numb):
    """Looks at itself in the first validation batch, before its forward is called."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert "forward" not in vars(pickle.loads(pickle.dumps(self.net)))
        assert "forward" not in vars(copy.deepcopy(self.net))
        super().validation_step(batch, batch_idx)


class HasFilesCalledLikePackages(Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for name in ("queue", "types", "onnx", "polyexport"):
            Path(f"{name}.py").write_text("raise RuntimeError('this is no package')")


class Diverges(Numb):
    def on_train_start(self) -> None:
        torch.nn.init.constant_(self.net[0].weight, torch.nan)


class Unpicklable(Numb):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = (number for number in range(3))


# --- what happens outside of it ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def killer(folder: Path) -> Iterator[None]:
    """Kills whoever leaves its process id, as the out-of-memory killer would."""
    over = threading.Event()

    def hunt() -> None:
        while not over.wait(0.05):
            for file in folder.rglob("pid"):
                with contextlib.suppress(OSError, ValueError):  # killed already, or not written yet
                    os.kill(int(file.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=hunt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """The exports lie on a disk of four megabytes; what is on it in the end is kept."""
    exports = folder / "exports"
    exports.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", exports], check=True)
    try:
        yield
    finally:
        subprocess.run(["cp", "-a", exports, folder / "kept"], check=True)
        subprocess.run(["umount", exports], check=True)
        exports.rmdir()
        (folder / "kept").rename(exports)


@contextlib.contextmanager
def file_in_the_way(folder: Path) -> Iterator[None]:
    (folder / "exports").write_text("in the way")
    yield


def privileged(*command: str) -> str:
    """Why this machine cannot make the fault; empty where it can."""
    try:
        done = subprocess.run(["unshare", *command], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unshare: {error}"
    return done.stderr.strip() if done.returncode else ""


# --- the matrix -------------------------------------------------------------------------------------------------------


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
            left = (*workers_of(folder), *unfinished_in(folder))
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
