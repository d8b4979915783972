"""What a format is shipped to: declared once, and read by the command, the docs and the report's "What to ship"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from polyexport import FORMATS
from polyexport.cli import app
from polyexport.format import Format, Target
from polyexport.formats import by_target, resolve

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_what_it_is_shipped_to(name: str) -> None:
    assert FORMATS[name].targets
    assert set(FORMATS[name].targets) <= set(get_args(Target))


def test_targets_are_in_their_order_and_a_format_is_under_each_of_its_own() -> None:
    groups = by_target(resolve(["tflite-int8", "tfjs", "onnx"]))
    named = {target: [each.name for each in group] for target, group in groups.items()}
    assert list(named.items()) == [
        ("server CPU", ["onnx"]),
        ("phone", ["tflite-int8"]),
        ("browser", ["tfjs"]),
        ("microcontroller", ["tflite-int8"]),
    ]


def test_the_command_lists_formats_under_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    printed = CliRunner().invoke(app, ["formats"]).stdout
    first_words = [line.split("  ")[0].strip() for line in printed.splitlines()]
    places = [first_words.index(target) for target in by_target(FORMATS.values())]
    assert places == sorted(places)
    parts = [first_words[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]
    for group, part in zip(by_target(FORMATS.values()).values(), parts, strict=True):
        assert [word for word in part if word in FORMATS] == [each.name for each in group]


def shortened(group: Iterable[Format]) -> str:
    """Names in Markdown; of a precision whose format comes before it, the ending alone."""
    words: list[str] = []
    for each in group:
        base = max((name for name in words if each.name.startswith(f"{name}-")), key=len, default="")
        words.append(each.name.removeprefix(base) if base else each.name)
    return ", ".join(f"`{word}`" for word in words)


def test_the_docs_list_them_too() -> None:
    rows = dict(re.findall(r"^\| ([\w ]+) \| (`.*`) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    for target, group in by_target(FORMATS.values()).items():
        assert rows.get(target) == shortened(group), f"docs/formats.md: | {target} | {shortened(group)} |"
