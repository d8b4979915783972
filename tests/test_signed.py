"""A signature over an export, checked by us and by the signer's own command; and its bill of materials."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from lightning_export import BillOfMaterials, Signed
from made_up import outcome
from polyexport import BadRequest, Report, Toolchain
from polyexport.cli import app
from polyexport.errors import NotSigned
from polyexport.publish.bom import BOM
from polyexport.publish.signed import SIGNATURE, check
from polyexport.report.files import save

VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(str(found) if found else 0)
"""


def keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    form, pem = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(small: Report, tmp_path: Path) -> tuple[Report, Path]:
    """A signed export of one's own, and the public key."""
    private, public = keys(tmp_path)
    report = Report.load(shutil.copytree(small.folder, tmp_path / "out"))
    Signed(private)(report)
    return report, public


def test_an_export_is_what_was_signed(signed: tuple[Report, Path]):
    report, public = signed
    assert check(report, public) == ("torchscript", "pt2", "onnx")


def test_the_signers_own_command_agrees(signed: tuple[Report, Path]):
    report, public = signed
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(report.folder), "--ignore_unsigned_files"]
    given = ["--signature", str(report.folder / SIGNATURE), "--public_key", str(public)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (report.folder / "onnx" / "model.onnx").write_bytes(b"another")
    assert subprocess.run([*command, *given], capture_output=True, check=False).returncode != 0


def test_writing_a_report_again_does_not_break_the_signature(signed: tuple[Report, Path]):
    report, public = signed
    save(replace(report, seconds=1.0))
    check(Report.load(report.folder), public)


def remove(file: Path) -> None:
    file.unlink()


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def add(file: Path) -> None:
    file.write_text("new")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("onnx/model.onnx", change),
        ("onnx/model.onnx", remove),
        ("onnx/more.bin", add),
        ("pt2/polyexport.json", change),
        (BOM, change),
        (BOM, remove),
        (SIGNATURE, change),
        ("validation_batch.npz", change),
        ("manifest.json", change),
    ],
)
def test_whatever_was_changed_is_found(signed: tuple[Report, Path], file: str, what: Callable[[Path], None]):
    report, public = signed
    what(report.folder / file)
    with pytest.raises(NotSigned, match=r"is not what was signed|was changed after it was signed"):
        check(report, public)


def test_a_signature_by_another_key_is_reported(signed: tuple[Report, Path], tmp_path: Path):
    (tmp_path / "other").mkdir()
    _, public = keys(tmp_path / "other")
    with pytest.raises(NotSigned, match=r"is not what was signed by .*public\.pem"):
        check(signed[0], public)


def test_an_artifact_that_was_not_signed_is_reported(signed: tuple[Report, Path]):
    report, public = signed
    more = replace(report, outcomes=(*report.outcomes, outcome("tflite", "verified", megabytes=1.0, error=0.0)))
    with pytest.raises(NotSigned, match="has artifacts that are not signed: tflite"):
        check(more, public)


def test_an_export_without_a_signature_is_reported(small: Report, tmp_path: Path):
    with pytest.raises(BadRequest, match=r"has no signature: model\.sig, which Signed\(key\) writes"):
        check(small, keys(tmp_path)[1])


def test_the_command_runs_nothing_that_is_not_what_was_signed(signed: tuple[Report, Path]):
    report, public = signed
    change(report.folder / "onnx" / "model.onnx")
    done = CliRunner().invoke(app, ["verify", str(report.folder), "--key", str(public)])
    assert done.exit_code == 1
    assert "is not what was signed" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("text", ["no key", "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_not_a_key_is_refused(small: Report, tmp_path: Path, text: str):
    (tmp_path / "key.pem").write_text(text)
    with pytest.raises(BadRequest, match=r"key\.pem is not a private key that can sign: "):
        Signed(tmp_path / "key.pem")(Report.load(shutil.copytree(small.folder, tmp_path / "out")))


def test_a_missing_key_is_refused_at_once():
    with pytest.raises(BadRequest, match=re.escape("key='nowhere.pem': there is no such file")):
        Signed("nowhere.pem")


def test_a_missing_signer_is_reported_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("polyexport.publish.signed.find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"signatures require model-signing; install with `pip install"):
        Signed("key.pem")


# --- the bill of materials --------------------------------------------------------------------------------------------


@pytest.fixture
def report(small: Report, tmp_path: Path) -> Report:
    metrics = {"val_acc": 0.5}
    copied = Report.load(shutil.copytree(small.folder, tmp_path / "out"))
    onnx = replace(copied["onnx"], metrics=metrics)
    return replace(copied, metrics=metrics, outcomes=(onnx, *copied.outcomes[:2], outcome("tflite", "failed", "why")))


def test_it_is_a_valid_bill_of_materials(report: Report):
    BillOfMaterials()(report)
    python = Toolchain("cyclonedx", ("cyclonedx-python-lib[json-validation]",)).interpreter(print)
    given = (report.folder / BOM).read_text(encoding="utf-8")
    done = subprocess.run([python, "-c", VALIDATE], input=given, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    broken = given.replace('"machine-learning-model"', '"machine"')
    done = subprocess.run([python, "-c", VALIDATE], input=broken, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode != 0


def test_it_has_each_file_with_its_hash_and_what_made_it(report: Report):
    BillOfMaterials()(report)
    found = json.loads((report.folder / BOM).read_text(encoding="utf-8"))
    by_ref = {each["bom-ref"]: each for each in found["components"]}
    assert {each["ref"]: each["dependsOn"] for each in found["dependencies"]}["model"] == ["onnx", "torchscript", "pt2"]
    for name in ("onnx", "torchscript", "pt2"):
        files = {file["name"]: file["hashes"][0]["content"] for file in by_ref[name]["components"]}
        there = [path for path in (report.folder / name).rglob("*") if path.is_file()]
        assert files == {
            path.relative_to(report.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in there
        }
    properties = {each["name"]: each["value"] for each in by_ref["onnx"]["properties"]}
    assert properties["polyexport:state"] == "verified"
    assert properties["polyexport:precision"] == "float32"
    assert float(properties["polyexport:max_abs_error"]) == report["onnx"].parity.max_abs_error
    uses = next(each["dependsOn"] for each in found["dependencies"] if each["ref"] == "onnx")
    assert {by_ref[ref]["name"] for ref in uses} >= {"onnx", "onnxruntime"}
    assert "file:validation_batch.npz" in by_ref
    assert "tflite" not in by_ref


def test_the_same_export_has_the_same_bill(report: Report):
    BillOfMaterials()(report)
    first = (report.folder / BOM).read_bytes()
    BillOfMaterials()(report)
    assert (report.folder / BOM).read_bytes() == first
