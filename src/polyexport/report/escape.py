"""Text of others on its way to a reader: names, reasons and notes, which are anything that a model or a converter says.

A terminal must not obey it, and Markdown must show it as it is.
"""

from __future__ import annotations

import re
import unicodedata

_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\x9c|$)|\x1b.", re.DOTALL)
_JOINERS = "\u200c\u200d"  # of Persian words and of emoji


def printable(text: str) -> str:
    """`text` without what a terminal obeys: escape sequences, control characters, overrides of direction."""
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
    """`text` in one line of Markdown that shows it as it is, also in the cell of a table."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(r"\\\g<0>", " ".join(escaped.split()))


def fence(text: str, least: int = 1) -> str:
    """As many backticks as it takes to put `text` between them."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text) if len(run) >= least)])


def code(text: str) -> str:
    """`text` as a code span of Markdown."""
    line = " ".join(printable(text).split())
    around = fence(line)
    return f"{around} {line} {around}" if "`" in line else f"{around}{line}{around}"
