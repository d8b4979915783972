"""ExecuTorch and MNN, which are also the proof that a format is one file and one requirement file."""

from __future__ import annotations

from pathlib import Path

import pytest

import polyexport
import zoo

NAMES = ("executorch", "mnn")


@pytest.mark.slow  # its environment is a large one
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_verified_at_every_batch_size(name: str, tmp_path: Path) -> None:
    module, inputs = zoo.build("dict_output")
    report = polyexport.export(module, inputs, [name], tmp_path / "export", bench=False)
    (outcome,) = report.outcomes
    assert outcome.state == "verified", outcome.reason
    assert {sizes["batch"] for sizes in outcome.parity.batches} == {1, 3, zoo.BATCH}
