"""Processing before and after `forward` becomes part of each artifact: raw bytes in, probabilities out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import polyexport
import runs
from lightning_export import ExportCallback
from lightning_export.inputs import _one_by_one
from planted import GOOD, lacks_both, lacks_bytes, lacks_topk, load_narrow, load_nowhere, planted, replay
from polyexport import BadRequest, Engine, Processing, Report, Request
from polyexport.capture import snapshot
from polyexport.capture.calls import save_call
from polyexport.capture.processing import joined, unlike
from polyexport.capture.weights import WEIGHTS
from polyexport.kit import make as kit
from polyexport.kit.accept import accept
from polyexport.report.folders import unfinished
from polyexport.spec import LABELS
from polyexport.workers import toolchain

NAMES = ("zero", "one", "two", "three", "four")


class Pixels(nn.Module):
    """Bytes as cameras and decoders give them, (N, H, W, C), to what a network was trained on."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.25]).reshape(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        image = pixels.permute(0, 3, 1, 2).float() / 255
        image = nn.functional.interpolate(image, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return (image - self.mean) / self.deviation


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().flatten(1))


def best(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    score, index = logits.softmax(1).topk(2)
    return {"score": score, "index": index}


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (4, 12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


FORMATS = ("onnx", "openvino", "tflite", "coreml")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Report]:
    torch.manual_seed(0)
    net, into = Net(), tmp_path_factory.mktemp("classifier") / "out"
    steps = {"preprocess": Pixels(), "postprocess": nn.Softmax(dim=1)}
    return net, polyexport.export(net, pixels(), FORMATS, into, bench=False, labels=NAMES, **steps)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_go_in_and_probabilities_come_out(classifier: tuple[Net, Report], name: str):
    net, report = classifier
    assert report[name].state == "verified", report[name].reason
    expected = net.eval()(Pixels()(pixels())).softmax(1).detach().numpy()
    with Engine() as engine, engine.runner(report, name) as run:
        assert np.allclose(run({"pixels": pixels().numpy()})["output_0"], expected, atol=1e-5)
    assert (report.folder / name / LABELS).read_text().split() == list(NAMES)


def test_the_report_says_what_an_artifact_takes_and_begins_with(classifier: tuple[Net, Report]):
    _, report = classifier
    assert report.model.class_name.endswith(".Net")
    assert [str(tensor) for tensor in report.model.inputs] == ["pixels: uint8[batch, 12, 10, 3]"]
    assert "preprocess: Pixels(); postprocess: Softmax(dim=1)" in str(report)


def test_the_indices_of_the_best_classes_have_labels(tmp_path: Path):
    report = polyexport.export(
        Net(), pixels(), ["onnx"], tmp_path / "out", bench=False, labels=NAMES, preprocess=Pixels(), postprocess=best
    )
    assert report["onnx"].state == "verified", report["onnx"].reason
    loaded = polyexport.load(report.folder / "onnx")
    answer = loaded({"pixels": pixels().numpy()})
    assert loaded.labels[answer["index"][0, 0]] in NAMES
    assert (np.diff(answer["score"]) <= 0).all()


# --- steps that a format has not --------------------------------------------------------------------------------------

LACKING = (
    planted("topk", lacks_topk),
    planted("bytes", lacks_bytes),
    planted("both", lacks_both),
    planted("after", replay, upstream="topk"),
    planted("narrow", replay, load=load_narrow),
)
OUTSIDE = {"good": (), "topk": ("postprocess",), "bytes": ("preprocess",), "after": ("postprocess",)}
OUTSIDE |= {"both": ("preprocess", "postprocess"), "narrow": ("postprocess",)}


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Report]:
    """Exports with one more call, at another batch size, and a mapping of dynamic axes by the raw input's name."""
    torch.manual_seed(0)
    net, into = Net(), tmp_path_factory.mktemp("lacking") / "out"
    settings = {"calibration": [pixels()[:3]], "dynamic": {"pixels": {0: "batch"}}, "bench": False}
    steps = {"preprocess": Pixels(), "postprocess": best}
    return net, polyexport.export(net, pixels(), [GOOD, *LACKING], into, **settings, **steps)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_step_that_a_format_cannot_have_is_outside_of_its_artifact(lacking: tuple[Net, Report], name: str):
    net, report = lacking
    outcome, outside = report[name], OUTSIDE[name]
    assert (outcome.state, outcome.outside) == ("degraded" if outside else "verified", outside), outcome.reason
    assert [tensor.name for tensor in outcome.inputs] == ["x" if "preprocess" in outside else "pixels"]
    given = Pixels()(pixels()) if "preprocess" in outside else pixels()
    logits = net.eval()(Pixels()(pixels())).detach()
    expected = {"output_0": logits} if "postprocess" in outside else best(logits)
    with Engine() as engine, engine.runner(report, name, (GOOD, *LACKING)) as run:
        answer = run({outcome.inputs[0].name: given.numpy()})
    assert answer.keys() == expected.keys()
    assert all(np.allclose(answer[key], expected[key], atol=1e-5) for key in expected)
    assert len(outcome.parity.batches) > 1, "its batch axis was proven at another size"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("topk", "ends in front of postprocess, .* on its outputs; with postprocess: .*no rule for aten::topk"),
        ("bytes", "begins behind preprocess, .* run first; with preprocess: .*no type uint8"),
        (
            "both",
            "begins behind preprocess, .*, and ends in front of postprocess, .*; with preprocess and postprocess: ",
        ),
        ("narrow", "ends in front of postprocess.*; with postprocess: right on data like the first batch only: "),
        ("after", "ends in front of postprocess.*: made from topk, which is failed: .*no rule for aten::topk"),
    ],
)
def test_the_reason_names_the_step_and_the_operator(lacking: tuple[Net, Report], name: str, reason: str):
    _, report = lacking
    assert re.match(reason, report[name].reason), report[name].reason
    assert "preprocess: Pixels() (not in bytes, both); postprocess: best (not in topk, both, after, narrow)" in str(
        report
    )


def test_an_artifact_without_a_step_is_verified_and_timed_again_on_what_it_takes(lacking: tuple[Net, Report]):
    _, report = lacking
    with Engine() as engine:
        again = engine.verify(report, (GOOD, *LACKING))
        timed = engine.bench(again, (GOOD, *LACKING))
    assert {outcome.format: outcome.state for outcome in again.outcomes} == {
        name: "degraded" if outside else "verified" for name, outside in OUTSIDE.items()
    }
    assert all(outcome.latency for outcome in timed.outcomes)
    assert not any(outcome.latency.speedup for outcome in timed.outcomes if outcome.outside)


def test_an_artifact_that_nothing_here_can_run_is_made_without_the_step_too(tmp_path: Path):
    nowhere = planted("nowhere", lacks_bytes, load=load_nowhere)
    report = polyexport.export(Net(), pixels(), [nowhere], tmp_path / "out", bench=False, preprocess=Pixels())
    (outcome,) = report.outcomes
    assert (outcome.state, outcome.outside) == ("unverified", ("preprocess",)), outcome.reason
    assert re.match("begins behind preprocess.*no type uint8; there is no runtime for it", outcome.reason)


@pytest.fixture(scope="module")
def without_topk(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """ncnn has no TopK."""
    into = tmp_path_factory.mktemp("ncnn") / "out"
    return polyexport.export(Net(), Pixels()(pixels()), ["ncnn"], into, bench=False, postprocess=best, labels=NAMES)


def test_a_format_without_the_operator_ends_in_front_of_the_step(without_topk: Report):
    outcome = without_topk["ncnn"]
    assert (outcome.state, outcome.outside) == ("degraded", ("postprocess",)), outcome.reason
    assert "with postprocess: RuntimeError: ncnn has no layer for" in outcome.reason
    assert "static shapes" not in outcome.reason
    assert [str(tensor) for tensor in outcome.outputs] == ["output_0: float32[1, 5]"]
    assert (without_topk.folder / "ncnn" / LABELS).read_text().split() == list(NAMES)
    page = (without_topk.folder / "report.html").read_text(encoding="utf-8")
    assert "The application has to run <code>postprocess</code> (best) on the outputs." in page


def test_the_kit_of_an_artifact_without_a_step_proves_what_it_has(without_topk: Report, tmp_path: Path):
    export = shutil.copytree(without_topk.folder, tmp_path / "out")
    made = kit.make(export / "ncnn", tmp_path / "kit")
    python = str(toolchain.find("ncnn").interpreter())
    done = subprocess.run([python, "-I", str(made / "prove.pyz")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report, _ = accept(made / "proof.json", export)
    assert [proof.parity.passed for proof in report["ncnn"].proofs] == [True]
    assert (report["ncnn"].state, report["ncnn"].outside) == ("degraded", ("postprocess",))


# --- through a folder -------------------------------------------------------------------------------------------------


def saved(root: nn.Module, folder: Path, steps: Processing) -> str:
    note = snapshot.save_module(root, None, (pixels(),), {}, folder, steps=steps)
    save_call((pixels(),), {}, folder)
    torch.save(root.state_dict(), folder / WEIGHTS)
    return note


def test_a_step_is_restored_with_its_own_weights(tmp_path: Path):
    first = nn.Sequential(Pixels(), nn.Conv2d(3, 3, 1))
    net = Net()
    assert saved(net, tmp_path, Processing(first)) == ""
    assert torch.allclose(snapshot.load(tmp_path)(pixels()), net(first(pixels())))


class Whole(nn.Module):
    """Has its own first step among its parts, as a LightningModule may."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare, self.net = nn.Sequential(Pixels(), nn.Conv2d(3, 3, 1)), Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(1)


@pytest.mark.parametrize("named", [True, False])
def test_a_step_that_is_a_part_of_the_module_has_the_weights_of_the_checkpoint(tmp_path: Path, named: bool):
    whole = Whole()
    by_name = Processing("prepare", "probabilities")
    saved(whole, tmp_path, by_name if named else Processing(whole.prepare, whole.probabilities))
    with torch.no_grad():
        whole.prepare[1].weight.mul_(3)  # what training goes on to do
    torch.save(whole.state_dict(), tmp_path / WEIGHTS)
    expected = whole(whole.prepare(pixels())).softmax(1)
    assert torch.allclose(snapshot.load(tmp_path)(pixels()), expected)


def test_a_function_keeps_the_weights_of_what_it_calls(tmp_path: Path):
    net, sharpened = Net(), nn.Conv2d(3, 3, 1)
    saved(net, tmp_path, Processing(lambda pixels: sharpened(Pixels()(pixels))))
    assert torch.allclose(snapshot.load(tmp_path)(pixels()), net(sharpened(Pixels()(pixels()))))


def test_a_function_that_calls_the_module_that_trains_is_refused(tmp_path: Path):
    whole = Whole()
    with pytest.raises(BadRequest, match=r"postprocess has weights of the module that trains, but is not a part"):
        saved(whole, tmp_path, Processing(postprocess=lambda logits: whole.prepare[1].weight.sum() * logits))


def test_a_step_that_cannot_be_pickled_is_traced_with_the_module(tmp_path: Path):
    first, net = Pixels(), Net()
    first.numbers = (number for number in range(3))
    assert "so it was traced in the training process" in saved(net, tmp_path, Processing(first))
    assert first.training
    assert torch.allclose(snapshot.load(tmp_path)(pixels()), net(first(pixels())), atol=1e-6)


def test_other_numbers_in_a_step_make_another_export(tmp_path: Path):
    def question(scale: float) -> dict[str, Any]:
        work, first = unfinished(tmp_path), Pixels()
        first.mean.mul_(scale)
        saved(Net(), work / "source", Processing(first))
        return Request(work, "a", (GOOD,)).question

    assert question(1.0) == question(1.0)
    assert question(1.0) != question(1.1)


def test_without_steps_a_module_is_itself():
    net = Net()
    assert joined(net, Processing()) is net


def test_rounding_is_not_a_difference_but_another_scale_is():
    made = ((torch.ones(2, 3),), {})
    assert unlike(made, ((torch.ones(2, 3) * 1.0001,), {})) == ""
    assert unlike(made, ((), {"x": torch.ones(2, 3) * 255})) == "off by 1 of its norm"
    assert unlike(made, ((torch.full((2, 3), float("nan")),), {})) == "off by nan of its norm"
    assert unlike(made, ((torch.ones(3, 2),), {})) == "shapes (2, 3) in place of (3, 2)"


# --- the callback -----------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.float() / 10


class Trained(runs.Scripted):
    """Prepares its batches in its own steps."""

    def __init__(self) -> None:
        super().__init__([3.0, 2.0])
        self.scale = Scaled()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([self.scale(batch[0])], batch_idx)


def fit(folder: Path, callback: ExportCallback, model: Any) -> Report:
    trainer = runs.trainer(folder, [ModelCheckpoint(monitor="val_loss"), callback], max_epochs=1)
    trainer.fit(model, runs.loader(), runs.loader())
    (report,) = callback.reports
    return report


def first_rows() -> torch.Tensor:
    return next(iter(runs.loader()))[0]


def example(report: Report) -> torch.Tensor:
    return snapshot.load(report.folder / "source").example[0]


def exporting(**settings: Any) -> ExportCallback:
    return ExportCallback([GOOD], when="fit_end", bench=False, **settings)


def test_raw_inputs_are_what_the_step_received_in_validation(tmp_path: Path):
    report = fit(tmp_path, exporting(preprocess="scale", postprocess=nn.Softmax(-1)), Trained())
    assert torch.equal(example(report), first_rows())
    assert [tensor.name for tensor in report.model.inputs] == ["raw"]
    assert report["good"].state == "verified"


def test_a_function_of_the_batch_gives_raw_inputs(tmp_path: Path):
    report = fit(tmp_path, exporting(preprocess=Scaled(), inputs=lambda batch: batch[0]), Trained())
    assert torch.equal(example(report), first_rows())
    assert not [note for note in report.notes if "preprocess" in note.text]


def test_a_step_that_training_did_not_have_gets_a_note(tmp_path: Path):
    callback = exporting(preprocess=lambda raw: raw / 2, inputs=lambda batch: batch[0])
    with pytest.warns(UserWarning, match=r"preprocess makes something else .* \(off by 4 of its norm\)"):
        report = fit(tmp_path, callback, Trained())
    assert [note for note in report.notes if "feed the model otherwise" in note.text]


def test_raw_inputs_may_be_given_batch_by_batch(tmp_path: Path):
    raw = [torch.randint(0, 9, (5, runs.FEATURES), dtype=torch.uint8) for _ in range(2)]
    callback = exporting(preprocess=Scaled(), inputs=raw)
    assert torch.equal(example(fit(tmp_path, callback, runs.Scripted([3.0, 2.0]))), raw[0])


def test_a_loader_of_raw_inputs_draws_no_number_of_training():
    following = _one_by_one(DataLoader(torch.arange(4), batch_size=2, shuffle=True))
    before = torch.get_rng_state()
    batches = [following(None) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(torch.cat(batches[:2]).tolist()) == [0, 1, 2, 3]
    assert batches[2] is None


def test_steps_are_written_in_yaml_by_their_classes():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ExportCallback, "export")
    written = {"preprocess": {"class_path": f"{__name__}.Scaled"}, "postprocess": {"class_path": "torch.nn.Softmax"}}
    parsed = parser.parse_object({"export": {"formats": ["onnx"], **written}})
    steps = parser.instantiate_classes(parsed)["export"].options.processing
    assert [type(step).__name__ for step in steps.steps.values()] == ["Scaled", "Softmax"]


def test_callbacks_that_differ_only_in_their_steps_are_distinct_for_a_trainer():
    plain, around = exporting(), exporting(postprocess=nn.Softmax(-1))
    assert plain.state_key != around.state_key
    assert around.state_key == exporting(postprocess=nn.Softmax(-1)).state_key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preprocess": Scaled}, "preprocess=Scaled is a class; give an instance: Scaled()"),
        ({"postprocess": 3}, "postprocess=3; give a module, a function of tensors, or the name of an attribute"),
        ({"preprocess": lambda x: x}, "preprocess is a function, whose calls cannot be captured: give inputs="),
        ({"inputs": torch.ones(2, 3)}, "inputs is a Tensor; give a function of the batch, or several batches"),
        ({"inputs": 3}, "inputs is a int; give a function of the batch"),
        (
            {"postprocess": nn.Softmax(-1), "budget": {"val_loss": 0.1}},
            "budget runs validation_step with each artifact",
        ),
        ({"postprocess": nn.Softmax(-1), "metric_batches": 2}, "metric_batches runs validation_step with each"),
    ],
)
def test_an_invalid_step_is_refused_at_construction(settings: dict[str, Any], message: str):
    with pytest.raises(BadRequest, match=re.escape(message)):
        exporting(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preprocess": "scael"}, "preprocess='scael': Trained has no 'scael'"),
        ({"preprocess": "losses"}, "preprocess='losses' leads to a list, which cannot be called"),
        ({"preprocess": Scaled()}, "preprocess was not called on the first validation batch"),
        ({"preprocess": Scaled(), "inputs": []}, "inputs has no batch"),
        (
            {"preprocess": Scaled(), "inputs": lambda batch: {"row": batch[0]}},
            "preprocess fails on the raw inputs (float32[8, 6]): TypeError",
        ),
    ],
)
def test_a_step_that_the_module_cannot_have_is_refused_before_training(
    tmp_path: Path, settings: dict[str, Any], message: str
):
    model = Trained()
    with pytest.raises(BadRequest, match=re.escape(message)):
        fit(tmp_path, exporting(**settings), model)
    assert float(model.clock) == 0


def test_without_validation_raw_inputs_have_to_be_given(tmp_path: Path):
    model = Trained()
    model.example_input_array = torch.ones(2, runs.FEATURES)  # what forward takes, and no raw input
    with pytest.raises(BadRequest, match="there is no validation batch to capture raw inputs from; give inputs="):
        runs.trainer(tmp_path, [exporting(preprocess="scale")], max_epochs=1).fit(model, runs.loader())


def test_the_engine_refuses_inputs_that_the_step_does_not_take(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"Pixels.forward takes .* but was given 'image'"):
        polyexport.export(Net(), {"image": pixels()}, [GOOD], tmp_path / "out", preprocess=Pixels())
    with pytest.raises(BadRequest, match=r"preprocess fails on the raw .*\(uint8\[4, 12, 10\]\): RuntimeError"):
        polyexport.export(Net(), pixels()[..., 0], [GOOD], tmp_path / "out", preprocess=Pixels())
