"""A kit, run by another interpreter that has the runtime alone, and what comes back from it."""

from __future__ import annotations

import ast
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import aarch64
import environments
from every_format import Everything
from polyexport import FORMATS, BadRequest, Outcome, Report
from polyexport.kit.accept import accept, settled
from polyexport.kit.make import make, program
from polyexport.kit.prove import PROGRAM, PROOF, VERSION, table
from polyexport.measure.latency import summarize
from polyexport.measure.parity import OutputParity, Parity
from polyexport.report.folders import DESCRIPTION
from polyexport.report.outcome import Artifact, Checkpoint, Proof
from polyexport.report.report import proofs
from polyexport.serialization import read_json, write_json
from polyexport.spec import read_arrays, write_arrays
from polyexport.workers.toolchain import Toolchain

RUNTIMES = dict(zip(("onnx", "openvino", "tflite"), environments.RUNTIMES, strict=True))


@pytest.fixture(scope="session")
def device() -> str:
    """The Python of an environment that has runtimes and numpy, and neither PyTorch nor us."""
    return str(Toolchain("kit", environments.RUNTIMES).interpreter(print))


def copied(report: Report, into: Path) -> Path:
    """The export once more, without what it was made from."""
    return shutil.copytree(report.folder, into, ignore=shutil.ignore_patterns("made", "jobs"))


def run(python: str | Sequence[str], kit: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [python] if isinstance(python, str) else python
    return subprocess.run([*command, "-I", *flags, str(kit / PROGRAM)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_another_interpreter_proves_stands_in_the_report(
    name: str, everything: Everything, device: str, tmp_path: Path
):
    export = copied(everything.report, tmp_path / "out")
    archive = make(export / name, archive=True)
    assert archive == Path(f"out-{name}-kit.zip")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall("there")
    kit = Path("there", f"out-{name}-kit")
    done = run(device, kit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name} agrees with PyTorch\non {RUNTIMES[name]} ")

    copied(everything.report, tmp_path / "wandb" / "out").joinpath(
        "validation_batch.npz"
    ).unlink()  # as loggers have it
    report, proven = accept(kit / PROOF, tmp_path)
    assert proven == name
    assert report.folder == export
    (proof,) = report[name].proofs
    assert proof.runtime.startswith(f"{RUNTIMES[name]} ")
    assert proof.latency.samples == 100
    assert report[name].state == everything.report[name].state
    assert Report.load(export) == report
    for file in ("report.html", "report.md"):
        assert proof.runtime in (export / file).read_text()


def test_an_arm_processor_proves_an_artifact_of_this_machine(small: Report, tmp_path: Path):
    try:
        emulated = aarch64.python()
    except aarch64.Unavailable as why:
        pytest.skip(str(why))
    export = copied(small, tmp_path / "out")
    kit = make(export / "onnx", tmp_path / "kit")
    done = run(emulated, kit)
    assert done.returncode == 0, done.stderr
    report, _ = accept(kit / PROOF, export)
    (proof,) = report["onnx"].proofs
    assert proof.runtime == aarch64.RUNTIMES[0].replace("==", " ")
    assert proof.machine.endswith(", aarch64 (Cortex-A72)")
    assert proof.verified_by == f"{proof.runtime}, {proof.machine}"
    assert proof.parity.passed
    for file in ("report.html", "report.md"):
        assert proof.verified_by in (export / file).read_text()


def test_a_kit_whose_artifact_or_data_was_changed_proves_nothing(small: Report, tmp_path: Path, device: str):
    for file in ("onnx/model.onnx", "validation_batch.npz"):
        kit = make(small.folder / "onnx", tmp_path / "kit")
        content = bytearray((kit / file).read_bytes())
        content[len(content) // 2] ^= 1
        (kit / file).write_bytes(content)
        done = run(device, kit)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{file} was changed after the kit was made" in done.stderr
        assert not (kit / PROOF).exists()


def test_a_wrong_answer_there_is_a_mismatch_here(small: Report, tmp_path: Path, device: str):
    export = copied(small, tmp_path / "out")
    batch = read_arrays(export / "validation_batch.npz")
    batch["output_0"][0, 1] *= -1
    write_arrays(export / "validation_batch.npz", batch)
    kit = make(export / "onnx", tmp_path / "kit")
    done = run(device, kit)
    assert done.returncode == 1
    assert "onnx does not agree with PyTorch: output_0: 8.333% of the elements are off" in done.stdout
    report, _ = accept(kit / PROOF, export)
    assert report["onnx"].state == "mismatch"
    assert report["onnx"].reason.startswith("on onnxruntime ")
    about = read_json(export / "onnx" / DESCRIPTION)
    assert about["state"] == "mismatch"
    assert about["verified_by"] == [report["onnx"].proofs[0].verified_by]


def test_a_machine_without_numpy_is_told_what_to_install(small: Report, tmp_path: Path, device: str):
    kit = make(small.folder / "onnx", tmp_path / "kit")
    done = run(device, kit, "-S")
    assert (done.returncode, done.stderr) == (1, "numpy is not installed: pip install onnxruntime numpy\n")


def test_a_runtime_that_ends_by_a_signal_leaves_where_it_was(small: Report, tmp_path: Path, device: str):
    kit = make(small.folder / "onnx", tmp_path / "kit")
    with zipfile.ZipFile(kit / PROGRAM, "a") as packed:
        packed.writestr("onnxruntime.py", "import os\nos.kill(os.getpid(), 4)\n")
    done = run(device, kit)
    assert done.returncode == -4
    assert "Fatal Python error: Illegal instruction" in done.stderr
    assert "polyexport/formats/onnx.py" in done.stderr


def test_all_that_a_kit_brings_is_python_3_10(small: Report, tmp_path: Path):
    for each in (each for each in FORMATS.values() if each.on_device):
        file = tmp_path / "program.zip"
        file.write_bytes(program(each, "x"))
        with zipfile.ZipFile(file) as packed:
            names = [name for name in packed.namelist() if name.endswith(".py")]
            assert "polyexport/measure/parity.py" in names
            assert not [name for name in names if name.startswith(("polyexport/engine", "polyexport/publish"))]
            for name in names:
                ast.parse(packed.read(name), feature_version=(3, 10))


def test_the_same_kit_is_the_same_bytes(small: Report):
    assert program(FORMATS["onnx"], "x") == program(FORMATS["onnx"], "x")


def test_what_has_no_kit_says_what_has(small: Report, tmp_path: Path):
    with pytest.raises(BadRequest, match=r"pt2 has no kit; formats with one: coreml.*, onnx, "):
        make(small.folder / "pt2", tmp_path / "kit")
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadRequest, match="mine exists and is not a kit; give another name with --into"):
        make(small.folder / "onnx", tmp_path / "mine")
    export = copied(small, tmp_path / "out")
    (export / "onnx" / "model.onnx").write_bytes(b"other")
    with pytest.raises(BadRequest, match="was changed after the export"):
        make(export / "onnx", tmp_path / "kit")


# --- what a proof does to an outcome ----------------------------------------------------------------------------------

FIGURES = OutputParity(1e-6, 2.0, 0.0, 1.0, 90.0, None, 1e-7)
GOOD = Parity(True, "", {"y": FIGURES})
BAD = Parity(False, "y: cosine similarity 0.5 is under 0.99999", {"y": FIGURES})


def proof(parity: Parity = GOOD, runtime: str = "coremltools 9.0", **more: str) -> Proof:
    latency = summarize([1.0], batch=4, threads=2, device="cpu", load_seconds=0.1, first_ms=2.0, peak_memory_bytes=None)
    about = {"elsewhere": "", "shortfall": ""} | more
    limits = FORMATS["coreml"].limits
    return Proof("coreml", "ab", {}, limits, runtime, "macOS 15.2, Apple M3", parity, latency=latency, **about)


def outcome(state: str = "verified", parity: Parity | None = None, reason: str = "") -> Outcome:
    return Outcome("coreml", "float32", state, reason, artifact=Artifact("coreml/m", 1, "ab"), parity=parity)


def test_what_a_stand_in_ran_is_verified_by_the_device_itself():
    before = outcome(parity=replace(GOOD, off_device=True, verified_by="MIL program evaluated off-device"))
    assert before.shown_state == "verified off-device"
    after = settled(before, proof(replace(GOOD, verified_by="Core ML")))
    assert (after.state, after.shown_state, after.parity.verified_by) == ("verified", "verified", "Core ML")


@pytest.mark.parametrize("state", ["unverified", "mismatch"])
def test_what_nothing_here_could_run_is_verified_there(state: str):
    parity = replace(BAD, off_device=True) if state == "mismatch" else None
    after = settled(outcome(state, parity, "nothing here can run it"), proof())
    assert (after.state, after.reason, after.parity) == ("verified", "", GOOD)


def test_the_worst_of_all_machines_counts_until_that_one_agrees():
    wrong = settled(outcome(parity=GOOD), proof(BAD))
    assert (wrong.state, wrong.reason) == ("mismatch", f"on coremltools 9.0, macOS 15.2, Apple M3: {BAD.reason}")
    both = settled(wrong, proof(GOOD, "coremltools 9.1"))
    assert (both.state, len(both.proofs)) == ("mismatch", 2)
    again = settled(both, proof(GOOD))
    assert (again.state, again.reason, len(again.proofs), again.parity) == ("verified", "", 2, GOOD)


def test_what_it_lacks_there_or_lacked_here_stays_said():
    after = settled(outcome(parity=GOOD), proof(elsewhere="on rows negated: y: off"))
    assert (after.state, after.reason[-23:]) == ("degraded", "on rows negated: y: off")
    static = settled(outcome("degraded", replace(GOOD, off_device=True), "static shapes only"), proof())
    assert (static.state, static.reason) == ("degraded", "static shapes only")
    assert settled(outcome("mismatch", BAD, BAD.reason), proof()).state == "mismatch"  # its own runtime ran it here


def test_what_was_made_without_a_step_is_not_verified_by_a_device():
    made = replace(outcome("unverified", None, "begins behind preprocess; no GPU"), outside=("preprocess",))
    after = settled(made, proof())
    assert (after.state, after.parity) == ("degraded", GOOD)
    assert after.reason == "begins behind preprocess, which the application has to run first"


def test_the_table_of_proofs_has_the_state_of_each():
    assert [proof(*given).judgement.state for given in ((GOOD,), (BAD,))] == ["verified", "mismatch"]
    degraded = replace(settled(outcome(), proof(elsewhere="on rows negated: y: off")))
    (row,) = proofs(Report(Checkpoint(""), None, (degraded,)))
    assert row["state"] == "degraded"


def test_a_proof_of_something_else_is_refused(small: Report, tmp_path: Path, device: str):
    export = copied(small, tmp_path / "out")
    kit = make(export / "onnx", tmp_path / "kit")
    assert run(device, kit).returncode == 0
    given = read_json(kit / PROOF)
    assert given["version"] == VERSION

    def refused(**changed: object) -> str:
        write_json(tmp_path / "changed.json", given | changed)
        with pytest.raises(BadRequest) as caught:
            accept(tmp_path / "changed.json", export)
        return str(caught.value)

    assert "no export in" in refused(sha256="0" * 64)
    assert "was judged by another tolerance" in refused(tolerance=given["tolerance"] | {"cosine": 0.5})
    assert "with other data than" in refused(data={})
    assert "validation_batch.npz" in refused(data=given["data"] | {"validation_batch.npz": "0" * 64})
    assert "with other data than" in refused(data=given["data"] | {"../secret": "0" * 64})
    assert "has version 9" in refused(version=9)
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"text\.json cannot be read"):
        accept(tmp_path / "text.json", export)
    assert Report.load(export)["onnx"].proofs == ()


def test_without_an_edge_tpu_its_kit_says_what_is_missing(device: str, tmp_path: Path):
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "program.zip")!r})
from pathlib import Path
from polyexport.errors import CannotRun
from polyexport.formats.edgetpu import load_on_coral
from polyexport.spec import ExportSpec
try:
    load_on_coral(Path("model_edgetpu.tflite"), ExportSpec((), ()), threads=1)
except CannotRun as error:
    print(error)
"""
    (tmp_path / "program.zip").write_bytes(program(FORMATS["edgetpu"], "x"))
    done = subprocess.run([device, "-I", "-c", code], capture_output=True, text=True, check=False)
    missing = "there is no Edge TPU here, or no libedgetpu.so.1 (see https://coral.ai/"
    assert done.stdout.startswith(missing), done.stderr


def test_the_table_names_machine_and_figures():
    assert table(proof(BAD))[:2] == [
        f"coreml does not agree with PyTorch: {BAD.reason}",
        "on coremltools 9.0, macOS 15.2, Apple M3",
    ]
    assert table(proof())[3].split() == ["y", "1.0e-06", "0.000%", "1.000000"]
