"""Versions of what is installed here; only the standard library is used, since isolated toolchains import this."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata


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
    about = {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor()}
    return about | versions(("lightning-export", "torch", "lightning", "numpy"))


def machine() -> str:
    """The system and processor in a few words: `macOS 15.2, Apple M3`."""
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    else:
        try:
            system = platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            system = f"{platform.system()} {platform.release()}"
    return f"{system}, {_board() or _processor()}"


def _board() -> str:
    """The name of a single-board computer: `Raspberry Pi 5 Model B Rev 1.0`; empty elsewhere."""
    try:
        with open("/proc/device-tree/model", encoding="utf-8") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return ""


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
        return _apple() or platform.processor() or platform.machine()


def _apple() -> str:
    """The chip of a Mac: `Apple M3`; empty elsewhere."""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
