"""Runs a vendor's program, such as a compiler or a converter."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program without input; its output is printed, and so goes to the worker's log.

    Paths in the command are absolute. Without a `folder` it runs in a temporary one: some programs write to where they
    run, which is the folder of training, and for two at once the same one.
    """
    with contextlib.ExitStack() as stack:
        done = subprocess.run(
            command,
            cwd=folder or stack.enter_context(tempfile.TemporaryDirectory()),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    print(done.stdout, done.stderr)
    return done
