"""Private and undocumented names of other libraries: each that we use is listed, and each that is listed is there."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_export
import polyexport
import private_names
from isolated import in_toolchain

ENGINE, FACE = Path(polyexport.__file__).parent, Path(lightning_export.__file__).parent
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for root in (ENGINE, FACE) for file in root.rglob("*.py")}
OPERATORS = {
    "_adaptive_avg_pool",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact",
    "_log_softmax",
    "_unique2",
}
GRAPH_OPERATIONS = {"_FusedConv2D", "_FusedMatMul"}
ENDINGS = {"_hooks", "_with_indices"}
C_TYPES = {"_Float16", "_t"}
PYTHON = {"_exit", "_fields", "_getframe"}


def is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def ours(tree: ast.AST) -> Iterator[str]:
    """What a file of ours names itself."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(asname=str(name)):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self" | "made")):
                yield name


def used(tree: ast.AST) -> Iterator[str]:
    """What a file imports, reads of an object, or has as a text that may be asked for by `getattr`."""
    pieces = {piece for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                if not module.startswith(("polyexport", "lightning_export", "__future__")):
                    yield from (*module.split("."), *(alias.name for alias in names))
            case ast.Import(names=names):
                yield from (part for alias in names for part in alias.name.split("."))
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                if node not in pieces:
                    yield name


def test_every_private_name_that_we_use_is_listed():
    own = (
        {name for tree in TREES.values() for name in ours(tree)}
        | OPERATORS
        | GRAPH_OPERATIONS
        | ENDINGS
        | PYTHON
        | C_TYPES
    )
    listed = {
        part
        for files in private_names.NAMES.values()
        for names in files.values()
        for name in names
        for part in name.replace(":", ".").split(".")
    }
    found = {name: file.name for file, tree in TREES.items() for name in used(tree) if is_private(name)}
    unknown = {name: file for name, file in found.items() if name not in own | listed}
    assert unknown == {}, "list them in tests/support/private_names.py"


def test_each_listed_name_is_in_the_file_that_it_is_listed_for():
    for files in private_names.NAMES.values():
        for file, names in files.items():
            text = (FACE.parent / file if file.startswith("lightning_export") else ENGINE / file).read_text()
            lasts = [name.replace(":", ".").split(".")[-1] for name in names]
            assert [last for last in lasts if not re.search(rf"\b{last}\b", text)] == [], file


def test_the_training_environment_has_every_private_name_that_we_use():
    assert private_names.lost(private_names.NAMES[private_names.HOST]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(private_names.NAMES.keys() - {private_names.HOST}))
def test_a_toolchain_has_every_private_name_that_we_use(name: str):
    assert json.loads(in_toolchain(name, str(Path(private_names.__file__)), name)) == []


def test_a_missing_name_is_reported_with_the_file_that_uses_it():
    names = {
        "capture/unwrap.py": ("torch.nn:Module._buffers", "torch.nn:Module._gone", "torch.nowhere:_x"),
        "formats/torchscript.py": ("torch._ops:OpOverload._schema", "torch._ops:Gone._schema"),
    }
    assert private_names.lost(names) == [
        "torch.nn:Module._gone (capture/unwrap.py)",
        "torch.nowhere:_x (capture/unwrap.py)",
        "torch._ops:Gone._schema (formats/torchscript.py)",
    ]
