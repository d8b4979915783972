"""Whether there is an NVIDIA GPU, by the file system, since a library would have to be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

_SIGNS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu")
"""Device nodes of the driver on Linux, under WSL, and on Jetson."""


def missing() -> str:
    """Why no NVIDIA GPU can be used, in a line; empty if there seems to be one."""
    if any(Path(sign).exists() for sign in _SIGNS) or shutil.which("nvidia-smi"):
        return ""
    return "it needs an NVIDIA GPU with its driver, and this machine has none (no /dev/nvidia*, no nvidia-smi)"
