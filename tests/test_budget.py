"""The budget of the user's own metric: within, outside, undecided, and budgets that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import polyexport
import runs
from lightning_export import ExportCallback
from planted import GOOD, mended_by_float, mended_not_at_all, never_mended, planted, replay, wrong
from polyexport import BadRequest, Budget, Engine, Format, Outcome, Report
from polyexport.engine.judge import judged
from polyexport.measure.budget import budgets, directed, overdrawn

TURNED, TURNED_INT8 = planted("turned", wrong), planted("turned-int8", wrong, precision="int8")
"""Answer the negative of what PyTorch does, which parity finds in both."""


# --- the number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "ours", "theirs", "is_within"),
    [
        (Budget(0.01, "max"), 0.90, 0.89, True),
        (Budget(0.01, "max"), 0.90, 0.889, False),
        (Budget(0.01, "max"), 0.90, 0.99, True),
        (Budget(0.01, "min"), 0.90, 0.99, False),
        (Budget("2%", "min"), 0.50, 0.51, True),
        (Budget("2%", "min"), 0.50, 0.511, False),
        (Budget("2%", "min"), -2.0, -1.97, True),
        (Budget(0.0, "max"), 0.90, 0.90, True),
        (Budget(0.01, "max"), 0.90, float("nan"), False),
        (Budget(0.01, "max"), None, 0.90, False),
    ],
)
def test_a_loss_larger_than_the_budget_is_outside(budget, ours, theirs, is_within):
    assert (overdrawn({"m": budget}, {"m": ours}, {"m": theirs}) == "") == is_within


def test_the_reason_has_the_metric_both_values_and_the_budget():
    said = overdrawn({"val_acc": Budget(0.01, "max")}, {"val_acc": 0.9}, {"val_acc": 0.5})
    assert said == "val_acc is 0.5, PyTorch has 0.9, the budget is 0.01"


@pytest.mark.parametrize("most", ["2", "-1%", "a bit", -0.1, float("nan"), True, None])
def test_an_invalid_budget_is_refused_at_once(most):
    with pytest.raises(
        BadRequest, match=r"give how much worse the metric may be, such as 0\.01, or a share, such as '2%'"
    ):
        ExportCallback(["onnx"], budget={"val_acc": most})


def test_whether_higher_is_better_is_not_guessed():
    with pytest.raises(BadRequest, match=r"it is unknown which way val_acc is better; .*mode='max'"):
        directed(budgets({"val_acc": 0.01}), {"val_loss": "min"})
    assert directed(budgets({"val_loss": "2%"}), {"val_loss": "min"}) == {"val_loss": Budget("2%", "min")}
    with pytest.raises(BadRequest, match="known: 'min' if lower is better, 'max' if higher is"):
        Budget(0.1, mode="up")


def test_a_configuration_file_can_say_it():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ExportCallback, "export")
    given = parser.parse_object(
        {"export": {"formats": ["onnx"], "budget": {"a": 0.01, "b": "2%", "c": {"most": 0.1, "mode": "max"}}}}
    )
    made = parser.instantiate_classes(given).export.options.budget
    assert made == {"a": Budget(0.01), "b": Budget("2%"), "c": Budget(0.1, "max")}


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    """Three artifacts, two of which are turned, by a metric that no sign changes."""
    torch.manual_seed(1)  # no output is near zero, where a sign says nothing
    x = torch.rand(4, 3)

    def size(run) -> dict[str, float]:
        return {"size": float(np.abs(run({"input": x.numpy()})["output_0"]).mean())}

    return polyexport.export(
        torch.nn.Linear(3, 2),
        x,
        [GOOD, TURNED, TURNED_INT8],
        tmp_path_factory.mktemp("budget") / "out",
        bench=False,
        metric=size,
        budget={"size": Budget("1%", mode="min")},
    )


def test_within_the_budget_a_low_precision_is_verified_whatever_single_elements_do(report):
    outcome = report["turned-int8"]
    assert (outcome.state, outcome.reason, outcome.by_budget) == ("verified", "", True)
    assert outcome.remark.startswith("within the budget, although element by element: output_0: 100.000%")


def test_a_float_format_has_to_agree_element_by_element_as_well(report):
    assert (report["turned"].state, report["turned"].metrics) == ("mismatch", {})
    assert (report["good"].state, report["good"].by_budget) == ("verified", False)


def test_the_table_has_a_column_with_what_the_metric_changed_by(report):
    assert "| metric change |" in (report.folder / "report.md").read_text()
    assert {row["format"]: row["metric change"] for row in polyexport.report.report.rows(report)} == {
        "good": "size 0",
        "turned": "",
        "turned-int8": "size 0",
    }
    assert Report.load(report.folder) == report


def test_a_budget_still_applies_when_an_export_is_verified_again(report):
    with Engine() as engine:
        again = engine.verify(report, [GOOD, TURNED, TURNED_INT8])
    assert [each.state for each in again.outcomes] == ["verified", "mismatch", "verified"]


def test_outside_of_the_budget_is_a_mismatch_in_every_precision(tmp_path):
    x, formats = torch.rand(4, 3), [planted("low", wrong, precision="int8"), GOOD]
    loose = replace(planted("loose", wrong), tolerance=polyexport.Tolerance(None, None, 1.0, -1.0, 0.0))
    made = polyexport.export(
        torch.nn.Linear(3, 2),
        x,
        [*formats, loose],
        tmp_path / "out",
        bench=False,
        metric=lambda run: {"mean": float(run({"input": x.numpy()})["output_0"][0, 0])},
        budget={"mean": Budget(0.0, mode="max"), "gone": Budget(1.0, mode="max")},
    )
    assert [each.state for each in made.outcomes] == ["mismatch", "degraded", "degraded"]
    assert "budget for gone, which validation does not log; it logs mean" in made["good"].reason
    sign = 1 if made.metrics["mean"] > 0 else -1
    budget = {"mean": Budget(0.0, mode="max" if sign > 0 else "min")}
    for each in made.outcomes:
        worse = judged(replace(each, metrics={"mean": -made.metrics["mean"]}), made.metrics, budget)
        assert worse.state == "mismatch"
        assert worse.reason.startswith("outside the budget: mean is ")


def test_a_metric_that_fails_leaves_the_budget_undecided(tmp_path):
    x, times = torch.rand(4, 3), iter([0])

    def once(run) -> dict[str, float]:
        return {"m": float(next(times))}

    budget = {"m": Budget(1.0, mode="max")}
    module, formats = torch.nn.Linear(3, 2), [planted("one", replay)]
    made = polyexport.export(module, x, formats, tmp_path / "out", bench=False, metric=once, budget=budget)
    assert made["one"].state == "degraded"
    assert made["one"].reason.startswith("not known to be within the budget: StopIteration")


def test_a_budget_without_a_metric_is_refused_at_once(tmp_path):
    with pytest.raises(BadRequest, match="a budget for m, but no metric; give metric="):
        polyexport.export(
            torch.nn.Linear(3, 2), torch.rand(2, 3), [GOOD], tmp_path / "x", budget={"m": Budget(1, "max")}
        )


def test_the_best_is_the_one_that_loses_the_least(report):
    lost = replace(report["good"], format="worse", metrics={"size": report.metrics["size"] + 1.0})
    both = replace(report, outcomes=(report["good"], lost))
    assert both.best(max_drop=0.0).format == "good"
    assert replace(both, outcomes=(lost,)).best(max_drop=0.5) is None
    assert replace(both, outcomes=(lost,)).best(max_drop=1.5).format == "worse"
    assert replace(both, budget={}).best(max_drop=1.0) is None


# --- rounds -----------------------------------------------------------------------------------------------------------


def mending(name: str, convert: object, **more: object) -> Format:
    """A format in int8 that can be made with more in float."""
    made = planted(name, convert, precision="int8", **more)
    return replace(made, routes=tuple(replace(route, mends=True) for route in made.routes))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory) -> Report:
    """Four formats in int8, all of which are turned at first."""
    torch.manual_seed(1)
    x, folder = torch.rand(4, 3), tmp_path_factory.mktemp("rounds")
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        reference = module(x).numpy()

    def right(run) -> dict[str, float]:
        return {"right": float((np.sign(run({"input": x.numpy()})["output_0"]) == np.sign(reference)).mean())}

    formats = [
        mending("mended", mended_by_float),
        mending("stubborn", never_mended),
        mending("refused", mended_not_at_all),
        planted("fixed", never_mended, precision="int8"),
    ]
    budget = {"right": Budget(0.01, mode="max")}
    return polyexport.export(module, x, formats, folder / "out", bench=False, metric=right, budget=budget)


def test_layers_go_back_to_float_until_the_metric_is_within_the_budget(rounds):
    outcome = rounds["mended"]
    assert (outcome.state, outcome.reason, outcome.metrics) == ("verified", "", {"right": 1.0})
    assert [(each.share, each.metrics["right"], each.chosen) for each in outcome.rounds] == [
        (0.0, 0.0, False),
        (0.125, 0.0, False),
        (0.25, 1.0, True),
    ]
    assert [each.bytes for each in outcome.rounds] == sorted({each.bytes for each in outcome.rounds})


def test_the_artifact_within_the_budget_replaces_the_first_one(rounds):
    artifact = rounds["mended"].artifact
    assert artifact.path == "mended/model.json"
    assert json.loads((rounds.folder / artifact.path).read_text())["factor"] == 1.0
    with Engine() as engine:
        again = engine.verify(rounds, [mending("mended", mended_by_float)])
    assert (again["mended"].state, again["mended"].artifact) == ("verified", artifact)


def test_if_no_round_is_within_the_budget_the_first_artifact_stays(rounds):
    outcome = rounds["stubborn"]
    assert outcome.state == "mismatch"
    assert "right is 0, PyTorch has 1, the budget is 0.01" in outcome.reason
    assert outcome.reason.endswith("with 50.0% of its layers in float it still is")
    assert [(each.share, each.chosen) for each in outcome.rounds] == [
        (0.0, True),
        (0.125, False),
        (0.25, False),
        (0.5, False),
    ]
    assert outcome.artifact.path == "stubborn/model.json"


def test_a_round_that_fails_leaves_the_artifact_as_it_is(rounds):
    outcome = rounds["refused"]
    assert (outcome.state, len(outcome.rounds)) == ("mismatch", 1)
    assert "with 12.5% of its layers in float: ValueError: no layer can be kept" in outcome.reason


def test_a_format_without_layers_in_float_is_tried_once(rounds):
    assert (rounds["fixed"].state, rounds["fixed"].rounds) == ("mismatch", ())


def test_the_report_keeps_and_shows_the_rounds(rounds):
    assert Report.load(rounds.folder) == rounds
    page, text = ((rounds.folder / name).read_text() for name in ("report.html", "report.md"))
    assert "mended: size against right" in page
    assert page.count('class="ring"') == 3  # one in the picture of each format that was tried again
    assert "| 25.0% |" in text
    assert text.count("| yes |") == 3


# --- in a training run ------------------------------------------------------------------------------------------------


def fit(folder: Path, **settings) -> list[Report]:
    export = ExportCallback([GOOD], into=folder / "exports", bench=False, publish=(), **settings)
    callbacks = [ModelCheckpoint(folder, monitor="val_loss"), export]
    trainer = runs.trainer(folder, callbacks, max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(runs.Noisy(), runs.loader(), runs.loader())
    return export.reports


def test_whether_higher_is_better_comes_from_the_checkpoint_that_monitors_it(tmp_path):
    (made,) = fit(tmp_path, budget={"val_loss": "1%"}, metric_batches=1)
    assert (made["good"].state, made["good"].metrics) == ("verified", made.metrics)
    assert made.budget == {"val_loss": Budget("1%", mode="min")}


def test_a_metric_that_nothing_monitors_needs_a_mode_when_fit_starts(tmp_path):
    with pytest.raises(BadRequest, match="it is unknown which way val_acc is better"):
        fit(tmp_path, budget={"val_acc": 0.01})


def test_a_metric_that_is_not_logged_is_reported_in_the_sanity_check(tmp_path):
    with pytest.raises(BadRequest, match="budget for val_acc, which validation does not log; it logs val_loss"):
        fit(tmp_path, budget={"val_acc": Budget(0.01, mode="max")})


def test_without_a_number_of_batches_all_of_the_validation_set_counts(tmp_path):
    """The planted runtime knows the first two batches only, so the third fails."""
    (made,) = fit(tmp_path, budget={"val_loss": "1%"})
    assert made["good"].state == "degraded"
    assert "inputs that were never run" in made["good"].reason


def test_outcomes_without_a_run_are_not_judged():
    skipped = Outcome("a", "int8", "skipped", reason="no tool")
    assert judged(skipped, {"m": 1.0}, {}) == skipped
