"""Another architecture: the arm64 Python of this machine's Debian with ONNX Runtime, run by QEMU, without root.

It is made once, under the user's cache folder, from the packages that `apt-get` and `uv` are configured for.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from polyexport.workers.installer import pip_indexes, uv
from polyexport.workers.toolchain import cache_folder

CPU = "cortex-a72"

RUNTIMES = (f"onnxruntime=={metadata.version('onnxruntime')}", f"numpy=={metadata.version('numpy')}")

_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")

_NEEDED = ("apt-get", "dpkg-deb")

_APT = """\
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "";
Acquire::Languages "none";
Dir::State "STATE";
Dir::State::status "STATE/status";
Dir::Cache "STATE";
"""
"""Settings for a Debian without any package, whose lists and archives are in STATE."""

_CPUINFO = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""
"""What Linux says of a Cortex-A72: QEMU before 8.2 shows the host's, which ends ONNX Runtime by a signal."""


class Unavailable(Exception):
    """It cannot be had here; the message says why."""


@functools.cache
def python() -> tuple[str, ...]:
    """The command of an aarch64 Python that has ONNX Runtime and numpy, and nothing of us.

    Raises:
        Unavailable: there is no QEMU for it, or a package is not to be had.
    """
    qemu = next(filter(None, map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))), None)
    if qemu is None:
        raise Unavailable("there is no qemu-aarch64 on PATH (apt install qemu-user-static)")
    if lacking := [each for each in _NEEDED if shutil.which(each) is None]:
        raise Unavailable(f"{' and '.join(lacking)} is not on PATH, which Debian's packages for arm64 come by")
    root = cache_folder() / f"aarch64-{hashlib.sha256(repr((_PACKAGES, RUNTIMES)).encode()).hexdigest()[:12]}"
    root.parent.mkdir(parents=True, exist_ok=True)
    command = (qemu, "-L", str(root), "-cpu", CPU, str(root / "usr/bin/python3"))
    complete = root / ".complete"
    with FileLock(root.with_suffix(".lock")):
        if not complete.exists():
            shutil.rmtree(root, ignore_errors=True)
            _make(root, command)
            complete.touch()
    return command


def _make(root: Path, command: tuple[str, ...]) -> None:
    """Unpack Debian's Python into `root`, and install the runtimes beside it."""
    apt = root / "apt"
    (apt / "lists/partial").mkdir(parents=True)
    (apt / "archives/partial").mkdir(parents=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(_APT.replace("STATE", str(apt)), encoding="utf-8")
    _run("apt-get", "-c", str(apt / "apt.conf"), "update")
    flags = ("--download-only", "--yes", "--no-install-recommends")
    _run("apt-get", "-c", str(apt / "apt.conf"), "install", *flags, *_PACKAGES)
    for package in (apt / "archives").glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(root))
    shutil.rmtree(apt)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(_CPUINFO, encoding="utf-8")
    version = _run(*command, "-I", "-c", "import platform; print(platform.python_version())").strip()
    given = ("--python-version", version, "--python-platform", "aarch64-manylinux_2_28", "--only-binary", ":all:")
    target = root / "usr/lib/python3/dist-packages"
    _run(uv(), "pip", "install", "--quiet", *given, "--target", str(target), *RUNTIMES)
    _run(*command, "-I", "-c", "import onnxruntime")  # compiles it


def _run(*words: str) -> str:
    environment = {**os.environ, **pip_indexes()}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise Unavailable(f"{words[0]} fails: {' '.join(done.stderr.split()[-40:])}")
    return done.stdout
