"""Jobs on other machines: an executor's workers get all they need with the job, and one that is lost is replaced."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import planted
import polyexport
import runs
from lightning_export import ExportCallback
from planted import GOOD, planted as plant
from polyexport import BadRequest, Engine
from polyexport.versions import git_commit
from polyexport.workers import remote
from polyexport.workers.process import JobResult
from polyexport.workers.remote import Task
from polyexport.workers.toolchain import HOST

NET = nn.Sequential(nn.Linear(5, 3))
ROWS = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a real cluster: two worker processes on loopback that nobody starts again."""
    from distributed import Client

    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")  # dask does not try again: we do
    monkeypatch.setenv("LOST_ONCE", str(tmp_path / "lost"))
    address = str(tmp_path / "scheduler.json")
    local = ["--scheduler-file", address, "--host", "127.0.0.1", "--no-dashboard"]
    commands = [["scheduler", *local, "--port", "0"], *[["worker", *local, "--no-nanny", "--nthreads", "2"]] * 2]
    with (tmp_path / "dask.log").open("w") as log:
        processes = [
            subprocess.Popen([sys.executable, "-m", "dask", *command], stdout=log, stderr=log, cwd=tmp_path)
            for command in commands
        ]
        try:
            with Client(scheduler_file=address, timeout=60) as client:
                client.wait_for_workers(2, timeout=60)
                yield client
        finally:
            for process in processes:
                process.kill()
                process.wait()


def test_a_real_cluster_exports_and_a_worker_that_is_killed_costs_one_more_try(tmp_path, dask):
    formats = [plant("lost", planted.is_lost_once), GOOD, "torchscript"]
    callback = ExportCallback(formats, bench=False, executor=dask.get_executor(), staging=f"file://{tmp_path}/staging")
    over = threading.Event()
    killer = threading.Thread(target=kill_who_says_so, args=(tmp_path / "lost", over))
    killer.start()
    try:
        callbacks = [ModelCheckpoint(monitor="val_loss"), callback]
        trainer = runs.trainer(tmp_path, callbacks, max_epochs=1)
        model = runs.Scripted([3.0])
        trainer.fit(model, runs.loader(), runs.loader())
    finally:
        over.set()
        killer.join()
    (report,) = callback.reports
    assert [(each.state, each.reason) for each in report.outcomes] == [("verified", "")] * 3
    assert len(dask.scheduler_info()["workers"]) == 1, "one was killed"
    assert list((tmp_path / "staging").iterdir()) == []
    about = json.loads((report.folder / "manifest.json").read_text())["environment"]
    assert about["git_commit"] == git_commit(), "this machine's code, not what lies in the folder of a worker"
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert "optimizer_states" in checkpoint, "the user's checkpoint is as it was, though it was linked"
    assert (report.folder / report["torchscript"].artifact.path).exists()
    assert (report.folder / "logs" / "lost.log").exists()


def kill_who_says_so(mark: Path, over: threading.Event) -> None:
    while not over.wait(0.05):
        if mark.exists() and mark.read_text():
            os.kill(int(mark.read_text()), signal.SIGKILL)
            return


def scores_and_index(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    scores, index = logits.softmax(1).topk(2)
    return {"scores": scores, "index": index}


def test_artifacts_without_a_processing_step_are_also_made_by_an_executor(tmp_path):
    formats = [GOOD, plant("topk", planted.lacks_topk)]
    report = polyexport.export(
        NET, ROWS, formats, tmp_path / "out", bench=False, executor=Loses(0), postprocess=scores_and_index
    )
    assert {each.format: (each.state, each.outside) for each in report.outcomes} == {
        "good": ("verified", ()),
        "topk": ("degraded", ("postprocess",)),
    }, [each.reason for each in report.outcomes]


class Loses:
    """An executor that loses its first `times` jobs, each of them with an error of its own."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.pool = ThreadPoolExecutor(2)

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        self.times -= 1
        if self.times >= 0:
            return self.pool.submit(self.lose)
        return self.pool.submit(function, *arguments)

    def lose(self) -> None:
        raise RuntimeError("the node went away")


def test_a_lost_job_is_tried_again_and_sent_as_bytes(tmp_path):
    report = polyexport.export(NET, ROWS, [GOOD], tmp_path / "out", bench=False, executor=Loses(1))
    assert report["good"].state == "verified"
    assert sorted(path.name for path in (tmp_path / "out" / "good").iterdir()) == ["model.json"]


def test_a_job_that_is_lost_twice_has_failed_and_says_why(tmp_path):
    report = polyexport.export(NET, ROWS, [GOOD], tmp_path / "out", bench=False, executor=Loses(2))
    assert report["good"].state == "failed"
    assert "lost 2 times by the executor: RuntimeError: the node went away" in report["good"].reason


class Opens:
    """An executor that knows which files came with each job."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = {}
        self.pool = ThreadPoolExecutor(2)

    def submit(self, function: Any, archive: bytes, task: Task, *more: Any) -> Future[Any]:
        self.files[Path(task.job).stem] = set(zipfile.ZipFile(io.BytesIO(archive)).namelist())
        return self.pool.submit(function, archive, task, *more)


def test_calibration_batches_are_sent_with_jobs_that_read_them(tmp_path):
    ranges, executor = plant("ranges", planted.calibrates, calibrated=True), Opens()
    polyexport.export(
        NET, ROWS, [GOOD, ranges], tmp_path / "out", calibration=[ROWS + 1], bench=False, executor=executor
    )
    further = {"source/call_001.pkl", "source/call_001.npz"}
    assert {name: files & further for name, files in executor.files.items()} == {
        "prepare": {"source/call_001.pkl"},
        "good.replay.convert": set(),
        "good.replay.verify": set(),
        "ranges.calibrates.convert": {"source/call_001.npz"},
        "ranges.calibrates.verify": set(),
    }
    module = {f"source/{name}" for name in ("structure.pkl", "weights.pt", "call.pkl", "example.npz")}
    assert executor.files["good.replay.convert"] >= module


def test_a_job_whose_sender_is_gone_leaves_no_answer(tmp_path, monkeypatch):
    """Only who waits removes an answer. The sender takes its archive away when it no longer does."""
    staging = tmp_path / "staging"
    sent = remote._pack(tmp_path, [], f"file://{staging}")

    def work_while_the_sender_goes(*words: Any, **more: Any) -> JobResult:
        (archive,) = staging.iterdir()
        archive.unlink()
        return JobResult(value="done")

    monkeypatch.setattr(remote.Workers, "run", work_while_the_sender_goes)
    task = Task("job.json", "job.log", "job.json", HOST, timeout=1.0, threads=1, gpu=False)
    remote.work(sent, task, f"file://{staging}")
    assert list(staging.iterdir()) == []


def test_an_archive_writes_nothing_outside_of_the_export(tmp_path):
    (tmp_path / "theirs").write_text("as it was")
    (tmp_path / "export").mkdir()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../theirs", "another")
    with pytest.raises(ValueError, match=r"'\.\./theirs', which is outside of the export"):
        remote._unpack(archive.getvalue(), tmp_path / "export")
    assert (tmp_path / "theirs").read_text() == "as it was"


class Never:
    """Accepts jobs and does none."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        return Future()


def test_closing_waits_for_no_job_of_an_executor(tmp_path):
    import test_engine

    engine = Engine(executor=Never())
    future = engine.submit(test_engine.request(tmp_path))
    while not engine.doing:
        time.sleep(0.01)
    left = engine.close()
    assert isinstance(future.exception(), InterruptedError)
    assert list(tmp_path.iterdir()) == [left]


def test_an_object_that_is_no_executor_is_refused():
    with pytest.raises(BadRequest, match=r"executor=3 has no submit\(function, \*arguments\)"):
        Engine(executor=3)
    with pytest.raises(BadRequest, match="staging='s3://bucket' is for an executor"):
        Engine(staging="s3://bucket")
