"""Whether there is an NVIDIA GPU, by the file system, since a library would have to be loaded; and what it is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from polyexport.errors import ToolMissing

_SIGNS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu")
"""Device nodes of the driver on Linux, under WSL, and on Jetson."""


def missing() -> str:
    """Why no NVIDIA GPU can be used, in a line; empty if there seems to be one."""
    if any(Path(sign).exists() for sign in _SIGNS) or shutil.which("nvidia-smi"):
        return ""
    return "it needs an NVIDIA GPU with its driver, and this machine has none (no /dev/nvidia*, no nvidia-smi)"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU; its compute capability is one such as 9.0."""

    name: str
    capability: str
    free_bytes: int


def device() -> Device:
    """The first GPU, as PyTorch sees it.

    Raises:
        ToolMissing: it sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ToolMissing("PyTorch sees no GPU: install its CUDA build, or check CUDA_VISIBLE_DEVICES")
    about = torch.cuda.get_device_properties(0)
    return Device(about.name, f"{about.major}.{about.minor}", torch.cuda.mem_get_info(0)[0])
