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
    """Write `index.html` next to an artifact.

    Args:
        artifact: The artifact's path.
        spec: The signature with PyTorch's names.
        toolchain: The folder of `page.js`, which opens the artifact, and of `package.json`, which pins the runtime.
        package: The runtime's npm package.
        pinned: The package whose version is pinned, if the runtime is a part of that; by default `package`.
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
    """The signature of an input with size 1 along every dynamic axis."""
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.sized(lambda _: 1)}


def _script(value: Any) -> str:
    """JSON that is safe inside a `<script>` element."""
    return json.dumps(value).replace("<", "\\u003c")
