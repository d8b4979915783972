"""Export many captured modules in one process other than the one that trained them.

    python many_models.py FORMAT,... EXPORT...

Each EXPORT is an unfinished export; a FORMAT comes after its upstream. The functions are the worker's own. Prints a
JSON object: export -> "notes", and format -> whether it agrees, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from polyexport import worker
from polyexport.formats import known
from polyexport.workers.job import Convert, Prepare, Verify


def one(root: Path, formats: list[str]) -> dict[str, Any]:
    """The reference, and each format by its first route."""
    reference = worker.prepare(root, Prepare())
    found: dict[str, Any] = {"notes": [*reference.notes, reference.static_because]}
    sources = {"module": "source"}
    for name in formats:
        each, route = known()[name], known()[name].routes[0]
        sources[name] = f"source/made/{name}/{each.artifact}"
        source, target, spec = sources[route.upstream], sources[name], reference.spec
        judge = Verify(format=name, source=target, spec=spec, batches=reference.batches, noise=reference.noise)
        try:
            worker.convert(root, Convert(format=name, source=source, spec=spec, route=route.name, target=target))
            found[name] = worker.verify(root, judge)["parity"].passed
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(formats: str, *roots: str) -> None:
    """Do the exports; see the module's docstring."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # converters print
    found = {}
    for root in roots:
        try:
            found[root] = one(Path(root), formats.split(","))
        except Exception as error:
            found[root] = {"prepare": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(found))
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
