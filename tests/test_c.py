"""C: any number of rows is served one by one, what the generator lacks is mended, and the report says what it takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import polyexport
from polyexport import ExportSpec, Report, TensorSpec
from polyexport.errors import ToolMissing
from polyexport.formats import c
from polyexport.spec import Arrays, in_rows

pytestmark = pytest.mark.skipif(bool(c.lacks()), reason=c.lacks())


class Sequence(torch.nn.Module):
    """A reversed LSTM whose answers are all used, and a GRU that goes forward; `unread` is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.one = torch.nn.GRU(8, 5, batch_first=True)

    def forward(self, sequence: torch.Tensor, unread: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        steps = self.one(self.both(sequence)[0])[0]
        return {"steps": steps, "masked": mask & (steps[..., 0] > 0), "sums": steps.sum((1, 2))}


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


def test_the_report_says_how_much_flash_and_stack_it_takes(sequence: Report) -> None:
    flash, stack = (int(word.replace(",", "")) for word in re.findall(r"([\d,]+) (?:bytes|of)", sequence["c"].remark))
    weights = sum(tensor.numel() for tensor in Sequence().parameters()) * 4
    assert weights < flash < weights + 20_000
    assert 6 * 8 * 4 < stack < 20_000


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
