"""A stand-in for Coral's `edgetpu_compiler`, which only its vendor has: its command line and log, nothing compiled.

    edgetpu_compiler [-s] [-a] [-o FOLDER] MODEL...

Runs in the toolchain `tflite`. Operators are listed as they are in the model; those named in `STANDIN_REFUSES` are
refused. https://coral.ai/docs/edgetpu/compiler/
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from ai_edge_litert.interpreter import Interpreter

VERSION = "This is a stand-in for Edge TPU Compiler version 16.0.384591198"


def main() -> None:
    """Write MODEL_edgetpu.tflite, a copy, and MODEL_edgetpu.log."""
    parser = argparse.ArgumentParser("edgetpu_compiler")
    parser.add_argument("-s", "--show_operations", action="store_true")
    parser.add_argument("-a", "--enable_multiple_subgraphs", action="store_true")
    parser.add_argument("-o", "--out_dir", type=Path, default=Path())
    parser.add_argument("models", nargs="+", type=Path)
    given = parser.parse_args()
    print(VERSION)
    for model in given.models:
        try:
            interpreter = Interpreter(str(model))
        except ValueError:
            sys.exit(f"Invalid model: {model}")
        counts = Counter(each["op_name"] for each in interpreter._get_ops_details())
        refused = os.environ.get("STANDIN_REFUSES", "").split()
        status = {name: "Operation not supported" if name in refused else "Mapped to Edge TPU" for name in counts}
        rows = "".join(f"{name:<30} {count:<10} {status[name]}\n" for name, count in counts.items())
        output = given.out_dir / f"{model.stem}_edgetpu.tflite"
        shutil.copyfile(model, output)
        log = (
            f"{VERSION}\nInput: {model}\nOutput: {output}\n\nOperator                       Count      Status\n\n{rows}"
        )
        output.with_suffix(".log").write_text(log)
        print("\nModel compiled successfully in 1 ms.\n")
        if given.show_operations:
            print(log)


if __name__ == "__main__":
    main()
