"""Conversions that share a worker: its faults are one job's, its memory of other jobs is no excuse, and it ends."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planted
import polyexport
from planted import planted as plant
from polyexport import ExportSpec, Format, Runner
from polyexport.engine.dispatch import Dispatcher, Limits
from polyexport.report.folders import unfinished
from polyexport.workers import toolchain
from polyexport.workers.job import Convert, Serve, read_job, write_job
from polyexport.workers.process import JobResult, Kept, Workers, environment


class Crashes(nn.Module):
    """Ends the process that exports it; says which process it runs in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("forward in process", os.getpid(), flush=True)
        if torch.compiler.is_exporting():
            os.kill(os.getpid(), signal.SIGSEGV)
        return x * 2


def tells(source: Path, target: Path, spec: ExportSpec) -> None:
    print("forward in process", os.getpid(), flush=True)
    planted.replay(source, target, spec)


def processes(report: polyexport.Report, name: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"forward in process (\d+)", (report.folder / "logs" / name).read_text())))


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> polyexport.Report:
    into = tmp_path_factory.mktemp("crashed") / "x"
    formats = ["torchscript", "pt2", plant("one", tells), plant("other", tells)]
    return polyexport.export(Crashes(), torch.rand(4, 3), formats, into, dynamic=False, bench=False)


def test_a_crash_in_a_shared_worker_is_that_jobs_alone(crashed: polyexport.Report) -> None:
    assert (crashed["pt2"].state, crashed["pt2"].reason) == ("failed", "killed by SIGSEGV")
    assert (crashed["torchscript"].state, crashed["torchscript"].reason) == ("verified", "")


def test_a_conversion_shares_the_process_that_made_the_reference_until_it_fails_there(
    crashed: polyexport.Report,
) -> None:
    shared, fresh = processes(crashed, "pt2.log")
    assert processes(crashed, "model.log") == [shared] != [fresh]
    assert fresh not in processes(crashed, "torchscript.log")


def test_a_format_of_the_users_own_shares_no_process(crashed: polyexport.Report) -> None:
    ((one,), (other,)) = processes(crashed, "one.log"), processes(crashed, "other.log")
    assert one != other
    assert {one, other}.isdisjoint(processes(crashed, "model.log"))


class Remembers(nn.Module):
    """Is traced wrongly in a process that ran it before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return x * (3 if "PLANTED" in os.environ else 2)
        os.environ["PLANTED"] = "1"
        return x * 2


def test_what_a_used_worker_does_wrongly_a_fresh_one_does_again(tmp_path: Path) -> None:
    report = polyexport.export(Remembers(), torch.rand(4, 3), ["torchscript"], tmp_path / "x", bench=False)
    assert (report["torchscript"].state, report["torchscript"].reason) == ("verified", "")


def job(root: Path, each: Format) -> Path:
    """A conversion by a planted format, as a file."""
    dispatcher = Dispatcher(root, root, Workers(), None, Limits(1, 1), ())  # type: ignore[arg-type]  # it runs nothing
    path = root / "source" / "jobs" / f"{each.name}.json"
    declared, route = dispatcher.declared(each), each.routes[0].name
    target = f"made/{each.name}/{each.artifact}"
    write_job(path, Convert(format=each.name, declared=declared, route=route, target=target, spec=ExportSpec((), ())))
    return path


def test_a_worker_that_failed_a_job_is_replaced_for_the_next(tmp_path: Path) -> None:
    workers = Workers()
    kept = Kept(workers, toolchain.HOST.command(), environment(threads=1, gpu=False, host=True))

    def run(name: str, convert: object, timeout: float = 60) -> JobResult:
        return kept.run(job(tmp_path, plant(name, convert)), tmp_path / "logs" / f"{name}.log", timeout=timeout)

    first, second = run("first", tells), run("second", tells)
    assert (first.ok, first.warm, second.ok, second.warm) == (True, False, True, True)
    logs = [(tmp_path / "logs" / f"{name}.log").read_text() for name in ("first", "second")]
    assert logs[0] == logs[1] != ""
    hung = run("hung", planted.hangs, timeout=2)
    assert (hung.error, hung.kind, hung.warm) == ("timed out after 2 s", "timed out", True)
    raised = run("raised", planted.raises)
    assert (raised.kind, raised.warm) == ("raised", False)
    assert "no rule" in (tmp_path / "logs" / "raised.log").read_text()
    assert run("exited", planted.exits).error == "ended with exit code 3 and no result"
    last = run("last", tells)
    assert (last.ok, last.warm) == (True, False)
    process = int((tmp_path / "logs" / "last.log").read_text().split()[-1])
    workers.end_all()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert run("late", tells).kind == "cancelled"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def lose_parent(process: Any) -> int:
    """Close a worker's standard input, as the system does when the one that started it is gone; how it ends."""
    process.stdin.close()
    return int(process.wait(10))


def test_a_kept_worker_ends_with_the_process_that_started_it_and_leaves_no_files(
    tmp_path: Path, temporary: Path
) -> None:
    kept = Kept(Workers(), toolchain.HOST.command(), environment(threads=1, gpu=False, host=True))
    root = unfinished(tmp_path)
    assert kept.run(job(root, plant("only", litters)), tmp_path / "only.log", timeout=60).ok
    assert list(temporary.glob("*/litter"))
    assert lose_parent(kept._process) < 0
    assert list(temporary.iterdir()) == []
    assert root.exists(), "it can be resumed"
    kept.end()


def litters(source: Path, target: Path, spec: ExportSpec) -> None:
    Path(tempfile.gettempdir(), "litter").touch()
    planted.replay(source, target, spec)


def test_a_worker_that_is_asked_one_thing_after_another_does_so_too_though_it_hangs(
    tmp_path: Path, temporary: Path
) -> None:
    path = job(tmp_path, plant("hangs", planted.replay, load=hangs_loading))
    made = read_job(path)
    assert isinstance(made, Convert)
    write_job(path, Serve(format=made.format, declared=made.declared, spec=made.spec))
    around, log = environment(threads=1, gpu=False, host=True), tmp_path / "log"
    with Workers().conversation(toolchain.HOST.command(), path, log, timeout=60, environment=around) as talk:
        while not log.read_text():
            time.sleep(0.05)
        assert lose_parent(talk._process) < 0
        assert list(temporary.iterdir()) == []
    assert path.exists(), "a finished export stays"


def hangs_loading(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
    raise AssertionError("it waited for ten minutes")


def test_only_toolchains_that_say_so_share_workers() -> None:
    files = (Path(polyexport.__file__).parent / "toolchains").glob("*.txt")
    assert {file.stem for file in files if toolchain.find(file.stem).reuse} == {"torch", "onnx", "tensorflow"}
