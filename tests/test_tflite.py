"""TensorFlow Lite, Edge TPU and Ethos-U: every model of the zoo, signatures, calibration, the compiler's contract."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyexport
import zoo
from isolated import HERE, in_toolchain, many
from polyexport import Engine, Report
from polyexport.formats import edgetpu, ethosu
from polyexport.spec import write_arrays
from polyexport.workers import toolchain

TFLITE = ("tflite", "tflite-fp16", "tflite-w8", "tflite-int8")

NOT_IN_INT8 = {"gpt2": "cosine similarity 0.98"}
"""What eight bits cost it with random weights; it agrees by TensorFlow's quantizer, the second route."""


@pytest.mark.slow
def test_the_zoo_agrees_at_three_batch_sizes(lowered: dict[str, dict[str, str]]) -> None:
    roots = list(lowered)
    assert {lowered[root]["tflite"] for root in roots} == {"made"}
    made = many("tflite", "convert", TFLITE[1:], roots)
    assert made == {root: dict.fromkeys(TFLITE[1:], "made") for root in roots}
    found = many("tflite", "verify", TFLITE, roots)
    for root, by_format in found.items():
        for name, parity in by_format.items():
            assert isinstance(parity, dict), (root, name, parity)
            assert [sizes["batch"] for sizes in parity["batches"]] == [zoo.BATCH, 1, 3]
            assert "CompiledModel" not in parity["shortfall"]
            lost = NOT_IN_INT8.get(Path(root).name) if name == "tflite-int8" else None
            assert parity["passed"] == (lost is None), (root, name, parity["reason"])
            assert lost is None or lost in parity["reason"]


# --- one model, end to end --------------------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """Two convolutions and a linear layer: what an Edge TPU is made for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU()),
            *(torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 8, 5)),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


def run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in on PATH, under the compiler's name."""
    folder.mkdir()
    program = folder / edgetpu.COMPILER
    program.write_text(f'#!/bin/sh\nexec {toolchain.find("tflite").interpreter()} {HERE / "edgetpu_standin.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The classifier in every format that is told of below, where the stand-in is on PATH."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tflite")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(folder / "bin", monkeypatch)
        return polyexport.export(
            Classifier(),
            torch.randn(4, 3, 16, 16),
            ["tflite", "tflite-int8", "edgetpu", "ethosu"],
            folder / "export",
            calibration=[torch.randn(4, 3, 16, 16)],
            bench=False,
        )


@pytest.mark.slow
def test_a_free_batch_beats_the_order_of_routes(report):
    outcome = report["tflite"]
    assert (outcome.state, outcome.route, outcome.reason) == ("verified", "tensorflow", "")
    assert not [
        note for note in report.notes if note.text.startswith("tflite:")
    ]  # that a route is static is no failure
    assert len(outcome.parity.batches) == 3


@pytest.mark.slow
def test_the_report_tells_the_artifacts_own_signature(report):
    outcome = report["tflite-int8"]
    assert (outcome.state, outcome.route, outcome.reason) == ("verified", "quantizer", "")
    assert [str(tensor) for tensor in outcome.inputs] == ["image: int8[batch, 3, 16, 16]"]
    assert [str(tensor) for tensor in outcome.outputs] == ["output_0: int8[batch, 5]"]
    (tensor,) = report["edgetpu"].inputs
    assert (tensor.dtype, tensor.shape) == ("int8", (1, 16, 16, 3))


@pytest.mark.slow
def test_an_artifact_of_one_row_is_verified_again_on_every_batch(report):
    with Engine() as engine:
        again = engine.verify(replace(report, outcomes=(report["edgetpu"],)))["edgetpu"]
    assert (again.state, len(again.parity.batches)) == ("verified", 3)


@pytest.mark.slow
def test_an_edge_tpu_model_is_verified_before_compilation_and_says_so(report):
    outcome = report["edgetpu"]
    assert (outcome.state, outcome.reason, outcome.remark) == ("verified", "", "one row per call")
    assert outcome.parity.verified_by.startswith("the int8 model before compilation, on the CPU; edgetpu_compiler has ")
    assert len(outcome.parity.batches) == 3
    assert "stand-in" in (report.folder / "logs" / "edgetpu.log").read_text()
    names = sorted(path.name for path in (report.folder / "edgetpu").iterdir())
    assert names == ["model.tflite", "model_edgetpu.log", "model_edgetpu.tflite", "polyexport.json"]


@pytest.mark.slow
def test_fixed_shapes_come_by_the_first_route_with_narrow_integers(tmp_path):
    module, inputs = zoo.build("two_inputs")
    report = polyexport.export(module, inputs, ["tflite"], tmp_path / "x", dynamic=False, bench=False)
    outcome = report["tflite"]
    assert (outcome.state, outcome.route, outcome.reason) == ("verified", "litert-torch", "")
    assert [str(tensor) for tensor in outcome.inputs] == ["ids: int32[4, 9]", "mask: bool[4, 9]"]


class Handed(torch.nn.Linear):
    """Returns one tensor by two names, its inputs, and outputs that LiteRT allocates while it runs."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        y = super().forward(x)
        best, indices = y.topk(2)
        given = {"features": x, "ids again": ids, "mask again": mask}
        return given | {"one": y, "other": y, "best": best, "indices": indices}


@pytest.mark.slow
def test_every_output_is_answered_also_by_a_compiled_model(tmp_path):
    inputs = (torch.rand(4, 4), torch.arange(4), torch.arange(4) > 1)
    report = polyexport.export(Handed(4, 3), inputs, ["tflite"], tmp_path / "x", bench=False)
    assert (report["tflite"].state, report["tflite"].reason) == ("verified", "")


@pytest.mark.slow
def test_by_the_manifest_alone_a_compiled_model_takes_any_number_of_rows(shadows):
    assert shadows["loaded"] == {"output_0": ["float32", [3, 5]]}


# --- shadows: what must not pass --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shadows(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of wrong files; see the script."""
    folder = tmp_path_factory.mktemp("shadows")
    write_arrays(folder / "tiny.npz", {"image": np.full((4, 3, 16, 16), 1e-3, np.float32)})
    shutil.copytree(report.folder / "edgetpu", folder / "refused")
    log = folder / "refused" / "model_edgetpu.log"
    log.write_text(log.read_text().replace("Mapped to Edge TPU", "Operation not supported", 1))
    words = ("scripts/edgetpu_cases.py", str(report.folder), str(folder))
    found: dict[str, Any] = json.loads(in_toolchain("tflite", *words))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong ranges", "wrong zero points", "swapped channels"])
def test_a_planted_error_in_int8_is_a_mismatch(shadows, fault):
    assert not shadows[fault]["parity"]["passed"]


@pytest.mark.slow
def test_of_two_ways_to_take_ranges_the_better_one_is_kept(shadows):
    kept, *each = shadows["ranges"]
    assert kept == min(each)
    assert each[0] != each[1]


@pytest.mark.slow
def test_a_compiled_model_that_disagrees_or_refuses_is_told_though_the_interpreter_agrees(shadows):
    wrong, refused = shadows["another answer"], shadows["refuses"]
    assert (wrong["parity"]["passed"], refused["parity"]["passed"]) == (True, True)
    assert wrong["shortfall"].startswith("LiteRT's CompiledModel disagrees with PyTorch: output_0: ")
    assert refused["shortfall"].startswith("LiteRT's CompiledModel refuses it: ")


@pytest.mark.slow
def test_a_file_with_another_layout_does_not_pass_for_the_right_one(shadows):
    unlike = shadows["unlike"]
    assert isinstance(unlike, str) or not unlike["parity"]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tflite-w8", "tflite-w4"])
def test_small_weights_agree_and_two_channels_that_are_swapped_do_not(shadows, name):
    assert (shadows[name]["parity"]["reason"], shadows[name]["shortfall"]) == ("", "")
    assert not shadows[f"swapped {name}"]["parity"]["passed"]


@pytest.mark.slow
def test_weights_that_are_too_small_for_scales_of_blocks_have_one_for_each_row(shadows):
    assert shadows["tiny weights in four bits"] == "100% of its weights in 4 bits, 0% in 8 bits"


@pytest.mark.slow
def test_with_the_costliest_weights_in_8_bits_half_of_them_are_in_4_and_it_agrees(shadows):
    shortfall, verified = shadows["some weights in four bits"]
    assert (shortfall, verified["parity"]["reason"]) == ("", "")


@pytest.mark.slow
def test_weights_left_in_float_are_told(shadows):
    assert shadows["not tflite-w8"]["shortfall"] == (
        "100% of its weights in float, since int8 is not supported for them: 2 × CONV_2D, 1 × FULLY_CONNECTED"
    )


@pytest.mark.slow
def test_a_model_for_the_ethos_u_is_compiled_and_its_memory_and_time_are_estimated(report):
    outcome = report["ethosu"]
    assert (outcome.state, outcome.reason) == ("verified", "")
    estimate = r"[\d.]+ ms at 500 MHz, [\d.]+ KiB of SRAM, [\d.]+ KiB of flash"
    assert re.fullmatch(f"one row per call; Vela's estimate for Ethos-U55-128: {estimate}", outcome.remark)
    ran = "the int8 model before compilation, on the CPU; Vela has "
    assert re.fullmatch(rf"{ran}(\d+) of \1 operations on the Ethos-U", outcome.parity.verified_by)
    assert b"ethos-u" in (report.folder / "ethosu" / "model_vela.tflite").read_bytes()


class Strided(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 8, 7, stride=4, padding=3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.patches(image).mean((2, 3))


class Masked(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask


@pytest.mark.slow
def test_a_padding_that_vela_fails_on_is_on_the_cpu(tmp_path):
    report = polyexport.export(Strided(), torch.randn(4, 3, 64, 64), ["ethosu"], tmp_path / "e", bench=False)
    assert "1 × PAD (before a convolution, which Vela fails on)" in report["ethosu"].parity.verified_by


@pytest.mark.slow
def test_an_input_of_bool_is_named_where_vela_fails_on_it(tmp_path):
    inputs = torch.randn(4, 9), torch.randn(4, 9) > 0
    outcome = polyexport.export(Masked(), inputs, ["ethosu"], tmp_path / "e", bench=False)["ethosu"]
    assert outcome.state == "failed"
    assert "compares inputs of bool with zero, which the Ethos-U55 cannot; give mask as another type" in outcome.reason


SAID = """
Warning (supported operators) operator: None, ofm: 'y'
Reason: Unsupported opType

Warning (supported operators) operator: EXP, ofm: 'x'
Reason: Operation has tensor with unsupported DataType Float32 (x)
Feature-map dataTypes must be one of {"INT8"}

CPU operators = 4 (50.0%)
   CPU: Passthrough = y (outputs [1, 1, 1, 3])
   CPU: Passthrough = x (outputs [1, 1, 1, 3])
   CPU: Passthrough = padded (outputs [1, 1, 1, 3])
   CPU: Passthrough = made by Vela (outputs [1, 1, 1, 3])
NPU operators = 4 (50.0%)
"""


def test_what_vela_leaves_on_the_microcontroller_is_counted_by_name() -> None:
    kinds = {"y": "BROADCAST_TO", "x": "EXP", "padded": "PAD", "z": "ADD"}
    on_cpu = {
        **{"BROADCAST_TO (not supported)": 1, "EXP (in float32)": 1},
        **{"PAD (before a convolution, which Vela fails on)": 1, "operations without a name": 1},
    }
    assert ethosu.placement(SAID, kinds, "PAD") == {"operations": 8, "on_cpu": on_cpu}
    with pytest.raises(ValueError, match="does not say how many operations"):
        ethosu.placement("Network summary for model", {})
    unlisted = "CPU operators = 2 (50.0%)\nNPU operators = 2 (50.0%)\n"
    assert ethosu.placement(unlisted, kinds) == {"operations": 4, "on_cpu": {"operations without a name": 2}}


def test_a_fault_of_vela_itself_is_told_from_its_refusals():
    chip = ethosu.CHIPS["ethosu"]
    traced = 'Traceback (most recent call last):\n  File "stats_writer.py", line 525, in f\n'
    assert ethosu._why(f"{traced}KeyError: '0'\n", chip) == "it fails by itself, with KeyError: '0'"
    assert ethosu._why("Error: Invalid accelerator\nconfiguration\n", chip) == "Invalid accelerator configuration"
    assert ethosu._why("killed", chip) == "killed"


def test_an_operation_that_vela_plans_and_the_accelerator_lacks_is_told():
    said = "RuntimeError: Non-passthrough operation ({}) could not run on NPU\n"
    chip = ethosu.CHIPS["ethosu-u65"]
    assert ethosu._why(said.format("Sin"), chip).startswith("it plans an operation Sin for the Ethos-U65 that this ")
    assert ethosu._why(said.format("NotEqual"), chip, ["mask"]) == (
        "it compares inputs of bool with zero, which the Ethos-U65 cannot; give mask as another type, such as float32"
    )


@pytest.mark.slow
def test_operations_that_stay_on_the_microcontroller_degrade(shadows):
    assert shadows["sine"]["shortfall"] == "1 of 4 operations on the Ethos-U, on the CPU 3 × SIN"
    assert shadows["sine"]["parity"]["passed"]


@pytest.mark.slow
def test_operators_left_in_float_are_told(shadows):
    found = shadows["not in int8"]
    assert found["shortfall"].startswith("100% of its weights in float, since int8 is not supported for them: ")
    assert found["remark"].startswith("in float32, since int8 is not supported for it: ")
    assert "CONV_2D" in found["remark"]


@pytest.mark.slow
def test_operations_that_the_compiler_leaves_to_the_cpu_are_told_and_degrade(shadows):
    assert "(Operation not supported)" in shadows["refused"]["shortfall"]
    assert shadows["refused"]["remark"] == "one row per call"
    assert shadows["refused"]["parity"]["passed"]


@pytest.mark.slow
def test_without_the_compiler_it_is_told_where_to_get_it_and_what_would_map(shadows):
    reason = shadows["no compiler"]
    assert reason.startswith(
        "ToolMissing: edgetpu_compiler is not on PATH; it is at https://coral.ai/docs/edgetpu/compiler/"
    )
    assert len(reason.removeprefix("ToolMissing: ")) < 500  # what a reason holds
    assert shadows["predicted"][0] in reason


@pytest.mark.slow
def test_corals_table_refuses_a_batch_and_float32(shadows):
    one_row, batch, precise = shadows["predicted"]
    assert "on the CPU" not in one_row
    assert "(a dynamic axis)" in batch
    assert precise.startswith("0 of ")
    assert "(not int8)" in precise


def test_corals_table_refuses_what_it_does_not_list_and_what_has_too_many_axes(tmp_path, monkeypatch):
    def tensor(*shape: int) -> dict[str, Any]:
        return {"dtype": np.int8, "shape": shape, "shape_signature": shape}

    shapes = [("CONV_2D", (1, 8, 8, 3)), ("CONV_2D", (4, 8, 8, 3)), ("GELU", (1, 5))]
    listed = [edgetpu.tflite.Operation(kind, [tensor(*shape)], []) for kind, shape in shapes]
    monkeypatch.setattr(edgetpu.tflite, "operations", lambda path: listed)
    words = "1 of 3 operations on the Edge TPU, on the CPU 1 × CONV_2D (more than three axes), 1 × GELU (not supported)"
    assert str(edgetpu.predict(tmp_path / "model.tflite")) == words


# --- the compiler's log -----------------------------------------------------------------------------------------------

LOG = """Edge TPU Compiler version 16.0.384591198
Input: model.tflite
Output: model_edgetpu.tflite

Operator                       Count      Status

CONCATENATION                  1          More than one subgraph is not supported
MAX_POOL_2D                    6          Mapped to Edge TPU
CONV_2D                        11         Mapped to Edge TPU
CONV_2D                        2          More than one subgraph is not supported
DEQUANTIZE                     1          Operation is working on an unsupported data type
"""
"""As the vendor's program writes it (after google-coral/edgetpu#519 and others)."""


def test_the_compilers_log_is_read():
    placement = edgetpu.read_log(LOG)
    assert placement.total == 21
    assert placement.on_cpu == Counter(
        {
            "CONCATENATION (More than one subgraph is not supported)": 1,
            "CONV_2D (More than one subgraph is not supported)": 2,
            "DEQUANTIZE (Operation is working on an unsupported data type)": 1,
        }
    )
    assert str(placement).startswith("17 of 21 operations on the Edge TPU, on the CPU 1 × CONCATENATION (More")


def test_a_log_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="no operator is listed"):
        edgetpu.read_log(LOG.split("Operator")[0])


def test_a_compiler_that_fails_is_told_in_its_own_words(tmp_path, monkeypatch):
    program = tmp_path / edgetpu.COMPILER
    program.write_text("#!/bin/sh\necho 'Invalid model: not quantized' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "int8.tflite").touch()
    with pytest.raises(RuntimeError, match="edgetpu_compiler ended with exit code 1: Invalid model: not quantized"):
        edgetpu.compile_int8(tmp_path / "int8.tflite", tmp_path / "model_edgetpu.tflite", None)
