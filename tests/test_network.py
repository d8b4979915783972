"""What leaves this machine: no converter and no runtime contacts its vendor, and no artifact names the user's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import every_format
import outgoing
from every_format import Everything
from polyexport.report.folders import DESCRIPTION

ASKED = """
import socket
try:
    socket.getaddrinfo("example.invalid", 443)
except OSError:
    pass
"""
CONNECTED = """
import socket
try:
    socket.create_connection(("198.51.100.7", 443), timeout=0.1)
except OSError:
    pass
"""
TALKED_TO_ITSELF = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
    client.sendall(b"hello")
"""


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is recorded of each program."""
    if why := outgoing.lacks():
        pytest.skip(why)
    found = {}
    for program in (ASKED, CONNECTED, TALKED_TO_ITSELF):
        file = tmp_path_factory.mktemp("sent") / "packets.txt"
        subprocess.run([*outgoing.command(file), sys.executable, "-c", program], check=True)
        found[program] = file.read_text()
    return found


def test_a_lookup_and_a_connection_would_be_noticed(sent: dict[str, str]) -> None:
    assert "example" in sent[ASKED]
    assert sent[CONNECTED].startswith("198.51.100.7 443 ")
    assert sent[TALKED_TO_ITSELF] == ""


def test_no_export_reaches_for_the_network(everything: Everything) -> None:
    if everything.packets is None:
        pytest.skip(outgoing.lacks())
    assert {outcome.state for outcome in everything.report.outcomes} <= {"verified", "degraded"}
    assert everything.packets.read_text() == ""


def test_no_artifact_has_paths_of_code(everything: Everything) -> None:
    paths = [str(folder).encode() for folder in (Path(every_format.__file__).parent, Path(torch.__file__).parent)]
    with_paths = [
        outcome.format
        for outcome in everything.report.outcomes
        for file in (everything.report.folder / outcome.format).rglob("*")
        if file.is_file() and file.name != DESCRIPTION and any(path in file.read_bytes() for path in paths)
    ]
    assert not with_paths


def test_no_export_writes_into_the_home_folder_except_its_caches(everything: Everything) -> None:
    assert [path.name for path in everything.home.iterdir() if path.name != ".cache"] == []
    assert not list(everything.home.rglob("*onnxruntime.db*"))  # a device's id
