"""Environments of their own, with one small real package."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polyexport import ToolMissing
from polyexport.workers import toolchain
from polyexport.workers.process import Workers
from polyexport.workers.toolchain import HOST, Busy, Toolchain, find, parse

PIN = "six==1.16.0"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(python: Path, code: str) -> str:
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def test_the_training_environment_serves_when_it_satisfies_the_pins(cache):
    chain = Toolchain("numpy", ("numpy>=1", "nowhere==1; python_version < '3'"))
    assert chain.unmet() == ()
    assert chain.interpreter() == Path(sys.executable)
    assert chain.command()[1:] == ("-P", "-m", "polyexport.worker")
    assert not cache.exists()


def test_what_the_training_environment_lacks_is_named():
    assert Toolchain("x", ("numpy>=1", "numpy>=99", "nowhere")).unmet() == ("numpy>=99", "nowhere")


def test_an_isolated_toolchain_has_its_pins_and_nothing_of_the_host(cache):
    said: list[str] = []
    python = forced(Toolchain("isolated", (PIN,))).interpreter(said.append)
    assert answer(python, "import six; print(six.__version__)") == "1.16.0"
    assert "No module named 'torch'" in answer(python, "import torch")
    assert "No module named 'polyexport'" in answer(python, "import polyexport")
    assert len(said) == 1
    assert PIN in said[0]


def forced(chain: Toolchain) -> Toolchain:
    """The same pins and one that the training environment never has."""
    return Toolchain(chain.name, (*chain.requirements, "toposort==1.10"), chain.layered, chain.python)


def test_a_layered_toolchain_sees_the_hosts_packages_below_its_own(cache):
    python = forced(Toolchain("layered", (PIN,), layered=True)).interpreter()
    import torch

    code = "import six, toposort, torch, polyexport; print(six.__version__, torch.__version__, torch.__file__)"
    assert answer(python, code) == f"1.16.0 {torch.__version__} {torch.__file__}"


def test_the_second_call_makes_nothing(cache):
    chain = forced(Toolchain("twice", ()))
    chain.interpreter()
    said: list[str] = []
    chain.interpreter(said.append)
    assert said == []
    assert chain.ready


def test_an_interrupted_install_is_made_again(cache):
    chain = forced(Toolchain("interrupted", ()))
    python = chain.interpreter()
    (chain.folder / ".complete").unlink()
    (chain.folder / "lib").rename(chain.folder / "half")
    assert not chain.ready
    assert answer(chain.interpreter(), "import toposort; print('there')") == "there"
    assert chain.interpreter() == python


def test_two_at_once_make_one(cache):
    chain = forced(Toolchain("shared", ()))
    said: list[str] = []
    threads = [threading.Thread(target=chain.interpreter, args=(said.append,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([line for line in said if "installing toposort" in line]) == 1
    assert {line.split(":")[1].split(" for ")[0] for line in said[1:]} <= {" waiting"}
    assert chain.ready


def test_other_pins_are_another_environment():
    one, other = Toolchain("x", ("a==1",)), Toolchain("x", ("a==2",))
    assert one.folder != other.folder
    assert one.folder == Toolchain("x", ("a==1",)).folder


def test_what_cannot_be_installed_is_a_missing_tool_and_leaves_nothing(cache):
    chain = Toolchain("hopeless", ("toposort==999.0",))
    with pytest.raises(ToolMissing, match=r"toolchain hopeless cannot be installed: .*toposort"):
        chain.interpreter()
    assert not chain.folder.exists()


@pytest.fixture
def index(monkeypatch) -> Iterator[socket.socket]:
    """A package index that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_an_install_ends_when_the_workers_are_ended(cache, index):
    chain, workers = Toolchain("endless", ("toposort==1.10",)), Workers()
    with ThreadPoolExecutor(1) as pool:
        installing = pool.submit(chain.interpreter, workers=workers)
        index.accept()
        workers.end_all()
        assert isinstance(installing.exception(20), ToolMissing)  # uv itself would go on for minutes
    assert not chain.folder.exists()


def test_the_password_of_an_index_is_on_no_command_line(cache, index, monkeypatch):
    url = os.environ["PIP_INDEX_URL"].replace("//", "//me:secret@")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, url)
    chain, workers = Toolchain("private", ("toposort==1.10",)), Workers()
    with ThreadPoolExecutor(1) as pool:
        installing = pool.submit(chain.interpreter, workers=workers)
        connection, _ = index.accept()
        asked = connection.recv(4096).decode()
        lines = [line for process in Path("/proc").glob("[0-9]*") if (line := command_line(process))]
        workers.end_all()
        assert isinstance(installing.exception(20), ToolMissing)
    assert f"Basic {base64.b64encode(b'me:secret').decode()}\r\n" in asked
    assert any("toposort" in line or str(chain.folder) in line for line in lines)  # uv was running, and is among them
    assert not [line for line in lines if "secret@" in line]


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has just ended
        return ""


def test_the_directives_of_a_requirement_file_are_read():
    directives = "# polyexport: layered\n# polyexport: convert-imports c d.e?\n# polyexport: python >=3.11,<3.13\n"
    given = {"layered": True, "python": ">=3.11,<3.13", "convert_imports": ("c", "d.e?")}
    expected = Toolchain("x", ("a==1", "b>=2"), **given)
    assert parse("x", f"# a comment\n{directives}a==1 # why\n\nb>=2\n") == expected


def test_every_toolchain_of_ours_can_be_read():
    assert find("host") is HOST
    assert find("onnx").layered
    with pytest.raises(KeyError, match="nowhere"):
        find("nowhere")


@pytest.mark.parametrize("what", ["its Python", "a package", "a package without a trace", "a file", "an empty Python"])
def test_a_toolchain_that_is_damaged_is_made_anew(cache, monkeypatch, what):
    chain = forced(Toolchain("damaged", (PIN,)))
    python = chain.interpreter()
    site = next(chain.folder.glob("lib/python*/site-packages"))
    monkeypatch.setattr(toolchain, "_found_whole", set())  # as in another process
    said: list[str] = []
    assert chain.interpreter(said.append) == python
    assert said == [], "it is whole"
    monkeypatch.setattr(toolchain, "_found_whole", set())
    if what == "its Python":
        python.unlink()
        python.symlink_to("/nowhere/python3")
    elif what == "an empty Python":
        python.unlink()
        python.write_bytes(b"")
        python.chmod(0o755)
    elif what == "a file":
        (site / "six.py").unlink()
    else:
        for path in site.glob("toposort*"):
            if path.is_file():
                path.unlink()
            elif "without" in what or not path.name.endswith(".dist-info"):
                shutil.rmtree(path)
    assert answer(chain.interpreter(said.append), "import six, toposort; print('there')") == "there"
    assert len(said) == 1


def test_who_waits_for_another_process_says_so_and_gives_up(cache):
    chain = forced(Toolchain("busy", ()))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(chain.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        said: list[str] = []
        who = f"process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(Busy, match=f"toolchain busy is still being installed by {who} after 0.5 s"):
            chain.interpreter(said.append, patience=0.5)
        assert said == [f"busy: waiting for {who}, which is installing it"]
        workers = Workers()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(chain.interpreter, workers=workers)
            workers.end_all()
            assert str(waiting.exception(20)) == "cancelled"
    finally:
        holder.kill()
        holder.communicate()
    assert chain.interpreter(), "the kernel has let go of what was held"


HOLDS = """
import sys
from pathlib import Path
from polyexport.workers.process import Workers
from polyexport.workers.toolchain import _alone
folder = Path(sys.argv[1])
folder.parent.mkdir(parents=True)
with _alone("busy", folder, print, Workers(), 1):
    print("held", flush=True)
    input()
"""
