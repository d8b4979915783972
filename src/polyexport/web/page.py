"""The page beside an artifact for browsers: it loads the artifact and runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from polyexport.spec import ExportSpec, TensorSpec

NAME = "index.html"

_HERE = Path(__file__).parent


def write(artifact: Path, spec: ExportSpec, toolchain: str, package: str, pinned: str = "") -> None:
    """Write it.

    Args:
        artifact: What it stands beside.
        spec: PyTorch's names, dtypes and shapes.
        toolchain: The folder of `page.js`, which opens the artifact, and of `package.json`, which pins the runtime.
        package: What npm calls the runtime.
        pinned: The package whose version is the runtime's, where that is a part of it; by default itself.
    """
    folder = _HERE.parent / "toolchains" / toolchain
    pins = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    parts = {
        "artifact": artifact.name,
        "signature": _script({"inputs": list(map(_about, spec.inputs))}),
        "runtime": _script({"package": package, "version": pins[pinned or package]}),
        "adapter": (folder / "page.js").read_text(encoding="utf-8").rstrip(),
    }
    page = (_HERE / "page.html").read_text(encoding="utf-8")
    filled = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)
    artifact.with_name(NAME).write_text(filled, encoding="utf-8")


def _about(tensor: TensorSpec) -> dict[str, Any]:
    """An input of one row, and of size 1 along what else is dynamic."""
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.sized(lambda _: 1)}


def _script(value: Any) -> str:
    """JSON inside a script, which nothing in it ends."""
    return json.dumps(value).replace("<", "\\u003c")
