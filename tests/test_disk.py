"""The environments of toolchains on disk: what they take, when they were used, and which are removed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from polyexport.cli import app
from polyexport.workers import disk
from polyexport.workers.process import Workers
from polyexport.workers.toolchain import find


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with an environment of today, one of other pins that is unused, and one that is not complete."""
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path))
    for folder in (find("mnn").folder, tmp_path / "mnn-of-last-year"):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_bytes(bytes(5_000_000))
        (folder / ".complete").touch()
    (tmp_path / "tfjs-half-made").mkdir()
    long_ago = time.time() - 40 * 86_400
    os.utime(tmp_path / "mnn-of-last-year" / ".complete", (long_ago, long_ago))
    return tmp_path


def test_toolchains_are_listed_with_size_and_last_use(cache: Path) -> None:
    rows = json.loads(CliRunner().invoke(app, ["toolchain", "list", "--json"]).stdout)
    found = {row["folder"]: row for row in rows if "bytes" in row}
    assert {folder: (row["state"], row["bytes"]) for folder, row in found.items()} == {
        str(find("mnn").folder): ("ready", 5_000_000),
        str(cache / "mnn-of-last-year"): ("of other pins", 5_000_000),
    }
    shown = CliRunner().invoke(app, ["toolchain", "list"]).stdout
    assert "5 MB" in shown
    assert time.strftime("%Y") in shown


def test_an_environment_is_measured_once(cache: Path) -> None:
    def sizes() -> list[int]:
        return [environment.bytes for environment in disk.environments(cache, ".complete")]

    assert sizes() == [5_000_000, 5_000_000]
    (cache / "mnn-of-last-year" / "bytecode").write_bytes(bytes(1_000))
    assert sizes() == [5_000_000, 5_000_000]
    (cache / "mnn-of-last-year" / ".bytes").write_text("")  # the disk was full
    assert sizes()[1] > 5_000_000


def test_what_had_no_job_for_a_month_is_removed_and_nothing_else(cache: Path) -> None:
    removed = json.loads(CliRunner().invoke(app, ["toolchain", "remove", "--unused", "--json"]).stdout)
    assert [row["removed"] for row in removed] == [str(cache / "mnn-of-last-year")]
    assert {path.name for path in cache.iterdir()} == {find("mnn").folder.name, "tfjs-half-made"}


def test_an_environment_with_a_job_is_kept(cache: Path) -> None:
    disk.use(cache / "mnn-of-last-year" / ".complete")
    assert not any(environment.is_unused for environment in disk.environments(cache, ".complete"))


@pytest.mark.parametrize("words", [[], ["mnn", "--unused"]])
def test_remove_needs_names_or_unused(cache: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["toolchain", "remove", *words])
    assert done.exit_code == 2
    assert "give names of toolchains, or --unused" in done.stderr
    assert (cache / "mnn-of-last-year").exists()


def test_a_worker_ends_when_training_needs_the_rest_of_the_disk(tmp_path: Path) -> None:
    workers = Workers(background=True)
    command = [sys.executable, "-c", "import time; time.sleep(2)"]
    job, log = tmp_path / "job.json", tmp_path / "log.txt"
    spare = disk.free_bytes(tmp_path) * 2
    ended = workers.run(command, job, log, timeout=60, environment=os.environ, spare=spare)
    assert ended.error.endswith("since training's next checkpoints may need " + disk.gigabytes(spare))
    workers.hurry()  # training is over
    ended = workers.run(command, job, log, timeout=60, environment=os.environ, spare=spare)
    assert ended.error == "ended with exit code 0 and no result"
    workers.end_all()


def test_a_worker_without_a_result_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not disk.is_full(tmp_path)
    assert not disk.is_full(tmp_path / "missing")
    full = SimpleNamespace(f_bavail=1, f_frsize=4096, f_files=10, f_favail=10)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    job, workers = tmp_path / "job.json", Workers()
    ended = workers.run([sys.executable, "-c", ""], job, tmp_path / "log.txt", timeout=60, environment=os.environ)
    workers.end_all()
    assert ended.error == "ended with exit code 0 and no result, since the disk is full"
