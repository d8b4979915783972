"""ExecuTorch, which is also the proof that a format is one file and one requirement file."""

from __future__ import annotations

import pytest

import polyexport
import zoo


@pytest.mark.slow  # its environment is a large one
def test_a_model_is_verified_at_every_batch_size(tmp_path):
    module, inputs = zoo.build("dict_output")
    report = polyexport.export(module, inputs, ["pte"], tmp_path / "export", bench=False)
    (outcome,) = report.outcomes
    assert outcome.state == "verified", outcome.reason
    assert {sizes["batch"] for sizes in outcome.parity.batches} == {1, 3, zoo.BATCH}
