"""Runs Python programs in processes forked from one that has imported what they need.

    python -P many_programs.py IMPORT,… < PROGRAMS

PROGRAMS is a JSON list of `isolated.Program`. Prints their exit codes, as a JSON list on the last line.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback


def run(words: list[str], folder: str, environment: dict[str, str]) -> int:
    """Run `python WORDS` in a folder; what it prints is in the file `printed` there."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    tempfile.tempdir = None  # it may be that of the process that this one was forked from
    os.chdir(folder)
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    try:
        (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def main(imports: str) -> None:
    for name in filter(None, imports.split(",")):
        importlib.import_module(name)
    print(json.dumps([run(*program) for program in json.load(sys.stdin)]))


if __name__ == "__main__":
    main(sys.argv[1])
