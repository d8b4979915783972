"""Workers beside training have the lowest priority, may wait for a processor, and are the first to go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polyexport.workers.priority import waited_seconds
from polyexport.workers.process import Workers

WAITS = [sys.executable, "-c", "input()"]


def test_a_worker_has_low_priority_until_training_is_over():
    own, workers = os.getpriority(os.PRIO_PROCESS, 0), Workers(background=True)
    with workers._spawned(WAITS, subprocess.DEVNULL, subprocess.DEVNULL, os.environ) as process:
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        workers.hurry()
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == own or os.geteuid() != 0, "only root may take it back"
    with workers._spawned(WAITS, subprocess.DEVNULL, subprocess.DEVNULL, os.environ) as process:
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == own


@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="only Linux schedules sessions as groups")
def test_a_worker_is_scheduled_in_the_group_of_training_and_leaves_its_priority():
    own = Path("/proc/self/autogroup").read_text()
    with Workers(background=True)._spawned(WAITS, subprocess.DEVNULL, subprocess.DEVNULL, os.environ) as process:
        assert Path(f"/proc/{process.pid}/autogroup").read_text() == own
    assert Path("/proc/self/autogroup").read_text() == own


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the policy")
def test_every_thread_of_a_worker_gives_way_to_training_until_it_is_over(tmp_path):
    started = tmp_path / "started"
    program = f"""if 1:
        import pathlib, threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        pathlib.Path({str(started)!r}).touch()
        input()"""
    workers = Workers(background=True)
    command = [sys.executable, "-c", program]
    with workers._spawned(command, subprocess.DEVNULL, subprocess.DEVNULL, os.environ) as process:
        while not started.exists():
            assert process.poll() is None
        threads = [int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(threads) == 2
        assert {os.sched_getscheduler(each) for each in threads} == {os.SCHED_IDLE}
        workers.hurry()
        normal = {(os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0))}
        found = {(os.sched_getscheduler(each), os.getpriority(os.PRIO_PROCESS, each)) for each in threads}
        assert found == normal or os.geteuid() != 0, "only root may take it back"


@pytest.mark.skipif(not os.path.exists("/proc/self/oom_score_adj"), reason="only Linux lets one choose who goes")
def test_a_worker_is_killed_before_any_other_process_when_memory_runs_out():
    own = Path("/proc/self/oom_score_adj").read_text()
    with Workers()._spawned(WAITS, subprocess.DEVNULL, subprocess.DEVNULL, os.environ) as process:
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
    assert Path("/proc/self/oom_score_adj").read_text() == own


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="only Linux tells who waited for a processor")
def test_waiting_for_a_processor_is_distinguished_from_sleeping(tmp_path):
    core = str(min(os.sched_getaffinity(0)))
    spin = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    programs = [spin, spin, "input()"]
    processes = [
        subprocess.Popen([sys.executable, "-c", each], stdin=subprocess.PIPE, process_group=0) for each in programs
    ]
    try:
        while min(waited_seconds(process.pid) for process in processes[:2]) < 0.5:
            assert all(process.poll() is None for process in processes)
        assert waited_seconds(processes[2].pid) < max(waited_seconds(process.pid) for process in processes[:2])
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
