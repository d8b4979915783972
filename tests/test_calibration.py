"""The batches that quantized formats take their number ranges from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import polyexport
import runs
from lightning_export import ExportCallback
from planted import GOOD, calibrates, planted
from polyexport import BadRequest
from polyexport.spec import ExportSpec, TensorSpec, calibration, write_arrays

RANGES = planted("ranges", calibrates, calibrated=True)


def seen(folder: Path) -> list[list[list[float]]]:
    """The batches that the converter got."""
    batches: list[list[list[float]]] = json.loads((folder / "ranges" / "model.json").read_text())["batches"]
    return batches


@pytest.mark.parametrize(("wanted", "sanity"), [(3, 2), (8, 0)])
def test_the_first_validation_batches_reach_the_converter(tmp_path, wanted, sanity):
    callback = ExportCallback([RANGES], calibration_batches=wanted, into=tmp_path / "out", publish=(), bench=False)
    trainer = runs.trainer(tmp_path, [callback], max_epochs=1, num_sanity_val_steps=sanity)
    trainer.fit(runs.Scripted(), runs.loader(), runs.loader())
    (report,) = callback.reports
    assert (report["ranges"].state, [note.kind for note in report.notes]) == ("verified", ["precision"])
    expected = [batch[0].tolist() for batch in runs.loader()][:wanted]
    assert seen(report.folder) == expected


def test_the_inputs_function_is_called_for_each_batch(tmp_path):
    callback = ExportCallback(
        [RANGES],
        calibration_batches=2,
        inputs=lambda batch: batch[0][:2],
        into=tmp_path / "out",
        publish=(),
        bench=False,
    )
    runs.trainer(tmp_path, [callback], max_epochs=1).fit(runs.Scripted(), runs.loader(), runs.loader())
    (report,) = callback.reports
    assert seen(report.folder) == [batch[0][:2].tolist() for batch in runs.loader()][:2]


def test_two_batches_are_kept_if_no_format_calibrates(tmp_path):
    callback = ExportCallback([GOOD], into=tmp_path / "out", publish=(), bench=False)
    runs.trainer(tmp_path, [callback], max_epochs=1).fit(runs.Scripted(), runs.loader(), runs.loader())
    (report,) = callback.reports
    assert sorted(path.name for path in (report.folder / "source").glob("call*.pkl")) == ["call.pkl", "call_001.pkl"]


def test_zero_calibration_batches_are_refused():
    with pytest.raises(BadRequest, match="calibration_batches=0; give 1 or more"):
        ExportCallback([RANGES], calibration_batches=0)


def test_without_lightning_batches_are_passed_and_one_of_another_size_is_left_out(tmp_path):
    module, inputs = torch.nn.Linear(3, 2), torch.rand(4, 3)
    report = polyexport.export(
        module, inputs, [RANGES], tmp_path / "out", calibration=[inputs * 2, torch.rand(3), inputs[:1]], bench=False
    )
    assert seen(report.folder) == [inputs.tolist(), (inputs * 2).tolist(), inputs[:1].tolist()]
    assert [note.text for note in report.notes] == [
        "1 of 3 further batches have other arguments than the first, and are left out",
        "ranges: calibrated with 3 batches of 9 rows in all (validation_batch.npz, source/call_001.npz, "
        "source/call_003.npz)",
    ]


def test_by_default_the_validation_batch_calibrates(tmp_path):
    inputs = torch.rand(4, 3)
    report = polyexport.export(torch.nn.Linear(3, 2), inputs, [RANGES], tmp_path / "out", bench=False)
    assert seen(report.folder) == [inputs.tolist()]


def test_another_number_of_calibration_batches_is_another_export(tmp_path):
    module, inputs = torch.nn.Linear(3, 2), torch.rand(4, 3)
    for further in ([], [inputs * 2]):
        report = polyexport.export(module, inputs, [RANGES], tmp_path / "out", calibration=further, bench=False)
        assert len(seen(report.folder)) == 1 + len(further)


def test_a_fixed_batch_is_filled_or_split(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_arrays(tmp_path / "x.npz", {"x": x})
    for rows, expected in ((1, [[0], [1], [2]]), (2, [[0, 1], [2, 0]]), (5, [[0, 1, 2, 0, 1]]), ("batch", [[0, 1, 2]])):
        spec = ExportSpec((TensorSpec("x", "float32", (rows, 2)),), (), calibration=(tmp_path / "x.npz",))
        found = [batch["x"].tolist() for batch in calibration(spec)]
        assert found == [x[indices].tolist() for indices in expected]
