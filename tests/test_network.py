"""No converter and no runtime contacts its vendor: seen in the system calls of an export."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from every_format import Everything, traced

ASKED = """
import socket
try:
    socket.getaddrinfo("example.invalid", 443)
except OSError:
    pass
"""


def outgoing(trace: Path) -> list[str]:
    """The calls that go to another machine, or ask for a name; workers may talk to themselves."""
    return [call for call in trace.read_text(errors="replace").splitlines() if "AF_INET" in call and _leaves(call)]


def _leaves(call: str) -> bool:
    return "htons(53)" in call or not re.search(r"127\.0\.0|::1", call)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not on PATH: apt install strace")
def test_a_network_lookup_would_be_noticed(tmp_path: Path) -> None:
    subprocess.run([*traced(tmp_path / "calls.txt"), sys.executable, "-c", ASKED], check=True)
    assert outgoing(tmp_path / "calls.txt")


def test_no_export_reaches_for_the_network(everything: Everything) -> None:
    if everything.trace is None:
        pytest.skip("strace is not on PATH: apt install strace")
    assert {outcome.state for outcome in everything.report.outcomes} <= {"verified", "degraded"}
    assert outgoing(everything.trace) == []


def test_no_export_writes_into_the_home_folder_except_its_caches(everything: Everything) -> None:
    assert [path.name for path in everything.home.iterdir() if path.name != ".cache"] == []
    assert not list(everything.home.rglob("*onnxruntime.db*"))  # a device's id
