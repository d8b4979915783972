"""Escapes text from outside before it is shown: names, reasons and notes may be anything.

A terminal must not interpret it, and Markdown must show it unchanged.
"""

from __future__ import annotations

import re
import unicodedata

_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\x9c|$)|\x1b.", re.DOTALL)
_JOINERS = "\u200c\u200d"  # used in Persian words and in emoji


def printable(text: str) -> str:
    """`text` without what a terminal interprets: escape sequences, control characters, direction overrides."""
    return "".join(map(_shown, _SEQUENCES.sub("", text)))


def _shown(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    kind = unicodedata.category(character)
    if kind in ("Zl", "Zp"):
        return " "
    return "\ufffd" if kind == "Cs" else "" if kind in ("Cc", "Cf") else character


_MARKUP = re.compile(r"[\\`*|\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it unchanged, even in a table cell."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(r"\\\g<0>", " ".join(escaped.split()))


def fence(text: str, least: int = 1) -> str:
    """Enough backticks to enclose `text`, at least `least`."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text) if len(run) >= least)])


def code(text: str) -> str:
    """`text` as a code span of Markdown."""
    line = " ".join(printable(text).split())
    around = fence(line)
    return f"{around} {line} {around}" if "`" in line else f"{around}{line}{around}"
