"""Environments of their own, with one small real package."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from polyexport import ToolMissing
from polyexport.workers import locks, provision, toolchain
from polyexport.workers.locks import Lock, provided
from polyexport.workers.process import Workers, environment
from polyexport.workers.provision import Busy
from polyexport.workers.toolchain import HOST, Toolchain, find, parse
from users import another_user, shared as shared

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
    assert int((chain.folder / ".bytes").read_text()) > 10_000  # measured when it was made, and so listed in no time


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


FOLDERS = """
from polyexport.formats import known
from polyexport.workers import toolchain
names = sorted({route.toolchain for each in known().values() for route in each.routes})
print(*(toolchain.find(name).folder.name for name in names))
"""


def test_each_process_finds_the_same_environments():
    """Names of packages are in no order in a set, so that each process would make environments of its own."""
    found = {
        subprocess.run(
            [sys.executable, "-c", FOLDERS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    (folders,) = found
    assert "executorch-" in folders


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


def wheel(folder: Path, name: str, version: str, needs: str = "", tag: str = "py3-none-any") -> str:
    """Write a wheel of one module that knows its version; returns its pin, with the hash of it."""
    about = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{about}/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{about}/RECORD"))
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def wheels(cache, tmp_path, monkeypatch) -> Path:
    """A folder of wheels that is all that can be installed."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {"UV_FIND_LINKS": str(folder), "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in locks.ALWAYS:
        wheel(folder, name, "1.0")
    return folder


def test_a_lock_is_installed_though_its_requirements_allow_more(wheels):
    pin = wheel(wheels, "tinyone", "1.0")
    wheel(wheels, "tinyone", "2.0")
    python = Toolchain("locked", ("tinyone>=1",), lock=Lock(pin)).interpreter()
    assert answer(python, "import tinyone; print(tinyone.version)") == "1.0"
    assert answer(Toolchain("open", ("tinyone>=1",)).interpreter(), "import tinyone; print(tinyone.version)") == "2.0"


def test_a_file_that_is_not_the_one_that_was_locked_is_refused(wheels):
    name, digest = wheel(wheels, "tinyone", "1.0").split("sha256:")
    chain = Toolchain("forged", ("tinyone",), lock=Lock(f"{name}sha256:{digest[:-2]}{'10'[digest[-2] == '1']}\n"))
    said: list[str] = []
    with pytest.raises(ToolMissing, match=r"toolchain forged cannot be installed: .*Hash mismatch for `tinyone==1.0`"):
        chain.interpreter(said.append)
    assert len(said) == 1, "nothing else was tried"
    assert not chain.folder.exists()


def test_where_a_lock_has_nothing_for_the_platform_versions_are_chosen_and_a_line_says_so(wheels):
    pin = wheel(wheels, "tinyone", "1.0", tag="cp39-cp39-win_amd64")
    wheel(wheels, "tinyone", "0.9")
    said: list[str] = []
    python = Toolchain("elsewhere", ("tinyone",), lock=Lock(pin)).interpreter(said.append)
    assert answer(python, "import tinyone; print(tinyone.version)") == "0.9"
    assert len(said) == 2
    assert "elsewhere: its lock cannot be used here, so versions are resolved now: " in said[1]
    assert "tinyone==1.0" in said[1]


def test_a_lock_for_another_torch_is_not_used(wheels):
    pin = wheel(wheels, "tinyone", "1.0")
    wheel(wheels, "tinyone", "2.0")
    said: list[str] = []
    chain = Toolchain("older", ("tinyone",), layered=True, lock=Lock(pin, needs=(("torch", "<2"), ("tinyone", ""))))
    assert answer(chain.interpreter(said.append), "import tinyone; print(tinyone.version)") == "2.0"
    assert "it needs torch <2, and this is torch 2." in said[1]


def test_what_routes_import_is_compiled_whatever_the_image_says_of_bytecode(wheels, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("UV_COMPILE_BYTECODE", "1")
    wheel(wheels, "tinyone", "1.0")
    wheel(wheels, "tinytwo", "1.0")
    chain = Toolchain("compiled", ("tinyone", "tinytwo"), convert_imports=("tinyone", "nowhere"))
    chain.interpreter()
    assert [file.name.split(".")[0] for file in chain.folder.rglob("tiny*.pyc")] == ["tinyone"]
    assert "PYTHONDONTWRITEBYTECODE" not in environment(threads=1, gpu=False, host=False), "the rest is kept too"


def test_what_others_ask_for_and_no_route_imports_is_left_out(wheels):
    wheel(wheels, "tinyone", "1.0", needs="tinytwo")
    wheel(wheels, "tinytwo", "1.0")
    chain = Toolchain("lean", ("tinyone",), without=("tinytwo",))
    assert "No module named 'tinytwo'" in answer(chain.interpreter(), "import tinyone, tinytwo")


def test_what_no_route_reads_is_deleted_and_its_absence_is_no_damage(wheels, monkeypatch):
    wheel(wheels, "tinyone", "1.0")
    wheel(wheels, "tinytwo", "1.0")
    chain = Toolchain("small", ("tinyone", "tinytwo"), delete=("tinyone.py", "*two.py"))
    assert answer(chain.interpreter(), "import tinytwo").startswith("Traceback")
    site = next(chain.folder.glob("lib/python*/site-packages"))
    assert not [*site.glob("tiny*.py")]
    assert chain.ready
    said: list[str] = []
    monkeypatch.setattr(provision, "_found_whole", set())  # as in another process
    chain.interpreter(said.append)
    assert said == [], "it is whole"
    (site / "tinytwo-1.0.dist-info" / "METADATA").unlink()
    monkeypatch.setattr(provision, "_found_whole", set())
    chain.interpreter(said.append)
    assert len(said) == 1, "the rest of such a package is still looked at"


def test_a_layer_leaves_out_what_the_training_environment_has_at_a_version_that_fits(wheels):
    pins = "filelock==99.0\nidna==99.0\ntinyone==1.0\n"
    assert provided(Lock(pins, needs=(("filelock", ">=3"), ("idna", "<1"), ("tinyone", "")))).keys() == {"filelock"}
    hungry = Lock("jinja2==99.0\nmarkupsafe==0.1\n", needs=(("jinja2", ""), ("markupsafe", "<1")))
    assert provided(hungry) == {}, "jinja2 asks for a later markupsafe than the locked one, which hides the other"


def test_an_install_that_the_disk_has_no_room_for_is_refused(wheels, monkeypatch):
    chain = Toolchain("huge", ("tinyone",), lock=Lock(wheel(wheels, "tinyone", "1.0"), bytes=10**18))
    said: list[str] = []
    with pytest.raises(ToolMissing, match=r"it takes 1e\+09 GB of disk, but .* GB are free for .*huge-"):
        chain.interpreter(said.append)
    assert "tinyone (1 packages with dependencies, up to 1e+09 GB of disk) into" in said[0]


@pytest.mark.parametrize("name", toolchain.names())
def test_the_lock_of_a_toolchain_is_that_of_its_requirements(name):
    """Else somebody has to `make lock`."""
    chain = find(name)
    assert chain.lock is not None, "no lock"
    locked = {pin.name: pin.specifier for pin in chain.lock.packages}
    for asked in map(Requirement, (*chain.requirements, *locks.ALWAYS)):
        if asked.name != "torch" or not chain.layered:
            (pin,) = locked[asked.name.lower()]
            assert asked.specifier.contains(pin.version), asked
    named = {Requirement(line).name for line in chain.requirements}
    assert not locked.keys() & (set(chain.without) - named)
    entries = re.split(r"\n(?=\S)", chain.lock.text.strip())
    assert [entry for entry in entries if not re.search(r"\n    --hash=sha256:[0-9a-f]{64}", entry)] == []
    assert "://" not in chain.lock.text, "a registry's host"
    assert chain.lock.bytes > 10_000_000
    assert {needed for needed, _ in chain.lock.needs} == locked.keys() | ({"torch"} if chain.layered else set())
    assert locks.read(locks.write(chain.lock)) == chain.lock


def test_the_directives_of_a_requirement_file_are_read():
    lines = ("layered", "delete e/f *.map", "convert-imports c d.e?", "run-imports @tflite f", "python >=3.11,<3.13")
    directives = "".join(f"# polyexport: {line}\n" for line in lines)
    given = {"layered": True, "python": ">=3.11,<3.13", "convert_imports": ("c", "d.e?")}
    given["run_imports"] = (*find("tflite").run_imports, "f")
    expected = Toolchain("x", ("a==1", "b>=2"), delete=("e/f", "*.map"), **given)
    assert parse("x", f"# a comment\n{directives}a==1 # why\n\nb>=2\n") == expected


def test_every_toolchain_of_ours_can_be_read():
    assert find("host") is HOST
    assert find("onnx").layered
    with pytest.raises(KeyError, match="nowhere"):
        find("nowhere")


@pytest.mark.parametrize("what", ["its Python", "a package", "a package without a trace", "a file", "an empty Python"])
def test_a_damaged_toolchain_is_installed_again(cache, monkeypatch, what):
    chain = forced(Toolchain("damaged", (PIN,)))
    python = chain.interpreter()
    site = next(chain.folder.glob("lib/python*/site-packages"))
    monkeypatch.setattr(provision, "_found_whole", set())  # as in another process
    said: list[str] = []
    assert chain.interpreter(said.append) == python
    assert said == [], "it is whole"
    monkeypatch.setattr(provision, "_found_whole", set())
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


def test_who_waits_for_another_process_says_so_and_gives_up(cache, monkeypatch):
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
        monkeypatch.setattr(provision, "PATIENCE_SECONDS", 0.5)
        for patience in (0.5, 600):  # the second job does not wait again
            with pytest.raises(Busy, match=r"after 0\.5 s"):
                chain.interpreter(patience=patience)
    finally:
        holder.kill()
        holder.communicate()
    assert chain.interpreter(), "the kernel has let go of what was held"


HOLDS = """
import sys
from pathlib import Path
from polyexport.workers.process import Workers
from polyexport.workers.provision import _locked
folder = Path(sys.argv[1])
folder.parent.mkdir(parents=True)
with _locked("busy", folder, print, Workers(), 1):
    print("held", flush=True)
    input()
"""


def test_a_cache_folder_that_cannot_be_read_has_no_toolchain(tmp_path, monkeypatch):
    """An installation of another user's, which is a missing tool and no error."""
    (tmp_path / "private").mkdir(mode=0o700)
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path / "private" / "toolchains"))
    with another_user():
        assert not find("mnn").ready
        with pytest.raises(ToolMissing, match=r"cannot be written \(Permission denied\); set POLYEXPORT_CACHE"):
            find("mnn").interpreter()


def test_an_incomplete_environment_that_cannot_be_removed_is_named(shared, monkeypatch):
    monkeypatch.setenv("POLYEXPORT_CACHE", str(shared))
    (find("mnn").folder / "bin").mkdir(parents=True)
    with another_user(), pytest.raises(ToolMissing, match=r"\(mnn-\w+ in it is incomplete, and cannot be removed\)"):
        find("mnn").interpreter()
