"""What to ship, and what got worse: both are computed from reports alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from made_up import outcome
from polyexport import Outcome, Report
from polyexport.cli import app
from polyexport.report.choice import choices
from polyexport.report.compare import Bounds, compare, rows, untimed
from polyexport.report.files import save
from polyexport.report.html import page
from polyexport.report.outcome import Checkpoint


def report(*outcomes: Outcome, folder: Path = Path()) -> Report:
    return Report(Checkpoint("a.ckpt"), None, outcomes, folder=folder)


FAST = outcome("openvino", "verified", megabytes=9.0, error=1e-6, ms=1.0)
SMALL = outcome("onnx", "verified", megabytes=3.0, error=1e-6, ms=2.0)


def shipped(*outcomes: Outcome) -> dict[str, str | None]:
    return {each.target: each.outcome and each.outcome.format for each in choices(report(*outcomes))}


def test_a_server_gets_the_fastest_and_a_phone_the_smallest():
    tflite = outcome("tflite", "verified", megabytes=2.0, error=1e-6, ms=0.1)
    coreml = outcome("coreml-fp16", "verified", megabytes=1.0, error=1e-3, ms=50.0)
    assert shipped(FAST, SMALL, tflite, coreml) == {"server CPU": "openvino", "phone": "coreml-fp16"}


def test_formats_without_latency_are_chosen_by_size():
    assert shipped(replace(FAST, latency=None), SMALL) == {"server CPU": "onnx"}


def test_of_artifacts_of_about_one_size_the_one_that_was_asked_for_first_is_chosen():
    graphdef = outcome("graphdef", "verified", megabytes=2.9, error=1e-6)
    (choice,) = choices(report(replace(SMALL, latency=None), graphdef))
    assert choice.outcome.format == "onnx"
    assert choice.why.startswith("about the smallest of 2 verified; ")
    assert shipped(replace(FAST, latency=None), graphdef) == {"server CPU": "graphdef"}


def test_a_degraded_format_is_chosen_only_if_no_other_is_left():
    lacking = outcome("onnx", "degraded", "static shapes only", megabytes=1.0, error=1e-6, ms=0.1)
    assert shipped(FAST, lacking) == {"server CPU": "openvino"}
    (choice,) = choices(report(lacking))
    assert choice.outcome == lacking
    assert choice.why.startswith("the only one degraded; ")
    assert choice.why.endswith("static shapes only")


def test_a_mismatch_is_never_shipped():
    (choice,) = choices(report(outcome("tfjs", "mismatch", "off", megabytes=1.0, error=1.0, ms=0.1)))
    assert (choice.target, choice.outcome, choice.why) == ("browser", None, "tfjs is mismatch")


def test_a_choice_that_a_stand_in_ran_says_how_to_prove_it():
    coreml = outcome("coreml", "verified", megabytes=1.0, error=1e-6)
    (choice,) = choices(report(replace(coreml, parity=replace(coreml.parity, off_device=True))))
    assert choice.why.endswith("not run on the device: verify it there with polyexport kit")


def test_what_only_its_device_can_run_says_how_to_prove_it():
    (choice,) = choices(report(outcome("tensorrt-rtx", "unverified", "there is no GPU")))
    assert (choice.outcome, choice.why) == (None, "tensorrt-rtx is unverified: verify it there with polyexport kit")


def test_the_page_answers_first():
    text = page(report(FAST, SMALL))
    assert text.index("What to ship</h2>") < text.index('<h2 id="formats">')
    assert "fastest of 2 verified; p50 " in text


def test_a_notebook_shows_the_page(tmp_path: Path):
    made = report(FAST, folder=tmp_path)
    assert made._repr_html_() is None  # it draws Markdown then
    save(made)
    shown = made._repr_html_()
    assert shown.startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;')
    assert '"' not in shown[shown.index('srcdoc="') + len('srcdoc="') : shown.index('" title=')]


# --- comparing --------------------------------------------------------------------------------------------------------


def worse(before: Outcome, *now: Outcome, **bounds: float) -> tuple[str, ...]:
    return compare(report(before), report(*now), Bounds(**bounds))[-1].worse


def test_without_bounds_only_a_state_can_be_worse():
    assert worse(SMALL, outcome("onnx", "verified", megabytes=300.0, error=1e-2, ms=200.0)) == ()
    assert worse(SMALL, outcome("onnx", "mismatch", "off")) == ("verified became mismatch: off",)
    assert worse(SMALL, FAST) == ("it is missing, and was verified",)
    assert worse(outcome("onnx", "mismatch", "off"), SMALL) == ()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"slower": 1.2}, "slower: 2"),
        ({"larger": 1.05}, "larger: 3 MB became 6 MB, more than 1.05 times"),
        ({"off": 2.0}, "less exact: 1.0e-06 became 1.0e-05, more than 2 times"),
    ],
)
def test_a_figure_beyond_its_bound_is_worse(bounds: dict[str, float], message: str):
    after = outcome("onnx", "verified", megabytes=6.0, error=1e-5, ms=4.0)
    (why,) = worse(SMALL, after, **bounds)
    assert why.startswith(message)
    assert worse(SMALL, after, **dict.fromkeys(bounds, 100.0)) == ()
    assert worse(SMALL, SMALL, **bounds) == ()


def test_an_error_below_the_noise_floor_is_not_less_exact():
    exact = outcome("onnx", "verified", megabytes=3.0, error=0.0, ms=2.0)
    floor = exact.parity.noise_floor
    near, far = (outcome("onnx", "verified", megabytes=3.0, error=factor * floor, ms=2.0) for factor in (1.5, 2.5))
    assert worse(exact, near, off=2.0) == ()
    assert worse(exact, far, off=2.0) != ()


def test_what_was_not_timed_is_not_called_busy():
    assert untimed(report(SMALL), report(SMALL)) == ""
    assert untimed(report(replace(SMALL, latency=None)), report(SMALL)) == "no format was timed in both exports"


def test_latency_of_a_busy_machine_is_not_judged():
    after = outcome("onnx", "verified", megabytes=3.0, error=1e-6, ms=40.0)
    busy = replace(after, latency=replace(after.latency, waited=0.9))
    assert worse(SMALL, after, slower=2.0) != ()
    assert worse(SMALL, busy, slower=2.0) == ()


def test_the_table_shows_both_sides():
    (row,) = rows(compare(report(SMALL), report(outcome("onnx", "mismatch", "off")), Bounds()))
    assert (row["format"], row["state"], row["size"]) == ("onnx", "verified → mismatch", "3 MB → –")


def test_the_exit_code_says_whether_something_is_worse(tmp_path: Path):
    for name, each in (("a", SMALL), ("b", outcome("onnx", "verified", megabytes=6.0, error=1e-6, ms=2.0))):
        folder = tmp_path / name / "exports" / "best"  # of a run
        folder.mkdir(parents=True)
        save(report(each, folder=folder))
    paths = [str(tmp_path / "a"), str(tmp_path / "b" / "exports")]
    run = CliRunner().invoke
    assert run(app, ["compare", *paths]).exit_code == 0
    told = run(app, ["compare", *paths, "--larger", "1.5"])
    assert told.exit_code == 1
    assert "onnx: larger: 3 MB became 6 MB" in told.stderr
    assert run(app, ["compare", *reversed(paths), "--larger", "1.5"]).exit_code == 0
