"""Exports one model of each architecture family and writes what came out as a page: `make test-zoo`.

Results are kept in the user's cache folder as one JSON line a model, so that a run which was stopped goes on where it
was. It ends with 1 where too few cells are verified.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

import environments
from outcome_table import Cell, Cells, cell, page, record, recorded

if TYPE_CHECKING:
    from polyexport.engine.engine import Engine

FORMATS = ("onnx", "openvino", "coreml", "saved_model", "tflite", "paddle")
SHARE = 0.97
"""The share of the asked cells that has to be verified."""

PACKAGES = ("torch", "transformers", "timm", "torchvision")
RECORD = user_cache_path("polyexport") / "zoo.jsonl"


def missing(found: dict[str, Cell], formats: tuple[str, ...], again: bool) -> list[str]:
    """The formats that are still to be made of a model."""
    return [name for name in formats if name not in found or (again and found[name]["state"] != "verified")]


def outcomes(model: str, formats: list[str], folder: Path, engine: Engine) -> dict[str, Cell]:
    """Export one model; what cannot even be built is `failed` in every format."""
    from architectures import build
    from polyexport.engine.export import requested
    from polyexport.formats import resolve

    try:
        with requested(*build(model), resolve(formats), folder) as request:
            report = engine.submit(request).result()
    except Exception as error:  # any library's model may raise anything; the page names it
        return dict.fromkeys(formats, cell("failed", f"{type(error).__name__}: {error}", None))
    return {each.format: cell(each.state, each.reason, each.route) for each in report.outcomes}


def run(models: list[str], formats: tuple[str, ...], again: bool) -> None:
    """Export what is missing, model after model by one engine, and record each as it ends."""
    from polyexport.engine.engine import Engine

    with Engine() as engine:
        for model in models:
            asked = missing(recorded(RECORD).get(model, {}), formats, again)
            if not asked:
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
                cells = outcomes(model, asked, Path(folder, "export"), engine)
            record(RECORD, model, cells)
            states = " ".join(f"{name}={each['state']}" for name, each in cells.items())
            print(f"{model}: {states} ({time.perf_counter() - start:.0f} s)", flush=True)


def enough(cells: Cells, models: list[str], formats: tuple[str, ...]) -> bool:
    """Whether the share of verified cells is reached; a cell that was not run is not verified."""
    states = [cells.get(model, {}).get(name, {}).get("state") for model in models for name in formats]
    return states.count("verified") >= SHARE * len(states)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="what to make, by commas")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--again", action="store_true", help="repeat what was not verified")
    parser.add_argument("--page", type=Path, help="the page to write")
    asked = parser.parse_args()
    python = environments.interpreter("zoo", "timm==1.0.31", environments.TORCHVISION)
    if Path(sys.executable) != python:  # all of it runs there: workers start with the interpreter that we have
        os.execv(python, [str(python), *sys.argv])
    from architectures import FAMILIES
    from polyexport.versions import versions

    models, formats = [name for name in FAMILIES if asked.models in name], tuple(asked.formats.split(","))
    run(models, formats, asked.again)
    if asked.page:
        made = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items())
        about = (
            "Written by `make test-zoo`: one small model of each architecture family, with random weights and a "
            f"dynamic batch, with {made}."
        )
        asked.page.parent.mkdir(parents=True, exist_ok=True)
        asked.page.write_text(page("Architectures", about, recorded(RECORD), list(FAMILIES), FORMATS), encoding="utf-8")
    return 0 if enough(recorded(RECORD), models, formats) else 1


if __name__ == "__main__":
    sys.exit(main())
