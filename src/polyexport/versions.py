"""Versions of what is installed here; only the standard library is used, since isolated toolchains import this."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata

from polyexport.machine import processor


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package or requirement, by the package's name; missing ones are left out."""
    found = {}
    for package in packages:
        name = re.split(r"[^\w.-]", package, maxsplit=1)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The facts about this machine that the report shows."""
    about = {"python": platform.python_version(), "platform": platform.platform(), "processor": processor()}
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
