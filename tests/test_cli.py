"""The command, run as a user runs it: what it prints, its exit codes, its JSON."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import forked
import polyexport
from polyexport import FORMATS
from polyexport.capture import snapshot
from polyexport.capture.code import import_path
from polyexport.cli import app
from polyexport.engine import checkpoint
from polyexport.report.outcome import Checkpoint
from polyexport.workers import toolchain
from polyexport.workers.disk import gigabytes

SHOP = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    def forward(self, x):
        return {"y": self.net(x)}

def Broken(width):
    raise RuntimeError("no GPU here")

def Leaves(width):
    raise SystemExit(3)
"""


COMMAND = Path(sys.executable).with_name("polyexport")


def command(*words: str | Path, cwd: Path | None = None, columns: str = "200") -> subprocess.CompletedProcess[str]:
    """What the command does in a process of its own; its imports are there already, and so are its servers."""
    environment = {**os.environ, "COLUMNS": columns}
    return forked.script(COMMAND, *words, cwd=cwd or Path.cwd(), environment=environment)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module's source, a Lightning-like checkpoint of it, inputs, and an export made by the command."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(SHOP)
    names: dict[str, Any] = {}
    exec(SHOP, names)
    torch.manual_seed(0)
    net = names["Net"](width=5)
    callbacks = {"ModelCheckpoint{}": {"monitor": "val_acc", "best_k_models": {"/there/best.ckpt": torch.tensor(0.75)}}}
    about = {"hyper_parameters": {"width": 5}, "epoch": 2, "global_step": 30, "callbacks": callbacks}
    torch.save({"state_dict": net.state_dict(), **about}, folder / "best.ckpt")
    np.savez(folder / "batch.npz", x=np.random.default_rng(0).random((6, 4), dtype=np.float32))
    given = ("--model", "shop:Net", "--inputs", "batch.npz", "--formats", "onnx, torchscript", "--into", "out")
    done = command("export", "best.ckpt", *given, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    torch.save([net.state_dict()], folder / "list.ckpt")
    np.save(folder / "batch.npy", np.zeros((6, 4), np.float32))
    np.savez(folder / "other.npz", z=np.zeros((6, 4), np.float32))
    (folder / "noise.ckpt").write_text("no checkpoint")
    torch.jit.save(torch.jit.trace(net.net, torch.zeros(1, 4)), folder / "script.pt")
    torch.export.save(torch.export.export(net.net, (torch.zeros(1, 4),)), folder / "program.ckpt")
    (folder / "half.npz").write_bytes((folder / "batch.npz").read_bytes()[:40])
    for name, torn in (("torn", "manifest.json"), ("torn2", "validation_batch.npz")):
        shutil.copytree(folder / "out", folder / name, ignore=shutil.ignore_patterns("source", "torchscript"))
        (folder / name / torn).write_text("{")
    (folder / "empty.npz").touch()
    np.savez(folder / "dates.npz", x=np.array(["2020-01-01"], "M8[D]"))
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": {1: 2}}, folder / "numbers.ckpt")
    (folder / "script.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "half").mkdir()
    (folder / "half" / "report.json").write_text((folder / "out" / "report.json").read_text()[:40])
    return folder


def test_what_the_command_exports_agrees_with_the_checkpoint(shop: Path) -> None:
    report = polyexport.Report.load(shop / "out")
    assert {outcome.format: outcome.state for outcome in report.outcomes} == {
        "onnx": "verified",
        "torchscript": "verified",
    }
    sha256 = hashlib.sha256((shop / "best.ckpt").read_bytes()).hexdigest()
    path = (shop / "best.ckpt").as_posix()
    assert report.checkpoint == Checkpoint(path, sha256=sha256, epoch=2, global_step=30, monitor="val_acc", score=0.75)
    batch = np.load(shop / "batch.npz")["x"]
    weights = torch.load(shop / "best.ckpt")["state_dict"]
    hidden = np.tanh(batch @ weights["net.0.weight"].numpy().T + weights["net.0.bias"].numpy())
    expected = hidden @ weights["net.2.weight"].numpy().T + weights["net.2.bias"].numpy()
    assert np.allclose(polyexport.load(shop / "out" / "onnx")({"x": batch})["y"], expected, atol=1e-6)


def test_an_artifact_runs_from_the_command_line(shop: Path) -> None:
    done = command("run", "out/onnx", "--inputs", "batch.npz", "--output", "y.npz", "--json", cwd=shop)
    assert done.returncode == 0, done.stderr
    again = command("run", "out/onnx/model.onnx", "--inputs", "batch.npz", "--json", cwd=shop)
    assert json.loads(again.stdout) == json.loads(done.stdout)
    shutil.copytree(shop / "out" / "onnx", shop / "elsewhere" / "renamed")
    alone = command("run", "elsewhere/renamed", "--inputs", "batch.npz", "--json", cwd=shop)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout) == json.loads(done.stdout)
    answer = polyexport.load(shop / "out" / "torchscript")({"x": np.load(shop / "batch.npz")["x"]})["y"]
    assert np.allclose(json.loads(done.stdout)["y"], answer, atol=1e-6)
    assert np.allclose(np.load(shop / "y.npz")["y"], answer, atol=1e-6)


def test_wrong_inputs_are_reported_in_the_runtimes_words(shop: Path) -> None:
    np.savez(shop / "wide.npz", x=np.zeros((6, 5), np.float32))
    done = command("run", "out/onnx", "--inputs", "wide.npz", cwd=shop)
    assert done.returncode == 1
    assert done.stderr.startswith("polyexport: onnx: ")
    assert "Traceback" not in done.stderr


def test_outputs_that_cannot_be_written_are_one_line(shop: Path) -> None:
    done = command("run", "out/onnx", "--inputs", "batch.npz", "--output", "nowhere/y.npz", cwd=shop)
    assert done.returncode == 1
    assert done.stderr == "polyexport: [Errno 2] No such file or directory: 'nowhere/y.npz'\n"


def test_verifying_again_judges_what_was_made(shop: Path, tmp_path: Path) -> None:
    """What was never made is no artifact that disagrees, and the report tells of it; nothing at all is no proof."""
    export = tmp_path / "out"
    shutil.copytree(shop / "out", export)
    skip(export, "torchscript")
    assert command("verify", export).returncode == 0
    assert command("report", export).returncode == 1
    report = json.loads((export / "report.json").read_text())
    report["outcomes"][0]["format"] = "of-another-version"
    (export / "report.json").write_text(json.dumps(report))
    assert command("verify", export).returncode == 1
    skip(export, "of-another-version")
    assert command("verify", export).returncode == 1


def skip(export: Path, name: str) -> None:
    """Have a report say that there was no tool for a format."""
    report = json.loads((export / "report.json").read_text())
    for outcome in report["outcomes"]:
        if outcome["format"] == name:
            outcome |= {"state": "skipped", "artifact": None, "parity": None}
    (export / "report.json").write_text(json.dumps(report))


def test_verifying_again_notices_a_changed_artifact(shop: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    changed = tmp_path / "out"
    shutil.copytree(shop / "out", changed)
    model = onnx.load(changed / "onnx" / "model.onnx")
    weight = next(each for each in model.graph.initializer if len(each.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    (changed / "onnx" / "model.onnx").unlink()  # it may be a link to what the other export has
    onnx.save(model, changed / "onnx" / "model.onnx")
    done = command("verify", changed, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert [outcome["state"] for outcome in report["outcomes"]] == ["mismatch", "verified"]
    assert report["outcomes"][0]["reason"].startswith("the artifact was changed after the export")
    assert polyexport.Report.load(changed)["onnx"].state == "verified"  # the record of the export stays


def test_batch_sizes_are_doubled_as_long_as_that_pays(shop: Path) -> None:
    done = command("bench", "out", "--trust", "--json", cwd=shop)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["format"] for row in rows} == {"pytorch", "onnx", "torchscript"}
    for name in ("onnx", "torchscript"):
        mine = [row for row in rows if row["format"] == name]
        assert [row["batch"] for row in mine] == [2**n for n in range(len(mine))]
        gains = [b["throughput_per_second"] / a["throughput_per_second"] for a, b in itertools.pairwise(mine)]
        assert all(gain > 1.05 for gain in gains[:-1])
        assert mine[-1]["batch"] == 4096 or gains[-1] <= 1.05


def test_a_report_can_be_had_in_three_forms(shop: Path) -> None:
    alone = [COMMAND, "report", "out"]  # as a user runs it, without what this process has imported
    assert "verified" in subprocess.run(alone, cwd=shop, capture_output=True, text=True, check=True).stdout
    assert command("report", "out", "--markdown", cwd=shop).stdout.startswith("# Export report")
    assert json.loads(command("report", "out", "--json", cwd=shop).stdout)["version"] == 2


@pytest.fixture
def no_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No toolchain is installed, whose size would have to be summed up."""
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path / "cache"))


def test_formats_and_toolchains_are_listed(no_environments: None) -> None:
    rows = json.loads(command("formats", "--json").stdout)
    assert [row["format"] for row in rows] == list(FORMATS)
    (onnx,) = (row for row in rows if row["format"] == "onnx")
    assert onnx["targets"] == ["server CPU"]
    assert onnx["routes"][0] == {"name": "dynamo", "upstream": "pt2", "toolchain": "onnx"}
    assert {"name": "onnx", "ready": True} in onnx["toolchains"]
    chains = json.loads(command("toolchain", "list", "--json").stdout)
    assert [row["toolchain"] for row in chains if row["state"] != "of other pins"] == list(toolchain.names())


def test_a_piped_table_has_one_line_per_row(no_environments: None) -> None:
    lines = command("toolchain", "list", columns="").stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(toolchain.names()) + 1]] == list(toolchain.names())


def test_doctor_lists_formats_that_would_be_skipped_and_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYEXPORT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command("doctor", "onnx", "mnn", "coral", "--json")
    assert done.returncode == 1
    room = gigabytes(toolchain.find("mnn").lock.bytes)
    assert f"everything missing together (up to {room} of disk)" in done.stderr
    assert {row["format"]: row["missing"] for row in json.loads(done.stdout)} == {
        "onnx": "",
        "mnn": f"not installed yet: polyexport toolchain install mnn (up to {room} of disk)",
        "edgetpu": "edgetpu_compiler is not on PATH; it is at https://coral.ai/docs/edgetpu/compiler/ (Linux, x86-64)",
    }
    assert command("doctor", "onnx").returncode == 0


GIVEN = ("--inputs", "batch.npz", "-f", "onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("doctor", "onxx"), "no format 'onxx'; did you mean 'onnx'? known formats: "),
        (("toolchain", "install", "tensorflaw"), "no toolchain or format 'tensorflaw'; known toolchains: c, coreml, "),
        (("report", "nowhere"), "nowhere is neither an export nor a folder with a best one"),
        (("run", "out/onxx", "--inputs", "batch.npz"), "out has no artifact 'onxx' that runs"),
        (("run", "out/onnx", "--inputs", "shop.py"), "shop.py is not an .npz of named arrays"),
        (("export", "best.ckpt", "--model", "shop:Nut", *GIVEN), "'shop:Nut' cannot be imported"),
        (("export", "best.ckpt", "--model", "Net", *GIVEN), "'Net' is neither package.module:Name nor file.py:Name"),
        (("export", "best.ckpt", "--model", "gone.py:Net", *GIVEN), "FileNotFoundError: there is no gone.py"),
        (("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--module", "nut"), "Net has no 'nut'; it has net"),
        (("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--dynamic", "x"), "write INPUT:AXIS=NAME"),
        (
            ("export", "best.ckpt", "--model", "shop:Net", "--inputs", "batch.npy", "-f", "onnx"),
            "batch.npy holds one array without a name; save it with one: np.savez(",
        ),
        (
            ("export", "best.ckpt", "--model", "shop:Net", "--inputs", "other.npz", "-f", "onnx"),
            "Net.forward takes (x), but was given 'z': missing a required argument: 'x'",
        ),
        (
            ("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--calibration", "other.npz"),
            "Net.forward takes (x), but was given 'z'",
        ),
        (("export", "out/onnx/model.onnx", "--model", "shop:Net", *GIVEN), "model.onnx is an artifact of onnx"),
        (("export", "program.ckpt", "--model", "shop:Net", *GIVEN), "program.ckpt is a torch.export program"),
        (("export", "script.pt", "--model", "shop:Net", *GIVEN), "script.pt is a TorchScript archive"),
        (("export", "noise.ckpt", "--model", "shop:Net", *GIVEN), "noise.ckpt is neither a zip archive nor a pickle"),
        (("export", "none.ckpt", "--model", "shop:Net", *GIVEN), "there is no checkpoint none.ckpt"),
        (
            ("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--arguments", '{"width": 7}'),
            "shop:Net(width) does not fit best.ckpt: RuntimeError: Error(s) in loading state_dict",
        ),
        (("export", "list.ckpt", "--model", "shop:Net", *GIVEN), "list.ckpt holds a list, neither a checkpoint nor"),
        (
            ("export", "best.ckpt", "--model", "builtins:dict", *GIVEN),
            "builtins:dict returned a dict, which is not a torch.nn.Module",
        ),
        (
            ("export", "best.ckpt", "--model", "shop.py:Broken", *GIVEN),
            "shop.py:Broken(width) failed: RuntimeError: no",
        ),
        (("export", "best.ckpt", "--model", "shop.py:Leaves", *GIVEN), "shop.py:Leaves(width) failed: SystemExit: 3"),
        (
            ("export", "best.ckpt", "--model", "script.py:Net", *GIVEN),
            "since script.py ends the program: SystemExit: 0",
        ),
        (
            ("export", "numbers.ckpt", "--model", "shop:Net", *GIVEN),
            "the hyperparameters in numbers.ckpt are no keyword",
        ),
        (("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--labels", "best.ckpt"), "best.ckpt is not text in"),
        (
            ("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--labels", "none"),
            "none cannot be read: No such file",
        ),
        (("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--arguments", "[" * 100_000), "is not JSON: maximum"),
        (("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--timeout", "nan"), "must be greater than zero"),
        (
            ("export", "best.ckpt", "--model", "shop:Net", *GIVEN, "--into", "shop.py/x"),
            "shop.py is no folder that can",
        ),
        (("run", "out/onnx", "--inputs", "other.npz"), "onnx takes x, but was given z: there is no x"),
        (("run", "nowhere", "--inputs", "batch.npz"), "there is no "),
        (("run", "torn/onnx", "--inputs", "other.npz"), "torn/manifest.json cannot be read: JSONDecodeError"),
        (("explain", "torn2", "onnx"), "torn2/validation_batch.npz cannot be read: ValueError"),
        (("report", "two\nlines"), "two lines is neither an export nor"),
        (("run", "out/onnx", "--inputs", "none.npz"), "there is no file none.npz; give an .npz of named arrays"),
        (("run", "out/onnx", "--inputs", "empty.npz"), "empty.npz is not an .npz of named arrays: EOFError"),
        (
            ("run", "out/onnx", "--inputs", "best.ckpt"),
            "best.ckpt is not an .npz of named arrays: it has a file 'best/",
        ),
        (("run", "out/onnx", "--inputs", "dates.npz"), "x in dates.npz is datetime64[D]; give an array of numbers or"),
        (("doctor", "ONNX"), "no format 'ONNX'; did you mean 'onnx'?"),
        (("run", "out/onnx", "--inputs", "half.npz"), "half.npz is not an .npz of named arrays: BadZipFile"),
        (("report", "half"), "half/report.json cannot be read: JSONDecodeError"),
    ],
)
def test_a_wrong_argument_is_a_one_line_error(
    shop: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(shop)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0  # what shows the progress ends with an empty line
    assert message in done.stderr


def test_a_checkpoint_that_runs_code_needs_trust(shop: Path, tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": {}, "extra": Path("/")}, tmp_path / "pickled.ckpt")
    np.savez(tmp_path / "batch.npz", input=np.zeros((3, 2), np.float32))
    (tmp_path / "shop2.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    words = ("export", "pickled.ckpt", "--model", "shop2:make", "--inputs", "batch.npz", "-f", "torchscript")
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 2
    assert "if you trust who made it, give --trust" in refused.stderr
    trusted = command(*words, "--trust", cwd=tmp_path)
    assert trusted.returncode == 0, trusted.stderr


@pytest.mark.parametrize("file", ["shop_two.py", "queue.py", "my-shop.py"])
def test_a_model_is_named_by_its_file_too(shop: Path, tmp_path: Path, file: str) -> None:
    """Also where its name is that of another module, or of none; a worker gets it all the same."""
    (tmp_path / file).write_text(SHOP)
    blob = checkpoint.read(shop / "best.ckpt")
    made = checkpoint.model(shop / "best.ckpt", blob, f"{tmp_path / file}:Net", {})
    snapshot.save_structure(made, None, tmp_path)
    program = "import sys; from polyexport.capture.pickling import restore; print(restore(sys.argv[1])['root'])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path())}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path / "structure.pkl")],
        capture_output=True,
        text=True,
        check=True,
        env=environment if file == "shop_two.py" else None,
    )
    assert "Linear(in_features=4, out_features=5" in done.stdout


def test_a_part_of_a_model_is_exported_with_axes_of_any_name(shop: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "part.npz", input=np.ones((3, 4), np.float32))
    words = ("--inputs", tmp_path / "part.npz", "-f", "torchscript", "--into", tmp_path / "out", "--json")
    chosen = ("--model", shop / "shop.py:Net", "--module", "net.0", "--dynamic", "input:0=rows", "--no-bench")
    done = command("export", shop / "best.ckpt", *chosen, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = report["model"]
    assert model["class"].endswith("Linear")
    assert report["baseline"] is None
    assert model["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["rows", 4]}]


STEPS = """
from torch import nn

class Halved(nn.Module):
    def forward(self, raw):
        return raw.float() / 2

class Sized(nn.Module):
    def __init__(self, size):
        super().__init__()

def tallest(answer):
    return answer["y"].argmax(-1)
"""


def test_steps_around_a_model_are_named_as_the_model_is(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    np.savez(tmp_path / "raw.npz", raw=np.arange(12, dtype=np.uint8).reshape(3, 4))
    words = ("--inputs", tmp_path / "raw.npz", "-f", "torchscript", "--into", tmp_path / "out", "--json")
    steps = ("--preprocess", "steps.py:Halved", "--postprocess", "steps.py:tallest")
    done = command("export", shop / "best.ckpt", "--model", shop / "shop.py:Net", *steps, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert [(each["name"], each["dtype"]) for each in (*model["inputs"], *model["outputs"])] == [
        ("raw", "uint8"),
        ("output_0", "int64"),
    ]
    assert model["processing"] == {"preprocess": "Halved()", "postprocess": "tallest"}
    wrong = ("--preprocess", "steps.py:Sized", *words)
    done = command("export", shop / "best.ckpt", "--model", shop / "shop.py:Net", *wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert "steps.py:Sized() failed: TypeError" in done.stderr


@pytest.mark.parametrize("words", [("-h",), ("export", "-h"), ("toolchain", "-h"), ("toolchain", "list", "-h")])
def test_help_has_a_short_name(words: tuple[str, ...]) -> None:
    assert "Usage" in CliRunner().invoke(app, words).stdout


@pytest.mark.parametrize("words", [("-h",), ("formats",)])
def test_a_terminal_may_have_ascii_only(words: tuple[str, ...]) -> None:
    done = CliRunner(charset="ascii").invoke(app, words)
    assert (done.exit_code, done.exception) == (0, None)


def test_every_command_is_on_its_page() -> None:
    page = Path(__file__).parents[1] / "docs" / "command.md"
    names = [command.name for command in app.registered_commands]
    assert [name for name in names if f"polyexport {name} " not in page.read_text(encoding="utf-8")] == []


def test_the_version_is_that_of_the_package() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"lightning-export {version('lightning-export')}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume", "nowhere"], "there is no folder nowhere; give the folder of a run's exports"),
        (["accept", "nowhere.json"], "there is no nowhere.json; give the proof.json that a kit wrote"),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(words, said):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert said in done.stderr
