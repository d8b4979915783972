"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_export
import planted
import polyexport
from polyexport import FORMATS, BadRequest, UnknownFormat
from polyexport.engine.plan import steps
from polyexport.format import MODULE
from polyexport.formats import resolve
from polyexport.workers.toolchain import find

SOURCE = Path(polyexport.__file__).parent
FRAMEWORKS = ("torch", "onnx", "onnxruntime", "openvino", "tensorflow", "paddle", "coremltools", "wandb", "lightning")


def test_importing_the_engine_imports_no_framework():
    code = f"import polyexport, sys; print([name for name in {FRAMEWORKS!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imported(file: Path) -> set[str]:
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    names = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_formats_know_nothing_of_the_engine():
    above = ("polyexport.engine", "polyexport.workers.process", "polyexport.report", "lightning")
    for file in (SOURCE / "formats").glob("*.py"):
        assert not [name for name in imported(file) if name.startswith(above)], file


def test_no_library_file_names_a_format_but_its_own():
    """What a further format would have to touch: its file, and a requirement file."""
    names = set(FORMATS) - {"pt2", "onnx"}  # words of PyTorch's own API that other files need
    for file in SOURCE.rglob("*.py"):
        if file.parent.name in ("formats", "lowering"):
            continue
        strings = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & names, file


def test_every_format_is_whole():
    for each in FORMATS.values():
        assert each.description
        assert each.url.startswith("https://")
        assert each.routes
        for route in each.routes:
            assert find(route.toolchain)
            assert route.upstream == MODULE or route.upstream in FORMATS


@pytest.mark.parametrize("package", [polyexport, lightning_export])
def test_help_shows_every_public_name_with_its_types_and_what_it_is_for(package: ModuleType):
    shown = pydoc.render_doc(package, renderer=pydoc.plaintext)
    for name in package.__all__:
        value = getattr(package, name)
        assert f" {name}" in shown, name
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            assert value.__annotations__.keys() >= {"return", *inspect.signature(value).parameters}, name


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(
        UnknownFormat, match=rf"no format 'onxx'; did you mean 'onnx'\? known formats: {', '.join(FORMATS)}"
    ):
        resolve(["onnx", "onxx"])


def test_no_format_at_all_is_an_error():
    with pytest.raises(UnknownFormat, match="known formats"):
        resolve([])


def test_aliases_and_repetitions_are_one_format():
    assert [each.name for each in resolve(["ov", "openvino", FORMATS["onnx"], "onnx"])] == ["openvino", "onnx"]


def test_steps_put_upstream_first():
    order = list(steps(resolve(["openvino"])))
    assert order.index("pt2") < order.index("onnx") < order.index("openvino")
    assert order.index("torchscript") < order.index("openvino")


def test_a_circle_of_routes_is_an_error():
    one = planted.planted("one", planted.replay, upstream="two")
    two = planted.planted("two", planted.replay, upstream="one")
    with pytest.raises(BadRequest, match="circle"):
        steps([one, two])


def test_an_upstream_that_does_not_exist_is_an_error():
    with pytest.raises(UnknownFormat, match="'nowhere', which does not exist"):
        steps([planted.planted("one", planted.replay, upstream="nowhere")])
