"""Distributed training: rank zero exports, no rank waits for it in a collective, and shards are joined."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint

import forked
import planted
import runs
from lightning_export import ranks
from polyexport import Engine, Report, Request
from polyexport.capture import snapshot
from polyexport.capture.calls import save_call
from polyexport.capture.sharded import join
from polyexport.capture.weights import SHARDS, WEIGHTS, read_checkpoint
from polyexport.engine.weights import hold
from polyexport.report.folders import unfinished

BEGIN = """
import sys
from datetime import timedelta
sys.path.insert(0, {tests!r})
import time
import planted, runs
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_export import ExportCallback
from torch import distributed

class Impatient(Callback):
    # once the ranks have found each other, collectives give up after five seconds
    def on_fit_start(self, trainer, pl_module):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=5), None)

def fit(model, callback, strategy, epochs):
    checkpoint = ModelCheckpoint(monitor="val_loss", dirpath={folder!r} + "/checkpoints")
    callbacks = [checkpoint, callback, Impatient()]
    trainer = runs.trainer({folder!r}, callbacks, max_epochs=epochs, devices=2, strategy=strategy)
    trainer.fit(model, runs.loader(), runs.loader())
    return trainer
"""

DDP = """
if __name__ == "__main__":
    strategy = DDPStrategy(process_group_backend="gloo", start_method={kind!r})
    budget = {{"val_loss": 0.5}} if {kind!r} == "spawn" else None
    callback = ExportCallback([planted.planted("slow", planted.slow)], bench=False, budget=budget)
    model = runs.Scripted([3.0, 2.0])
    trainer = fit(model, callback, strategy, 2)
    # nor does the next collective give up
    trainer.validate(model, runs.loader(), verbose=False)
    print("validated", trainer.global_rank)
"""

FAILS = """
if __name__ == "__main__":
    strategy = DDPStrategy(process_group_backend="gloo", start_method={kind!r})
    callback = ExportCallback([planted.planted("raises", planted.raises)], bench=False, fail_on=["failed"])
    try:
        fit(runs.Scripted([3.0]), callback, strategy, 1)
    except BaseException as error:
        print("told", type(error).__name__, flush=True)
        raise
"""

WAITS = """
class Naive(Callback):
    # exports in the training process, on rank zero
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            time.sleep(12)

if __name__ == "__main__":
    fit(runs.Scripted([3.0, 2.0]), Naive(), DDPStrategy(process_group_backend="gloo", start_method={kind!r}), 2)
"""

FSDP = """
from torch.distributed.fsdp import fully_shard

class Sharded(runs.Noisy):
    def configure_model(self):
        for part in (self.net[0], self.net[4], self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

if __name__ == "__main__":
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo",
        save_distributed_checkpoint={kind!r} == "sharded",
    )
    fit(Sharded(), ExportCallback(["torchscript"], bench=False), strategy, 2)
"""

RUNS = {
    "ddp-popen": DDP,
    "ddp-spawn": DDP,
    "fails-popen": FAILS,
    "waits-popen": WAITS,
    "fsdp-full": FSDP,
    "fsdp-sharded": FSDP,
}
LAUNCHED = {"ddp-popen", "ddp-spawn"}
"""Those whose second process Lightning starts; in the others both find each other by their environment."""


def ranks_of(name: str) -> list[dict[str, str]]:
    """What is added to the environment of each process that is started here, as `torchrun` and Slurm do."""
    if name in LAUNCHED:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return [{**known, "LOCAL_RANK": str(rank)} for rank in range(2)]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Callable[[str], tuple[Path, int, str]]:
    """`ended(name)`: folder, exit code and output of a run; all run side by side, since most of it is waiting."""
    folder, started = tmp_path_factory.mktemp("ranks"), {}
    for name, script in RUNS.items():
        home = folder / name
        home.mkdir()
        text = (BEGIN + script).format(
            tests=str(Path(__file__).parent / "support"), folder=str(home), kind=name.split("-")[1]
        )
        (home / "train.py").write_text(text)
        files = [Path(os.devnull), *[home / "output.txt"] * 2]
        started[name] = [
            forked.started(home / "train.py", cwd=home, environment={**os.environ, **more}, files=files)
            for more in ranks_of(name)
        ]

    def end(name: str) -> tuple[Path, int, str]:
        try:
            for process in started[name]:
                process.join(500)
        finally:
            for process in started[name]:
                process.kill()
        code = max(abs(process.exitcode) for process in started[name])
        return folder / name, code, (folder / name / "output.txt").read_text()

    return end


@pytest.mark.slow
@pytest.mark.parametrize("start", ["popen", "spawn"])
def test_rank_zero_exports_and_no_collective_waits_for_it(ended, start):
    folder, code, output = ended(f"ddp-{start}")
    assert code == 0, output[-3000:]
    report = Report.load(folder / "exports" / "best")
    assert report["slow"].state == ("verified" if start == "popen" else "degraded")
    assert report["slow"].seconds["convert"] >= planted.SLOW_SECONDS
    assert output.count("validated") == 2 if start == "popen" else 1
    assert {path.name for path in (folder / "exports").iterdir()} >= {"best", "epoch=1-step=4"}
    assert not list((folder / "exports").glob(".*"))


@pytest.mark.slow
def test_a_budget_is_not_judged_after_distributed_training(ended):
    """Their validation would wait for each other; nothing hangs, and each artifact says what is not known."""
    folder, code, output = ended("ddp-spawn")
    assert code == 0, output[-3000:]
    report = Report.load(folder / "exports" / "best")
    why = "not known to be within the budget: several processes trained together"
    assert (report["slow"].state, report["slow"].reason) == ("degraded", why)


@pytest.mark.slow
def test_an_export_in_the_training_process_would_be_waited_for(ended):
    _, code, output = ended("waits-popen")
    assert code != 0
    assert "Timed out waiting 5000ms" in output


@pytest.mark.slow
def test_fail_on_is_raised_on_every_rank(ended):
    folder, code, output = ended("fails-popen")
    assert code != 0
    assert output.count("told ExportFailed") == 2
    assert Report.load(folder / "exports" / "epoch=0-step=2")["raises"].state == "failed"


def test_rank_zero_waits_until_every_rank_knows_the_result(monkeypatch):
    """For the store that they talk through may live in its process."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda trainer: store)
    trainer = SimpleNamespace(world_size=3)
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(ranks.tell, trainer, "export", "all is well")
        assert ranks.hear(trainer, "export") == "all is well"
        assert not telling.done()
        assert ranks.hear(trainer, "export") == "all is well"
        telling.result()


def answers(folder: Path, state: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """What the export in `folder` holds for right, and what a module answers that never saw a shard."""
    plain = runs.Noisy()
    plain.load_state_dict(state)
    with np.load(folder / "validation_batch.npz") as arrays, torch.no_grad():
        return arrays["output_0"], plain.eval()(torch.from_numpy(arrays["x"])).numpy()


@pytest.mark.slow
def test_a_sharded_module_is_exported_from_the_one_file_of_its_checkpoint(ended):
    folder, code, output = ended("fsdp-full")
    assert code == 0, output[-3000:]
    report = Report.load(folder / "exports" / "best")
    assert report["torchscript"].state == "verified", report["torchscript"].reason
    state = torch.load(report.checkpoint.path, weights_only=True)["state_dict"]
    assert np.allclose(*answers(report.folder, state), atol=1e-6)


@pytest.mark.slow
def test_a_folder_of_shards_is_joined_in_a_worker(ended):
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    folder, code, output = ended("fsdp-sharded")
    assert code == 0, output[-3000:]
    report = Report.load(folder / "exports" / "best")
    assert report["torchscript"].state == "verified", report["torchscript"].reason
    assert Path(report.checkpoint.path).is_dir()
    assert np.allclose(
        *answers(report.folder, _load_distributed_checkpoint(Path(report.checkpoint.path))["state_dict"]), atol=1e-6
    )
    assert report.folder.resolve().name == f"epoch={report.checkpoint.epoch}-step={report.checkpoint.global_step}"
    assert not (report.folder / "source" / SHARDS).exists()


# --- a folder as a checkpoint -----------------------------------------------------------------------------------------


def fsdp_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """What FSDPStrategy writes: weights and optimizer in shards, the rest in `meta.pt`."""
    state = runs.Noisy().state_dict()
    optimizer = {"state": {"net.0.weight": {"step": torch.ones(())}}}
    checkpoint.save({"model": state, "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 3, "global_step": 7, "loops": {}}, folder / "meta.pt")
    return state


def test_shards_are_hard_linked_and_outlive_the_checkpoint(tmp_path):
    best, source = tmp_path / "best.ckpt", tmp_path / "export" / "source"
    state = fsdp_checkpoint(best)
    source.mkdir(parents=True)
    assert hold(str(best), source) is None
    assert all(path.stat().st_nlink == 2 for path in best.iterdir())
    for path in best.iterdir():
        path.unlink()
    join(source / SHARDS, source / WEIGHTS)
    joined = read_checkpoint(source / WEIGHTS)
    assert (joined["epoch"], joined["global_step"]) == (3, 7)
    assert joined["state_dict"].keys() == state.keys()
    assert all(torch.equal(joined["state_dict"][name], tensor) for name, tensor in state.items())


def exported(folder: Path, held: Path, executor: Any = None) -> Report:
    work = unfinished(folder)
    save_call((torch.randn(4, runs.FEATURES),), {}, work / "source")
    snapshot.save_structure(runs.Noisy(), None, work / "source")
    with Engine(executor=executor) as engine:
        return engine.submit(Request(work, "made", (planted.GOOD,), held=str(held))).result()


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)])
def test_a_sharded_checkpoint_at_a_url_is_fetched_and_joined_by_any_worker(tmp_path, executor):
    fsdp_checkpoint(tmp_path / "best.ckpt")
    report = exported(tmp_path, tmp_path / "best.ckpt", executor)
    assert report["good"].state == "verified"
    assert not (report.folder / "source" / SHARDS).exists()


def test_without_deepspeed_its_checkpoints_are_skipped_and_the_reason_says_what_to_install(tmp_path):
    best = tmp_path / "best.ckpt"
    (best / "checkpoint").mkdir(parents=True)
    (best / "latest").write_text("checkpoint")
    outcome = exported(tmp_path, best)["good"]
    assert outcome.state == "skipped"
    assert "deepspeed, which joins it, is not installed; install it (`pip install deepspeed`)" in outcome.reason


def test_an_unknown_checkpoint_folder_fails_and_names_the_known_kinds(tmp_path):
    best = tmp_path / "best.ckpt"
    best.mkdir()
    (best / "notes.txt").write_text("no shards")
    outcome = exported(tmp_path, best)["good"]
    assert outcome.state == "failed"
    assert "a folder with notes.txt; supported are those of torch.distributed.checkpoint" in outcome.reason
