"""Is there an NVIDIA GPU? Asked of the file system, since asking a library means loading it."""

from __future__ import annotations

import shutil
from pathlib import Path

_SIGNS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu")
"""Device nodes of the driver on Linux, under WSL, and on Jetson."""


def missing() -> str:
    """Why no NVIDIA GPU can be used, in a line; empty where one seems to be there."""
    if any(Path(sign).exists() for sign in _SIGNS) or shutil.which("nvidia-smi"):
        return ""
    return "it needs an NVIDIA GPU with its driver, and this machine has none (no /dev/nvidia*, no nvidia-smi)"
