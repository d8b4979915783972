"""Environments for packages that the training environment does not have: made once, over its torch, beside toolchains.

`torchvision` on the package index is built for a GPU's torch, and beside a CPU's it cannot load its operators. Without
them all else in it works, once the two that it describes at import are declared; a hook declares them.
"""

from __future__ import annotations

import textwrap
from importlib import metadata
from pathlib import Path

from polyexport.workers.toolchain import Toolchain

RUNTIMES = ("onnxruntime", "openvino", "ai-edge-litert")
"""The packages of the environment `kit`, which stands for a device: runtimes, but neither PyTorch nor polyexport."""

TORCHVISION = "torchvision==0.28.0"
"""The release that belongs to the torch of constraints.txt."""

HOOK = textwrap.dedent('''\
    """Declares the operators that torchvision describes at import, when its compiled ones cannot be loaded."""

    import sys


    class Declared:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                import torch

                sys.meta_path.remove(self)
                torch.ops.torchvision_declared = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    if not hasattr(torch.ops.torchvision, operator):
                        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                        torch.ops.torchvision_declared.define(schema)


    sys.meta_path.insert(0, Declared())
    ''')


def interpreter(name: str, *requirements: str) -> Path:
    """The Python of an environment that has `requirements` over the packages of this one.

    Raises:
        ToolMissing: it cannot be made.
    """
    pins = [f"{package}=={metadata.version(package)}" for package in ("lightning", "numpy", "transformers")]
    python = Toolchain(name, (*requirements, *pins), layered=True).interpreter(print)
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    if (site / "torchvision").exists():
        (site / "torchvision_declared.py").write_text(HOOK, encoding="utf-8")
        (site / "torchvision_declared.pth").write_text("import torchvision_declared\n", encoding="utf-8")
    return python
