"""What the tests of web pages share: a folder served over HTTP, and TensorFlow.js from the toolchain."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

from polyexport.workers import toolchain


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of `root`, which gets the packages of the tfjs toolchain as `/node_modules`."""
    (root / "node_modules").symlink_to(toolchain.find("tfjs").folder / "node_modules")
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing."""
