"""Two processes that train together: rank zero exports, and nobody waits for it in a collective."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from polyexport import Report

SCRIPT = """
import sys
from datetime import timedelta
sys.path.insert(0, {tests!r})
import planted, runs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_export import ExportCallback

if __name__ == "__main__":
    # collectives give up after five seconds, the export takes longer
    strategy = DDPStrategy(process_group_backend="gloo", start_method={start!r}, timeout=timedelta(seconds=5))
    callback = ExportCallback([planted.planted("slow", planted.slow)], bench=False)
    model = runs.Scripted([3.0, 2.0])
    trainer = runs.trainer({folder!r}, [ModelCheckpoint(monitor="val_loss"), callback], max_epochs=2, devices=2,
                           strategy=strategy)
    trainer.fit(model, runs.loader(), runs.loader())
    print("clock", float(model.clock.detach()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["popen", "spawn"])
def test_rank_zero_exports_and_no_collective_waits_for_it(tmp_path, start):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), start=start, folder=str(tmp_path)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (best,) = tmp_path.rglob("exports/best")
    report = Report.load(best)
    assert report["slow"].state == "verified"
    assert report["slow"].seconds["convert"] > 10
    assert sorted(path.name for path in best.parent.iterdir())[0] == "best"
