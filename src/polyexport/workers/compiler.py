"""The system's C and C++ compilers: which programs they are, and what to do if there is none."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Literal

Language = Literal["C", "C++"]

_VARIABLES: dict[Language, str] = {"C": "CC", "C++": "CXX"}


def program(language: Language) -> str:
    """The compiler: what `CC` or `CXX` names, else the platform's default name."""
    on_macos = platform.system() == "Darwin"
    usual = {"C": "cc", "C++": "clang++" if on_macos else "g++"}
    return os.environ.get(_VARIABLES[language]) or usual[language]


def missing(language: Language) -> str:
    """Why nothing can be compiled here, with what to install, in a line; empty if it can."""
    name = program(language)
    if platform.system() == "Windows":
        return f"compiling {language} is supported on Linux and macOS only"
    if shutil.which(name):
        return ""
    how = "xcode-select --install" if platform.system() == "Darwin" else "apt install g++, or dnf install gcc-c++"
    return (
        f"it needs a {language} compiler, and {name} is not on PATH ({how}; or set {_VARIABLES[language]} to another)"
    )


def version(language: Language) -> str:
    """The first line of the compiler's `--version`."""
    words = [program(language), "--version"]
    said = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    return said.partition("\n")[0]
