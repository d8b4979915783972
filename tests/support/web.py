"""What the tests of web pages share: a folder served over HTTP, with the runtimes of the toolchains.

The TensorFlow.js toolchain has only the packages that `@tensorflow/tfjs`, which applications install, is composed of;
that one is made of them here.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from polyexport.workers import toolchain

_PARTS = ("core", "converter", "backend-cpu")


def node_modules(root: Path) -> None:
    """Give a folder the packages of the tfjs toolchain, and `@tensorflow/tfjs` beside them, for Node and for pages."""
    theirs, ours = toolchain.find("tfjs").folder / "node_modules", root / "node_modules"
    union = ours / "@tensorflow/tfjs"
    (union / "dist").mkdir(parents=True)
    for package in (*theirs.iterdir(), *(theirs / "@tensorflow").iterdir()):
        if package.name != "@tensorflow":
            (ours / package.relative_to(theirs)).symlink_to(package)
    parts = {part: theirs / "@tensorflow" / f"tfjs-{part}" for part in _PARTS}
    version = json.loads((parts["core"] / "package.json").read_text())["version"]
    (union / "package.json").write_text(json.dumps({"type": "module", "main": "index.js", "version": version}))
    (union / "index.js").write_text("".join(f"export * from '@tensorflow/tfjs-{part}';\n" for part in _PARTS))
    whole = "\n".join((folder / f"dist/tf-{part}.min.js").read_text("utf-8") for part, folder in parts.items())
    (union / "dist/tf.min.js").write_text(whole, "utf-8")


def packages_of(name: str, root: Path) -> None:
    """Give a folder the packages of a toolchain as they are."""
    chain = toolchain.find(name)
    chain.interpreter()
    (root / "node_modules").symlink_to(chain.folder / "node_modules")


PACKAGES = {"tfjs": node_modules, **{name: partial(packages_of, name) for name in ("litert_web", "onnx_web")}}
"""For each toolchain, the function that puts its packages into a folder."""


@contextlib.contextmanager
def served(root: Path, packages: Callable[[Path], None] = node_modules) -> Iterator[str]:
    """Serve `root`, with packages of a toolchain as `/node_modules`; yields the address."""
    packages(root)
    handler = partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Write no log."""
