"""What goes wrong in the fault matrix: in the training process as callbacks and modules, and outside of it."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

import runs
from lightning_export import ExportCallback
from polyexport import Report

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


class HasNoRoomForAWhile(Callback):
    """Another program fills the disk of the exports when training starts, and removes its file when it ends."""

    FILE = Path("..", "exports", "fill")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with contextlib.suppress(OSError), self.FILE.open("wb") as file:  # without the callback there is no such folder
            while True:
                file.write(bytes(4096))
                file.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.FILE.unlink(missing_ok=True)


class LosesItsWorkingFolder(Callback):
    """Somebody removes the working folder of the training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.home = Path.cwd()
        gone = Path("gone")
        gone.mkdir()
        os.chdir(gone)
        os.rmdir(self.home / gone)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        os.chdir(self.home)


class RaisesWarnings(Callback):
    """Every warning is an exception, as with `python -W error`, but for those of Lightning itself."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
        os.environ["PYTHONWARNINGS"] = "error"  # for workers


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


class Compiles(Unpicklable):
    """A part of it is compiled; and it cannot be pickled, so that our own warnings and those of a trace come too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]  # a module too


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
def small_disk(folder: Path, size: str = "4m") -> Iterator[None]:
    """The exports lie on a disk of this size; what is on it in the end is kept."""
    exports = folder / "exports"
    exports.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", exports], check=True)
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
