"""C: any number of rows is served one by one, what the generator lacks is mended, and the report says what it takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import polyexport
from polyexport import FORMATS, ExportSpec, Report, TensorSpec
from polyexport.cli import app
from polyexport.errors import ToolMissing
from polyexport.formats import c
from polyexport.measure.emulator import tried
from polyexport.spec import Arrays, Batch, in_rows, write_arrays
from polyexport.workers import cortex_m

pytestmark = pytest.mark.skipif(bool(c.lacks()), reason=c.lacks())


class Sequence(torch.nn.Module):
    """Layers in both directions whose answers are all used, and a GRU that goes forward; `unread` is never read.

    PyTorch reverses the sequence for an RNN by a slice that goes backwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.ModuleList(
            kind(size, 4, batch_first=True, bidirectional=True)
            for kind, size in ((torch.nn.LSTM, 3), (torch.nn.GRU, 8), (torch.nn.RNN, 8))
        )
        self.one = torch.nn.GRU(8, 5, batch_first=True)

    def forward(self, sequence: torch.Tensor, unread: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.both:
            sequence = layer(sequence)[0]
        steps = self.one(sequence)[0]
        return {
            "turned": sequence.flip(1, 2),
            "steps": steps,
            "masked": mask & (steps[..., 0] > 0),
            "sums": steps.sum((1, 2)),
        }


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.manual_seed(0)
    inputs = (torch.rand(4, 6, 3), torch.rand(4, 2), torch.rand(4, 6) > 0.5)
    return polyexport.export(Sequence(), inputs, ["c"], tmp_path_factory.mktemp("c") / "out", bench=False)


def test_it_agrees_for_any_number_of_rows_and_says_that_it_takes_one(sequence: Report) -> None:
    outcome = sequence["c"]
    assert outcome.parity is not None, outcome.reason
    assert outcome.parity.passed
    assert [sizes["batch"] for sizes in outcome.parity.batches] == [4, 1, 3]
    assert (outcome.state, outcome.reason) == ("verified", "")
    assert outcome.remark.startswith("one row per call; ")
    assert [tensor.shape for tensor in outcome.inputs] == [(1, 6, 3), (1, 2), (1, 6)]


def bytes_in(text: str) -> list[int]:
    return [int(word.replace(",", "")) for word in re.findall(r"([\d,]+) (?:bytes|of)", text)]


def test_the_report_says_how_much_flash_and_stack_it_takes(sequence: Report) -> None:
    flash, stack = bytes_in(sequence["c"].remark.split("; ")[1])
    weights = sum(tensor.numel() for tensor in Sequence().parameters()) * 4
    assert weights < flash < weights + 20_000
    assert 6 * 8 * 4 < stack < 20_000


@pytest.mark.skipif(bool(cortex_m.missing()), reason=cortex_m.missing())
def test_it_agrees_on_a_cortex_m_too_and_the_report_says_what_it_takes_there(sequence: Report) -> None:
    said = sequence["c"].remark.split("; ")[2]
    assert said.startswith("the first 2 rows agree on a Cortex-M4 in QEMU too: ")
    assert said.endswith(f", by {cortex_m.tools()}")
    flash, ram, stack, variables = bytes_in(said)
    weights = sum(tensor.numel() for tensor in Sequence().parameters()) * 4
    arrays = sum(np.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in sequence["c"].inputs)
    assert weights < flash < weights + 20_000
    assert arrays < variables < arrays + 2_000
    assert ram == stack + variables
    assert said in (sequence.folder / "report.md").read_text()


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_header_is_read_by_both_languages(sequence: Report, tmp_path: Path, language: str) -> None:
    (tmp_path / "main.c").write_text('#include "model.h"\nint main(void) { return !model_load(""); }\n')
    words = ["cc", "-x", language, "-fsyntax-only", "-Wall", "-Werror", f"-I{sequence.folder / 'c'}", "main.c"]
    subprocess.run(words, cwd=tmp_path, check=True)


def test_rows_are_given_in_pieces_and_what_has_no_rows_whole() -> None:
    seen: list[Arrays] = []

    def run(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        return {"y": inputs["x"] * inputs["scale"], "total": np.float32(7)}

    two = ExportSpec((TensorSpec("x", "float32", (2, 3)), TensorSpec("scale", "float32", ())), ())
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    answer = in_rows(run, two)({"x": x, "scale": np.float32(2)})
    assert [len(inputs["x"]) for inputs in seen] == [2, 2, 2]
    assert np.array_equal(answer["y"], x * 2)
    assert answer["total"] == 7


def test_a_program_that_does_not_compile_fails_in_the_compilers_words(tmp_path: Path) -> None:
    (tmp_path / "model.c").write_text(
        "void model(const float x[restrict 1], float y[restrict 1]) {\n    nonsense;\n}\n"
    )
    spec = ExportSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
    with pytest.raises(RuntimeError, match=r"cc fails: .*nonsense"):
        c.load(tmp_path / "model.c", spec, threads=1)


def test_weights_beside_the_source_are_read(tmp_path: Path) -> None:
    code = """#include <stdbool.h>
#include <stdio.h>
static float weight;
bool model_load(const char *path) {
    FILE *file = fopen(path, "rb");
    return fread(&weight, sizeof weight, 1, file) == 1;
}
void model(const float x[restrict 1], float y[restrict 1]) {
    y[0] = x[0] * weight;
}
"""
    (tmp_path / "model.c").write_text(code)
    (tmp_path / "model.bin").write_bytes(np.float32(3).tobytes())
    spec = ExportSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
    run = c.load(tmp_path / "model.c", spec, threads=1)
    assert run({"x": np.float32([2])})["y"] == 6
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"model\.bin cannot be read"):
        c.load(tmp_path / "model.c", spec, threads=1)


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ToolMissing, match=r"no-such-compiler is not on PATH \(.*install.*; or set CC to another\)"):
        c.convert(tmp_path / "model.onnx", tmp_path / "model.c", ExportSpec((), ()))


# --- on a Cortex-M ----------------------------------------------------------------------------------------------------

ONE = ExportSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))


def on_cortex_m(folder: Path, body: str, before: str = "") -> tuple[str, str]:
    """What verification finds of a function that should double its input, and compiles to `body` on a Cortex-M."""
    code = f"""#include <stdint.h>
#include <stdlib.h>
#ifdef __arm__
{before}
#endif
void model(const float x[restrict 1], float y[restrict 1]) {{
    y[0] = 2 * x[0];
#ifdef __arm__
{body}
#endif
}}
"""
    (folder / "model.c").write_text(code)
    write_arrays(folder / "batch.npz", {"x": np.float32([3]), "y": np.float32([6])})
    loaded = c.load(folder / "model.c", ONE, threads=1)
    assert loaded({"x": np.float32([3])})["y"] == 6
    assert loaded.emulator is not None
    return tried(loaded.emulator, folder, Batch("batch.npz"), ONE, FORMATS["c"].limits, "")


@pytest.mark.skipif(bool(cortex_m.missing()), reason=cortex_m.missing())
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y[0] += 1;", "on a Cortex-M4 in QEMU: y: 100.000% of the elements are off"),
        ("*(volatile float *)0xE0000000u = x[0]; y[0] = *(volatile float *)0x60000000u;", "it ends with a fault"),
    ],
)
def test_what_is_wrong_on_a_cortex_m_alone_is_found_there(tmp_path: Path, body: str, why: str) -> None:
    found, more = on_cortex_m(tmp_path, body)
    assert why in found
    assert more == ""


@pytest.mark.skipif(bool(cortex_m.missing()), reason=cortex_m.missing())
@pytest.mark.parametrize(
    ("before", "body", "why"),
    [
        ("const float big[2 << 20] = {1};", "y[0] += big[(int)x[0]];", "bytes more than the 4 MiB of flash"),
        ("float big[4 << 20];", "big[(int)x[0]] = y[0];", "bytes more than the 16 MiB of RAM"),
        ("", "volatile float big[1 << 20]; big[0] = y[0];", r"it needs 4,194,\d+ bytes of stack"),
        ("", "float *volatile big = malloc(15 << 20); big[0] = y[0];", "its buffers need more heap than"),
    ],
)
def test_what_is_too_large_for_the_board_is_a_remark(tmp_path: Path, before: str, body: str, why: str) -> None:
    wrong, remark = on_cortex_m(tmp_path, body, before)
    assert wrong == ""
    assert re.match(f"not run on a Cortex-M4 in QEMU: .*{why}", remark)


@pytest.mark.skipif(bool(cortex_m.missing()), reason=cortex_m.missing())
def test_stack_and_heap_are_measured_on_the_board(tmp_path: Path) -> None:
    body = "volatile float big[5000]; big[0] = y[0]; float *volatile more = malloc(100000); more[0] = y[0];"
    wrong, remark = on_cortex_m(tmp_path, body)
    assert wrong == ""
    assert "the first row agrees on a Cortex-M4 in QEMU too" in remark
    flash, ram, stack, heap, variables = bytes_in(remark)
    assert 20_000 < stack < 21_000
    assert 100_000 < heap < 110_000
    assert ram == stack + heap + variables
    assert 500 < flash < 10_000


@pytest.mark.skipif(bool(cortex_m.missing()), reason=cortex_m.missing())
def test_an_emulator_without_the_board_is_no_fault_of_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = tmp_path / "qemu-system-arm"
    emulator.write_text("#!/bin/sh\necho 'unsupported machine type' >&2\nexit 1\n")
    emulator.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    said = "not run on a Cortex-M4 in QEMU: qemu-system-arm fails: unsupported machine type"
    assert on_cortex_m(tmp_path, "") == ("", said)


def test_without_the_tools_report_and_doctor_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cc", "as", "ld", "size"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    why = (
        "there is no arm-none-eabi-gcc and no qemu-system-arm here "
        "(apt install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm)"
    )
    assert on_cortex_m(tmp_path, "") == ("", f"not run on a Cortex-M4 in QEMU: {why}")
    (row,) = json.loads(CliRunner().invoke(app, ["doctor", "c", "--json"]).stdout)
    assert row["could_use"] == why
    assert "could_use" in CliRunner().invoke(app, ["doctor", "c"]).stdout
    assert "could_use" not in CliRunner().invoke(app, ["doctor", "onnx"]).stdout
