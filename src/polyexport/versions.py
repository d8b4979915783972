"""What is installed here, and on which machine; by the standard library, since isolated toolchains have no more."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MODEL = Path("/proc/device-tree/model")

_CORES = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd48": "Cortex-X2",
    "0xd49": "Neoverse-N2",
    "0xd4d": "Cortex-A715",
    "0xd4e": "Cortex-X3",
    "0xd4f": "Neoverse-V2",
}
"""Arm's own cores by `CPU part`, as in Linux's arch/arm64/include/asm/cputype.h: Linux gives no name of them."""

_ARM = "0x41"
"""Arm's own `CPU implementer`."""


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


def machine() -> str:
    """The system and processor: `macOS 15.2, Apple M3`, `Debian GNU/Linux 12 (bookworm), aarch64 (Cortex-A72)`."""
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    else:
        try:
            system = platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            system = f"{platform.system()} {platform.release()}"
    return f"{system}, {_board() or processor()}"


def processor() -> str:
    """The processor's name, or `aarch64 emulated on AMD EPYC` where it runs programs of another architecture."""
    here = platform.machine()
    name, architecture = _apple() if sys.platform == "darwin" else _linux()
    if architecture and architecture != _architecture(here):
        return f"{here} emulated on {name or architecture}"
    if name in _CORES.values():
        return f"{here} ({name})"
    return name or platform.processor() or here


def _architecture(machine: str) -> str:
    """The family of a machine's name: `x86`, `arm`, or the name itself."""
    if machine.startswith(("arm", "aarch")):
        return "arm"
    return "x86" if re.fullmatch(r"x86_64|i\d86|AMD64", machine) else machine


def _linux() -> tuple[str, str]:
    """The processor's name and architecture; empty where Linux does not say.

    The emulator of a container or of `qemu-user` answers for the architecture, but `/proc/cpuinfo` is the host's.
    """
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    facts = dict(re.findall(r"^([^\t:\n]+?)\s*: (.+)$", text, re.MULTILINE))  # of the last, and so the fastest, core
    architecture = "arm" if "CPU implementer" in facts else "x86" if "flags" in facts else ""
    core = _CORES.get(facts.get("CPU part", "")) if facts.get("CPU implementer") == _ARM else None
    return core or facts.get("model name", "").strip(), architecture


def _board() -> str:
    """The name of a single-board computer: `Raspberry Pi 5 Model B Rev 1.0`; empty elsewhere."""
    try:
        return _MODEL.read_text(encoding="utf-8").strip("\0\n ")
    except OSError:
        return ""


def _apple() -> tuple[str, str]:
    """The chip of a Mac, and its architecture: `("Apple M3", "arm")`; empty where macOS does not say."""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        name = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    return name, ("arm" if name.startswith("Apple") else "x86") if name else ""
