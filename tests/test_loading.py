"""A format's folder by itself: copied, renamed, or named by the file in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import polyexport
from polyexport import FORMATS, BadRequest, Report
from polyexport.publish.folder import copy_to
from polyexport.report.folders import DESCRIPTION


def answers(path: Path | str, report: Report) -> bool:
    with np.load(report.folder / "validation_batch.npz") as batch:
        (output,) = polyexport.load(path)({"input": batch["input"]}).values()
        return np.allclose(output, batch["output_0"], atol=1e-6)


@pytest.mark.parametrize("name", ["torchscript", "pt2", "onnx"])
def test_a_format_that_was_copied_out_of_its_export_is_loaded(small: Report, tmp_path: Path, name: str) -> None:
    shutil.copytree(small.folder / name, tmp_path / "model of today")
    assert answers(tmp_path / "model of today", small)
    assert answers(tmp_path / "model of today" / FORMATS[name].artifact, small)
    assert answers(small.folder / name / FORMATS[name].artifact, small)


def test_a_format_is_loaded_from_where_the_export_was_copied_to(small: Report) -> None:
    copy_to("memory://loaded/exports")(small)
    for path in ("best/onnx", "best/onnx/model.onnx", f"{small.folder.name}/torchscript"):
        assert answers(f"memory://loaded/exports/{path}", small)
    for path in ("best/onxx", "nowhere/onnx/model.onnx"):
        with pytest.raises(BadRequest, match=rf"memory://loaded/exports/{path} is not a format of an export"):
            polyexport.load(f"memory://loaded/exports/{path}")


def test_files_that_describe_an_artifact_are_not_part_of_it(small: Report) -> None:
    for outcome in small.outcomes:
        files = [file for file in (small.folder / outcome.format).iterdir() if file.name != DESCRIPTION]
        assert outcome.artifact.bytes == sum(file.stat().st_size for file in files)
        about = json.loads((small.folder / outcome.format / DESCRIPTION).read_text())
        assert (about["format"], about["state"]) == (outcome.format, "verified")


def test_a_format_that_cannot_be_loaded_names_those_that_can(small: Report, tmp_path: Path) -> None:
    onnx = small.folder / "onnx"
    for path, message in (
        (small.folder / "onxx", r"there is no .*onxx; .*out has onnx, pt2, torchscript"),
        (tmp_path / "onnx", r"there is no .*give a format's folder, such as exports/best/onnx"),
        (small.folder, r"is not a format of an export, but contains some: .*out/onnx, "),
        (tmp_path, r"there is no polyexport\.json next to the artifact"),
        (onnx / DESCRIPTION, r"is not the artifact of onnx; that is .*model\.onnx"),
    ):
        with pytest.raises(BadRequest, match=message):
            polyexport.load(path)
    shutil.copytree(onnx, tmp_path / "half")
    (tmp_path / "half" / DESCRIPTION).write_text("{}")
    with pytest.raises(BadRequest, match="cannot be read: TypeError"):
        polyexport.load(tmp_path / "half")
    (tmp_path / "half" / "model.onnx").unlink()
    shutil.copy(onnx / DESCRIPTION, tmp_path / "half")
    with pytest.raises(BadRequest, match="is not the artifact of onnx"):
        polyexport.load(tmp_path / "half")


def test_a_loaded_artifact_has_its_shortfall(small: Report, tmp_path: Path) -> None:
    assert polyexport.load(small.folder / "onnx").shortfall == ""
    shutil.copytree(small.folder / "onnx", tmp_path / "onnx")
    about = json.loads((tmp_path / "onnx" / DESCRIPTION).read_text())
    lost = {"state": "degraded", "reason": "ends in front of postprocess"}
    (tmp_path / "onnx" / DESCRIPTION).write_text(json.dumps(about | lost))
    assert polyexport.load(tmp_path / "onnx").shortfall == "ends in front of postprocess"
