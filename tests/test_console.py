"""What a terminal shows of an export, which succeeds whatever happens to the terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

import made_up
from polyexport.report.console import standard, table, wait
from polyexport.report.report import rows


def done(result: str) -> Future[str]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: result)


@pytest.mark.parametrize(("width", "has_routes"), [(80, False), (200, True)])
def test_a_table_drops_columns_and_cuts_off_nothing(tmp_path: Path, width: int, has_routes: bool):
    screen, report = Console(file=io.StringIO(), width=width), made_up.report(tmp_path)
    screen.print(table(report, width))
    shown = screen.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert ("route" in shown) == has_routes
    assert all(row[column] in shown for row in rows(report) for column in ("state", "size", "p50 ms", "speed-up"))


def test_a_piped_table_is_not_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert standard().width > 1000
    monkeypatch.setenv("COLUMNS", "90")
    assert standard().width == 90


def test_lines_are_printed_next_to_the_trainers_display():
    """As in a notebook, where Lightning's own progress bar is still there when `fit` ends."""
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console=console):
        assert wait(done("all"), dict, deque(["onnx: verified", "tflite: [failed]"]), console) == "all"
    lines = console.file.getvalue().splitlines()
    assert any("onnx: verified" in line for line in lines)
    assert any("tflite: [failed]" in line for line in lines)


def test_an_export_succeeds_if_the_terminal_is_closed():
    terminal = io.StringIO()
    terminal.close()
    with pytest.warns(UserWarning, match="the progress cannot be shown: ValueError: I/O operation on closed file"):
        assert wait(done("all"), dict, deque(["onnx: verified"]), Console(file=terminal)) == "all"
    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(1) as pool:
        wait(pool.submit(lambda: 1 / 0), dict, console=Console(file=io.StringIO()))


def test_training_succeeds_if_its_output_is_piped_to_a_program_that_ended():
    program = """
import os, sys
sys.path[:0] = sys.argv[1:]
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
import runs
from lightning_export import ExportCallback
from planted import GOOD

export = ExportCallback([GOOD], bench=False)
trainer = runs.trainer(Path(), [ModelCheckpoint(), export], max_epochs=1)
trainer.fit(runs.Scripted(), runs.loader(), runs.loader())
sys.exit(0 if export.reports else 3)
"""
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent / "support")], stdout=writes, check=False
    )
    os.close(writes)
    assert ended.returncode == 0
