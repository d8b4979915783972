"""The rules of the architecture that can be checked automatically."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from dataclasses import replace
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
    names = set(FORMATS) - {"pt2", "onnx", "c"}  # words of PyTorch's own API, and numpy's for complex numbers
    for file in SOURCE.rglob("*.py"):
        if file.parent.name in ("formats", "lowering"):
            continue
        strings = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & names, file


def test_every_format_is_declared_completely():
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


def test_an_unknown_precision_is_refused_where_the_format_is_declared():
    reason = "onnx has the precision 'fp16'; known precisions: float32, float16, bfloat16, int8, w8, w4"
    with pytest.raises(BadRequest, match=re.escape(reason)):
        replace(FORMATS["onnx"], precision="fp16")


def test_no_format_at_all_is_an_error():
    with pytest.raises(UnknownFormat, match="known formats"):
        resolve([])


def test_aliases_and_repetitions_are_one_format():
    assert [each.name for each in resolve(["ov", "openvino", FORMATS["onnx"], "onnx"])] == ["openvino", "onnx"]


@pytest.mark.parametrize("given", ["openvino-int4", "ov-int4"])
def test_a_precision_that_a_format_has_not_is_refused_with_those_that_it_has(given):
    of_it = "openvino exists as openvino, openvino-fp16, openvino-int8, openvino-w4, openvino-w8; known formats: "
    with pytest.raises(UnknownFormat, match=f"no format '{given}'; {of_it}"):
        resolve([given])


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


CALLBACKS = Path(lightning_export.__file__).parent


def without_encoding(source: str) -> list[int]:
    """The lines that read or write text in the locale's encoding."""
    found = []
    for node in (each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.Call)):
        is_method = isinstance(node.func, ast.Attribute)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        named = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        args = [getattr(each, "value", None) for each in node.args]
        mode = named.get("mode", "r") if is_method and not args else args[0] if is_method else (*args, "r", "r")[1]
        opens = name == "open" and mode in ("r", "w", "a", "x", "r+", "w+")
        texts = is_method and ((name == "read_text" and not args) or (name == "write_text" and len(args) == 1))
        if (opens or texts or named.get("text")) and "encoding" not in named:
            found.append(node.lineno)
    return found


def test_text_is_utf8_in_every_locale():
    wrong = ["open(a)", "p.read_text()", "run([], text=True)", "p.open('w')", "open(a, mode='w')", "p.write_text('')"]
    right = ["open(a, 'rb')", "p.open('rb')", "p.read_text('utf-8')", "open(a, encoding='utf-8')", "write_text(p, '')"]
    assert without_encoding("\n".join([*wrong, *right])) == [1, 2, 3, 4, 5, 6]
    assert {name: lines for name, file in files().items() if (lines := without_encoding(file.read_text("utf-8")))} == {}


def files() -> dict[str, Path]:
    """Every Python file of the library by the name of its module."""
    found = {}
    for root in (SOURCE, CALLBACKS):
        for file in root.rglob("*.py"):
            parts = file.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def arrows() -> dict[str, set[str]]:
    """Which files of the library a file imports, inside functions and for types only included.

    A package counts as imported by who asks it for a name of its own, not by who asks for a module in it.
    """
    known = files()
    graph = {name: imported(file) & known.keys() - {name} for name, file in known.items()}
    return {
        name: {wanted for wanted in all_wanted if not any(other.startswith(f"{wanted}.") for other in all_wanted)}
        for name, all_wanted in graph.items()
    }


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of nodes that reach each other."""
    reached = {node: reach(graph, node) for node in graph}
    found = {frozenset(other for other in graph if other in reached[node] and node in reached[other]) for node in graph}
    return {circle for circle in found if circle}


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """What can be reached from a node by one arrow or more."""
    found, todo = set(), list(graph[start])
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo += graph[node]
    return found


def room(name: str) -> str:
    """The room of a module: its folder, or the module itself at the root of the engine."""
    inner = name.split(".")
    return ".".join(inner[:2]) if inner[0] == "polyexport" else inner[0]


def rooms() -> dict[str, set[str]]:
    """Which rooms a room imports."""
    graph: dict[str, set[str]] = {}
    for name, wanted in arrows().items():
        graph.setdefault(room(name), set()).update({room(other) for other in wanted} - {room(name)})
    return graph


def test_no_file_imports_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {frozenset("bc")}
    assert circles(arrows()) == set()


def floor(graph: dict[str, set[str]], name: str) -> int:
    """How many rooms stand below one, in the longest row of imports."""
    return 1 + max((floor(graph, below) for below in graph[name]), default=-1)


def test_no_room_imports_one_above_it():
    assert circles(rooms()) == set()


def test_the_house_is_small_and_shallow():
    graph = rooms()
    assert len(graph) <= 24
    assert max(floor(graph, name) for name in graph) + 1 <= 10
    assert len(list(SOURCE.glob("*.py"))) <= 9
    assert max(len(file.relative_to(SOURCE).parts) for file in SOURCE.rglob("*.py")) - 1 <= 2


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_folder_of_the_engine_is_described(page: str):
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {folder for folder in folders if not re.search(rf"^\W*{folder}/", text, re.MULTILINE)} == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_pages_next_to_the_code_exist(page: str):
    """Links within the site are checked by `make docs`."""
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\(([^)#]+)\)", (root / page).read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://") and not (root / link).exists()] == []
