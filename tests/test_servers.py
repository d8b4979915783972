"""Servers save the time of imports and nothing else: a job's process is as fresh and as alone as a new one."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import planted
import polyexport
from planted import planted as plant
from polyexport import ExportSpec, Format, Runner
from polyexport.capture.code import libraries
from polyexport.engine.dispatch import Dispatcher, Limits, imports
from polyexport.workers import oom, process, servers, toolchain
from polyexport.workers.job import Bench, Convert, Serve, write_job
from polyexport.workers.process import JobResult, Workers, environment, shared_servers
from polyexport.workers.server import LATER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a fork is safe on Linux only")


@pytest.fixture(scope="module", autouse=True)
def servers_are_each_engines_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(process, "_shared", None)
        yield


IMPORTS = ("numpy",)
FORKED, SPAWNED = "[forked by a server that has imported numpy]", "[spawned, since "


def job(root: Path, each: Format) -> Path:
    """A conversion by a planted format, as a file."""
    dispatcher = Dispatcher(root, root, Workers(), None, Limits(1, 1), ())  # type: ignore[arg-type]  # it runs nothing
    path = root / "source" / "jobs" / f"{each.name}.json"
    declared, route = dispatcher.declared(each), each.routes[0].name
    target = f"made/{each.name}/{each.artifact}"
    write_job(path, Convert(format=each.name, declared=declared, route=route, target=target, spec=ExportSpec((), ())))
    return path


def around(**more: str) -> dict[str, str]:
    return {**environment(threads=1, gpu=False, host=True), **more}


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.end_all()


Run = Callable[..., JobResult]


@pytest.fixture
def run(workers: Workers, tmp_path: Path) -> Run:
    """`run(name, convert)`: how the conversion by a planted format ends; its log is `name.log`."""

    def convert(
        name: str, convert: object, *, timeout: float = 60, imports: tuple[str, ...] = IMPORTS, **more: str
    ) -> JobResult:
        path, log = job(tmp_path, plant(name, convert)), tmp_path / f"{name}.log"
        words = toolchain.HOST.command()
        return workers.run(words, path, log, timeout=timeout, environment=around(**more), imports=imports)

    return convert


def tells(source: Path, target: Path, spec: ExportSpec) -> None:
    """Says who and where it is."""
    known = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "folder": os.getcwd(),
    }
    known |= {"temporary": tempfile.mkdtemp(), "given": os.environ.get("GIVEN"), "nice": os.nice(0)}
    known |= {"files": len(os.listdir("/proc/self/fd")), "collects": gc.isenabled()}
    print(json.dumps(known), flush=True)
    planted.replay(source, target, spec)


def told(log: Path) -> dict[str, Any]:
    """What `tells` said last."""
    found: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ends(*processes: int) -> bool:
    """Whether they end within ten seconds."""
    end = time.monotonic() + 10
    while any(map(is_running, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, processes))


# --- a child ----------------------------------------------------------------------------------------------------------


def test_a_child_is_what_a_new_process_would_be(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("one", tells, GIVEN="1").ok
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("two", tells, GIVEN="2").ok
    assert run("new", tells, GIVEN="2", imports=()).ok
    one, two, new = (told(tmp_path / f"{name}.log") for name in ("one", "two", "new"))
    assert one["parent"] == two["parent"] not in (os.getpid(), one["pid"], two["pid"]), "one server"
    assert new["parent"] == os.getpid()
    assert [each["group"] == each["pid"] for each in (one, two, new)] == [True] * 3
    assert {each["session"] for each in (one, two, new)} == {os.getsid(0)}, "scheduled beside training's threads"
    assert (one["given"], two["given"]) == ("1", "2")
    assert (one["folder"], two["folder"]) == (str(tmp_path), str(tmp_path / "elsewhere"))
    assert Path(one["temporary"]).parent != Path(two["temporary"]).parent
    assert not Path(one["temporary"]).exists()
    assert two["files"] == new["files"], "none of the server's, nor of another child's"
    assert two["collects"] is new["collects"] is True


def test_the_log_says_whether_a_job_was_forked_or_spawned(run: Run, tmp_path: Path) -> None:
    run("forked", planted.replay)
    run("spawned", planted.replay, imports=())
    assert (tmp_path / "forked.log").read_text() == f"{FORKED}\n"
    assert (tmp_path / "spawned.log").read_text() == f"{SPAWNED}no imports are declared for it]\n"


def test_a_fault_of_a_child_concerns_its_own_job_only(run: Run, tmp_path: Path) -> None:
    assert run("before", tells).ok
    crashed, exited = run("crashed", planted.segfaults), run("exited", planted.exits)
    hung, raised = run("hung", planted.hangs, timeout=1), run("raised", planted.raises)
    assert (crashed.error, crashed.kind) == ("killed by SIGSEGV", "crashed")
    assert exited.error == "ended with exit code 3 and no result"
    assert (hung.error, hung.kind) == ("timed out after 1 s, which timeout=… extends", "timed out")
    assert raised.kind == "raised"
    assert run("after", tells).ok
    assert told(tmp_path / "before.log")["parent"] == told(tmp_path / "after.log")["parent"]
    logs = [(tmp_path / f"{name}.log").read_text().splitlines()[0] for name in ("crashed", "exited", "hung", "raised")]
    assert logs == [FORKED] * 4


def test_a_job_whose_server_is_killed_is_done_by_a_new_process(run: Run, tmp_path: Path) -> None:
    assert run("lost", kills_its_server).ok
    first, *_, last = (tmp_path / "lost.log").read_text().splitlines()
    assert (first, last) == (FORKED, "in a new process")
    assert "[its server ended before it did, so it is done again]" in (tmp_path / "lost.log").read_text()
    assert run("next", planted.replay).ok


def kills_its_server(source: Path, target: Path, spec: ExportSpec) -> None:
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if b"--server" in parent:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    print("in a new process", flush=True)
    planted.replay(source, target, spec)


# --- the end of all ---------------------------------------------------------------------------------------------------

TRAINING = textwrap.dedent(
    """
    import sys, threading
    from pathlib import Path
    from polyexport.workers.process import Workers, environment
    from polyexport.workers.toolchain import HOST
    job, log = map(Path, sys.argv[1:])
    around = environment(threads=1, gpu=False, host=True)
    Workers().run(HOST.command(), job, log, timeout=600, environment=around, imports=("numpy",))
    """
)


def test_server_and_child_end_with_a_killed_training_and_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    path, log = job(tmp_path, plant("hangs", tells_and_hangs)), tmp_path / "log"
    training = subprocess.Popen([sys.executable, "-c", TRAINING, str(path), str(log)])
    try:
        while not (log.exists() and "pid" in log.read_text()):
            assert training.poll() is None
            time.sleep(0.05)
    finally:
        training.kill()
        training.wait()
    known = told(log)
    assert ends(known["pid"], known["parent"])
    assert list((tmp_path / "temporary").iterdir()) == []


def tells_and_hangs(source: Path, target: Path, spec: ExportSpec) -> None:
    tells(source, target, spec)
    time.sleep(600)


def test_no_server_is_left_when_all_are_ended(workers: Workers, run: Run, tmp_path: Path) -> None:
    assert run("one", tells).ok
    server = told(tmp_path / "one.log")["parent"]
    assert is_running(server)
    workers.end_all()
    assert ends(server)
    assert run("late", tells).kind == "cancelled"


def test_a_hanging_conversation_ends_with_the_process_that_asks(tmp_path: Path, workers: Workers) -> None:
    path = job(tmp_path, plant("hangs", planted.replay, load=hangs_loading))
    asked = Serve(format="hangs", declared="source/formats/hangs.pkl", spec=ExportSpec((), ()))
    write_job(path, asked)
    log, words = tmp_path / "log", toolchain.HOST.command()
    with workers.conversation(words, path, log, timeout=60, environment=around(), imports=IMPORTS) as talk:
        while "loading" not in log.read_text():
            time.sleep(0.05)
        process = talk._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()  # as the system does when the one that started it is gone
        assert process.wait(10) < 0
    assert path.exists(), "a finished export stays"


def hangs_loading(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
    raise AssertionError("it waited for ten minutes")


# --- where there is none ----------------------------------------------------------------------------------------------


def why_spawned(log: Path) -> str:
    return log.read_text().splitlines()[0].removeprefix(SPAWNED).removesuffix("]")


def test_a_server_whose_imports_started_threads_forks_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    assert run("one", tells, imports=("starts_a_thread",), PYTHONPATH=str(tmp_path)).ok
    assert re.fullmatch(r"its server has other threads \(.+\), so a fork is not safe",
                        why_spawned(tmp_path / "one.log"))  # fmt: skip  # a text, and what it is of
    assert told(tmp_path / "one.log")["parent"] == os.getpid()


def test_an_import_that_starts_threads_is_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    imports = ("numpy", "starts_a_thread", "csv", LATER, "wave")
    assert run("one", tells, imports=imports, PYTHONPATH=str(tmp_path)).ok
    assert (tmp_path / "one.log").read_text().startswith(FORKED)


def test_a_thread_that_is_about_to_end_is_no_reason_to_leave_an_import_out(run: Run, tmp_path: Path) -> None:
    """As one that Python has joined may be, whose end in the operating system it does not wait for."""
    (tmp_path / "starts_a_short_thread.py").write_text(
        "import ctypes\nlibc, thread = ctypes.CDLL(None), ctypes.c_ulong()\n"
        "libc.pthread_create(ctypes.byref(thread), None, libc.usleep, ctypes.c_void_p(50_000))\n"
    )
    imports = ("numpy", "starts_a_short_thread")
    assert run("one", tells, imports=imports, PYTHONPATH=str(tmp_path)).ok
    assert (tmp_path / "one.log").read_text().startswith(FORKED.replace("numpy", ", ".join(imports)))


def test_the_first_jobs_run_while_a_server_imports_what_is_for_later(run: Run, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\nwhile not os.path.exists(os.environ['PYTHONPATH'] + '/go'): time.sleep(0.05)\n"
    )
    imports = ("numpy", LATER, "slow", "csv")
    assert run("one", tells, imports=imports, PYTHONPATH=str(tmp_path)).ok
    assert (tmp_path / "one.log").read_text().startswith(FORKED)
    (tmp_path / "go").touch()
    for more in map(str, range(100)):
        assert run(more, tells, imports=imports, PYTHONPATH=str(tmp_path)).ok
        assert told(tmp_path / f"{more}.log")["parent"] == told(tmp_path / "one.log")["parent"] != os.getpid()
        if (tmp_path / f"{more}.log").read_text().startswith(FORKED.replace("numpy", "numpy, slow, csv")):
            break
    else:
        pytest.fail("it imports nothing more")


def test_a_later_import_that_starts_threads_ends_the_forking(run: Run, tmp_path: Path) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    imports = ("numpy", LATER, "starts_a_thread")
    assert run("one", tells, imports=imports, PYTHONPATH=str(tmp_path)).ok
    assert (tmp_path / "one.log").read_text().startswith(FORKED)
    for more in map(str, range(100)):
        assert run(more, tells, imports=imports, PYTHONPATH=str(tmp_path)).ok
        log = tmp_path / f"{more}.log"
        if log.read_text().startswith(SPAWNED):
            break
    # it refuses, or has told before
    assert why_spawned(log).startswith(("its server has other threads", "its server has ended"))


def test_a_server_that_hangs_while_importing_delays_no_job(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(servers, "_STANDS_STILL_SECONDS", 1)
    assert run("one", tells, imports=("sleeps",), PYTHONPATH=str(tmp_path)).ok
    assert why_spawned(tmp_path / "one.log") == "its server made no progress while it started"


def test_a_server_that_is_busy_importing_is_waited_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = "import time\nwhile time.process_time() < 3: pass\n"
    (tmp_path / "busy.py").write_text(busy)
    monkeypatch.setattr(servers, "_STANDS_STILL_SECONDS", 2)
    monkeypatch.setattr(servers, "_LOOK_SECONDS", 0.5)
    assert run("one", tells, imports=("busy",), PYTHONPATH=str(tmp_path)).ok
    assert told(tmp_path / "one.log")["parent"] != os.getpid()


def test_engines_may_share_servers_which_end_with_the_block(tmp_path: Path) -> None:
    path = job(tmp_path, plant("one", tells))
    with shared_servers():
        for log in (tmp_path / "one.log", tmp_path / "two.log"):
            workers = Workers()
            words = toolchain.HOST.command()
            assert workers.run(words, path, log, timeout=60, environment=around(), imports=IMPORTS).ok
            workers.end_all()
        one, two = (told(tmp_path / f"{name}.log") for name in ("one", "two"))
        assert one["parent"] == two["parent"] != os.getpid()
        assert is_running(one["parent"])
    assert ends(one["parent"])


def test_a_server_that_dies_while_it_imports_costs_no_job(run: Run, tmp_path: Path) -> None:
    (tmp_path / "crashes.py").write_text("import os\nos.abort()\n")
    assert run("one", tells, imports=("crashes",), PYTHONPATH=str(tmp_path)).ok
    assert why_spawned(tmp_path / "one.log") == "its server ended"


def test_a_failed_import_is_reported_by_the_job(run: Run, tmp_path: Path) -> None:
    assert run("one", tells, imports=("no_such_module", "numpy")).ok
    assert told(tmp_path / "one.log")["parent"] != os.getpid()


def test_a_switch_turns_servers_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYEXPORT_SERVERS", "0")
    path, log = job(tmp_path, plant("one", tells)), tmp_path / "one.log"
    words = toolchain.HOST.command()
    assert Workers().run(words, path, log, timeout=60, environment=around(), imports=IMPORTS).ok
    assert why_spawned(log) == "servers are off (POLYEXPORT_SERVERS=0)"


def test_servers_keep_within_their_memory_and_the_least_recently_used_ends_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter((10**10, 10**10, 10**10, 10**8, 0))  # bytes, at each job; a server holds some 30 MB
    monkeypatch.setattr(oom, "free_bytes", lambda: next(left))
    assert run("first", tells).ok
    assert run("second", tells, imports=("numpy", "json")).ok
    assert run("again", tells).ok
    first, second = (told(tmp_path / f"{name}.log")["parent"] for name in ("again", "second"))
    assert is_running(first)
    assert is_running(second)
    assert run("third", tells, imports=("numpy", "csv")).ok
    third = told(tmp_path / "third.log")["parent"]
    assert ends(second)
    assert is_running(third)
    assert run("last", tells, imports=("numpy", "csv")).ok
    assert ends(third)
    assert why_spawned(tmp_path / "last.log").startswith("servers may hold 0.0")


# --- an export --------------------------------------------------------------------------------------------------------


class Crashes(nn.Module):
    """Ends the process that exports it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            os.kill(os.getpid(), signal.SIGSEGV)
        return x * 2


def remembers(source: Path, target: Path, spec: ExportSpec) -> None:
    """The artifact works only in the process that converted it, by what that process keeps."""
    os.environ["REMEMBERED"] = "1"
    sys.modules["remembered"] = sys.modules["json"]
    planted.replay(source, target, spec)


def recalls(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    if "REMEMBERED" not in os.environ or "remembered" not in sys.modules:
        raise RuntimeError("this is not the process that converted it")
    return planted.load(path, spec, threads=threads)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> polyexport.Report:
    """By servers that import PyTorch."""
    into = tmp_path_factory.mktemp("crashed") / "x"
    formats = ["torchscript", "pt2", plant("here-only", remembers, load=recalls), plant("tells", tells)]
    return polyexport.export(Crashes(), torch.rand(4, 3), formats, into, dynamic=False, bench=False)


def test_an_artifact_that_works_only_in_the_process_that_converted_it_is_not_verified(
    crashed: polyexport.Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = crashed["here-only"]
    assert outcome.state == "failed"
    assert outcome.reason.endswith("RuntimeError: this is not the process that converted it")
    monkeypatch.setenv("REMEMBERED", "")
    monkeypatch.setitem(sys.modules, "remembered", json)
    made = crashed.folder / "here-only" / "model.json"
    assert recalls(made, ExportSpec((), ()), threads=1), "there it would have passed"


def test_a_crash_of_a_conversion_leaves_the_others_their_server(crashed: polyexport.Report) -> None:
    assert (crashed["pt2"].state, crashed["pt2"].reason) == ("failed", "killed by SIGSEGV")
    assert [crashed[name].state for name in ("torchscript", "tells")] == ["verified"] * 2
    logs = [(crashed.folder / "logs" / f"{name}.log").read_text() for name in ("model", "torchscript", "pt2", "tells")]
    assert all("[forked by a server that has imported numpy, torch, " in log for log in logs)
    assert not any(SPAWNED in log for log in logs)


def test_a_module_of_the_users_is_imported_in_children_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_net.py").write_text(
        "import os\nfrom pathlib import Path\nfrom torch import nn\n"
        "with open(Path(__file__).with_name('imported'), 'a') as file:\n"
        "    print(os.getpid(), os.getppid(), file=file)\n"
        "class Net(nn.Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from users_net import Net  # type: ignore[import-not-found]  # just written

    report = polyexport.export(Net(4, 3), torch.rand(4, 4), ["torchscript"], tmp_path / "x", bench=False)
    assert report["torchscript"].state == "verified"
    pairs = [line.split() for line in (tmp_path / "imported").read_text().splitlines()]
    (_, *children) = pairs  # the first is this process
    assert children
    servers = {parent for _, parent in children}
    assert servers.isdisjoint(process for process, _ in pairs)


def test_the_library_of_a_module_is_imported_by_the_server_that_forks_for_it(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_sizes=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    module, home = (
        transformers.ResNetForImageClassification(config).eval(),
        "transformers.models.resnet.modeling_resnet",
    )
    assert home in libraries(module)
    assert libraries(nn.Sequential(Own(4, 4), nn.ReLU())) == (), "code of the user's, and what each worker has"
    report = polyexport.export(module, torch.rand(2, 3, 32, 32), ["torchscript"], tmp_path / "x", bench=False)
    assert report["torchscript"].state == "verified"
    first, *_ = (tmp_path / "x" / "logs" / "torchscript.log").read_text().splitlines()
    assert re.fullmatch(rf"\[forked by a server that has imported numpy, torch, .*\b{re.escape(home)}\b.*\]", first)
    for name, served in {"host": True, "torch": False, "onnx": False}.items():
        job = Bench(format=name, spec=ExportSpec((), ()), batch="x.npz")
        assert (home in imports(toolchain.find(name), job, (home,), gpu=False)) == served, "what is measured there"


class Own(nn.Linear):
    """A layer of this file."""


def test_what_is_measured_has_nothing_but_its_runtime_imported() -> None:
    chain, spec = toolchain.find("onnx"), ExportSpec((), ())
    given: Any = {"format": "onnx", "spec": spec}
    timed, users = Bench(**given, batch="x.npz"), Bench(**given, batch="x.npz", declared="source/formats/onnx.pkl")
    converted = Convert(**given, route="dynamo", target="model.onnx")
    assert imports(chain, timed, gpu=False) == ("onnxruntime",)
    assert imports(chain, users, gpu=False) == imports(chain, converted, gpu=True) == ()
    assert "torch" in imports(chain, converted, gpu=False)


def test_one_server_converts_for_every_toolchain_that_the_training_environment_may_satisfy() -> None:
    declared = {toolchain.find(name).convert_imports for name in ("host", "torch", "onnx", "openvino")}
    assert len(declared) == 1


def test_what_every_toolchain_declares_is_a_module_name() -> None:
    declared = {name: toolchain.find(name) for name in toolchain.names()}
    for chain in declared.values():
        words = [word for word in (*chain.convert_imports, *chain.run_imports) if word != LATER]
        assert all(re.fullmatch(r"[\w.]+\??", word) for word in words), chain.name
    assert declared["torch"].imports(converts=True)[:2] == ("numpy", "torch")
    assert ("lightning.pytorch" in declared["torch"].imports(converts=True)) == ("lightning.pytorch" in sys.modules)
