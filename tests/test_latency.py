from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import written
from polyexport.engine.bench import EAGER, _recorded
from polyexport.format import Loaded
from polyexport.measure.dynamic_axes import one_row
from polyexport.measure.latency import sample_ms, summarize, warm_up
from polyexport.report.html import page
from polyexport.report.report import figures, markdown
from polyexport.spec import ExportSpec, TensorSpec
from polyexport.worker import _one_row_ms


def measured(samples, **changes):
    about = {"batch": 4, "threads": 2, "device": "cpu", "load_seconds": 0.5, "first_ms": 9.0, "peak_memory_bytes": 1}
    return summarize(samples, **(about | changes))


def test_percentiles_are_numpys():
    samples = list(np.random.default_rng(0).exponential(size=200))
    latency = measured(samples)
    expected = np.percentile(samples, [50, 90, 95, 99])
    assert (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms) == pytest.approx(tuple(expected))
    assert latency.samples == 200


def test_p99_is_not_given_below_a_hundred_samples():
    assert measured([1.0] * 99).p99_ms is None
    assert measured([1.0] * 100).p99_ms == 1.0


def test_one_row_has_a_median_of_its_own_where_it_was_timed():
    assert measured([4.0] * 9, one_row_ms=[1.0, 9.0, 2.0]).batch_1_p50_ms == 2.0
    assert measured([4.0] * 9).batch_1_p50_ms is None


def spec(**shapes):
    return ExportSpec(tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items()), (), {"n": 4, "m": 6})


def test_one_row_is_the_first_of_each_input_where_there_is_one_batch():
    inputs = {"x": np.arange(12.0).reshape(4, 3), "y": np.arange(4.0)}
    row = one_row(inputs, spec(x=("n", 3), y=("n",)))
    assert {name: array.tolist() for name, array in row.items()} == {"x": [[0, 1, 2]], "y": [0]}
    assert one_row(inputs, spec(x=(4, 3), y=(4,))) is None, "its size is fixed"
    assert one_row(inputs, spec(x=("n", 3), y=("m",))) is None, "nodes and edges, say"
    assert one_row(row, replace(spec(x=("n", 3), y=("n",)), sizes={"n": 1})) is None, "it is what is timed already"


def test_one_row_that_a_runtime_refuses_is_not_timed(capsys):
    def run(inputs):
        raise ValueError("four rows, please")

    assert _one_row_ms(Loaded(run), {}, seconds=1.0) == []
    assert "four rows, please" in capsys.readouterr().err
    assert _one_row_ms(Loaded(dict), {}, seconds=0.01) != []


def test_throughput_counts_rows_not_calls():
    assert measured([2.0] * 10, batch=4).throughput_per_second == pytest.approx(4 / 2e-3)


def test_figures_of_a_busy_machine_are_marked_until_measured_again(tmp_path):
    report = written.export(tmp_path / "export", step=4)
    busy = _recorded(report, {"good": measured([2.0] * 10, waited=0.6), "static": measured([2.0] * 10, waited=0.2)}, {})
    (note,) = busy.notes
    assert (note.kind, note.text) == (
        "latency",
        "latency was measured on a busy machine: runtimes waited for a processor 40% of the time, "
        "so no format is called the fastest",
    )
    assert _recorded(busy, {"good": measured([2.0] * 10, waited=0.02)}, {}).notes == ()


def test_figures_of_a_busy_machine_are_compared_with_nothing(tmp_path):
    quiet = written.export(tmp_path / "quiet", step=4)
    busy = written.busy(written.export(tmp_path / "busy", step=4))
    assert quiet.fastest is quiet["good"]
    assert "Fastest" in page(quiet)
    assert 'class="best"' in page(quiet)
    assert busy["good"].latency.p50_ms == 9.0
    assert {row["speedup"] for row in figures(busy)} == {None}
    assert busy.fastest is None
    assert busy.best(max_ms=100.0) is None
    assert "Fastest" not in page(busy)
    assert 'class="best"' not in page(busy)
    assert "Latency against" not in page(busy)
    for text in (page(busy), markdown(busy)):
        assert busy.notes[0].text in text


def test_a_latency_measured_under_load_is_not_compared_with_others(tmp_path):
    report = written.export(tmp_path / "export", step=4)
    timed = {name: measured([2.0] * 10, waited=0.9 if name == "static" else 0.0) for name in (EAGER, "good", "static")}
    found = _recorded(report, timed, {})
    assert (found["good"].latency.speedup, found["static"].latency.speedup) == (1.0, None)
    (note,) = found.notes
    why = "their runtimes waited for a processor for much of the time"
    assert note.text == f"some formats have no speed-up: {why} (static 90%)"
    timed = {name: measured([2.0] * 10, waited=0.9 if name == EAGER else 0.0) for name in (EAGER, "good", "static")}
    found = _recorded(report, timed, {})
    assert (found["good"].latency.speedup, found["static"].latency.speedup) == (None, None)
    assert [note.text for note in found.notes] == [f"no format has a speed-up: {why} (eager PyTorch 90%)"]


def test_a_format_slower_than_pytorch_gets_a_note_with_known_causes(tmp_path):
    report = written.export(tmp_path / "export", step=4)
    timed = {EAGER: measured([2.0] * 10), "good": measured([1.99] * 10), "static": measured([4.0] * 10)}
    (note,) = _recorded(report, timed, {}, {"good": "it is not", "static": "its kernels are made for NPUs"}).notes
    line = (
        "static is slower than eager PyTorch on the same 2 threads: 4 ms against 2; "
        "what may be the cause: its kernels are made for NPUs"
    )
    assert (note.kind, note.text) == ("latency", line)
    found = _recorded(report, timed, {})
    (note,) = found.notes
    assert note.text.endswith("; the cause is unknown")
    assert note.text in page(found)
    assert note.text in markdown(found)


def test_slow_calls_are_fewer_but_there_is_one():
    ticks = itertools.count(step=3.0)
    assert len(sample_ms(lambda: None, count=20, seconds=7.0, clock=lambda: next(ticks))) == 3
    assert len(sample_ms(lambda: None, count=20, seconds=0.0, clock=lambda: next(ticks))) == 1
    assert warm_up(lambda: None, count=5, seconds=60.0, at_most=10.0, clock=lambda: next(ticks)) == 3
    assert warm_up(lambda: None, count=5, at_most=-1.0, clock=lambda: next(ticks)) == 0


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no latency samples"):
        measured([])


def test_warm_up_lasts_for_the_count_and_for_the_time():
    ticks = itertools.count(step=0.1)
    assert warm_up(lambda: None, count=3, seconds=0.0, clock=lambda: next(ticks)) == 3
    ticks = itertools.count(step=0.1)
    assert warm_up(lambda: None, count=1, seconds=1.0, clock=lambda: next(ticks)) > 5


def test_samples_are_milliseconds_of_each_call():
    ticks = itertools.count(step=0.25)
    assert sample_ms(lambda: None, count=3, clock=lambda: next(ticks)) == [250.0, 250.0, 250.0]
