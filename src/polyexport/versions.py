"""Versions of what is installed here; the standard library only, since isolated toolchains ask too."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package by name; requirements are read as their package, missing ones left out."""
    found = {}
    for package in packages:
        name = re.split(r"[^\w.-]", package, maxsplit=1)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """What a reader of a report has to know about this machine."""
    about = {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor()}
    return about | versions(("lightning-export", "torch", "lightning", "numpy"))


def git_commit() -> str:
    """The commit of the working folder, with `-dirty` behind it where files differ; empty outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
