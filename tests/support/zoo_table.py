"""Exports many models to many formats and writes what came out as a page: `make test-zoo` and `make test-matrix`.

    python zoo_table.py families|models [--formats F,…] [--models PART] [--again] [--sizes] [--times] [--page FILE]

`families` is one model of each architecture family of the libraries that have most of them, in the formats that devices
have most; `models` are those of zoo.py, in every format. Results are kept in `outcomes/` as one JSON line a model, so
that a run which was stopped goes on where it was. It ends with 1 where too few cells are verified.

With `--times`, artifacts are timed with one row on one core beside eager PyTorch, and what was measured while other
programs had the processor is not recorded. With `--sizes` or `--times`, what is recorded without is exported again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environments
import zoo
from outcome_table import (
    ARTIFACT,
    OUTCOMES,
    Cell,
    Cells,
    Measured,
    cell,
    page,
    page_by_format,
    record,
    recorded,
    write,
)
from polyexport import FORMATS

if TYPE_CHECKING:
    from polyexport import Outcome, Report
    from polyexport.engine.engine import Engine

Build = Callable[[str], tuple[Any, Any]]
"""A model's name to the model and its inputs."""


@dataclass(frozen=True)
class Table:
    """Which models are exported to which formats, and what is asked of that.

    Attributes:
        share: Of the cells in the formats `asked` that has to be verified; built will do where no device is here.
        build: Where the models come from; imported in the interpreter that has their libraries.
    """

    name: str
    title: str
    about: str
    models: Callable[[], Sequence[str]]
    build: Callable[[], Build]
    formats: tuple[str, ...]
    asked: tuple[str, ...]
    share: float
    page: Callable[[str, str, Cells, Sequence[str], Sequence[str]], str]
    packages: tuple[str, ...]
    is_layered: bool = False

    @property
    def record(self) -> Path:
        return OUTCOMES / f"{self.name}.jsonl"


def _families() -> Sequence[str]:
    from architectures import FAMILIES

    return list(FAMILIES)


def _family() -> Build:
    from architectures import build

    return build


COMMON = ("onnx", "openvino", "coreml", "saved_model", "tflite", "paddle")
BUILT = {"tensorrt-rtx": ("verified", "unverified")}
"""The states that count where no device of a format is here; else `verified` alone."""

_TABLES = (
    Table(
        "families",
        "Architectures",
        "Written by `make test-zoo`: one small model of each architecture family, with random weights and a dynamic "
        "batch, with {versions}.",
        _families,
        _family,
        COMMON,
        COMMON,
        0.97,
        page,
        ("torch", "transformers", "timm", "torchvision"),
        is_layered=True,
    ),
    Table(
        "models",
        "Every format",
        "Written by `make test-matrix`: the models of `tests/support/zoo.py`, small, with random weights and a dynamic "
        "batch, with {versions}.",
        lambda: [*zoo.GROUND, *zoo.FURTHER],
        lambda: zoo.build,
        tuple(FORMATS),
        ("ncnn", "onnx-web", "aoti", "tensorrt-rtx"),
        0.9,
        page_by_format,
        ("torch", "transformers"),
    ),
)
TABLES = {each.name: each for each in _TABLES}


def missing(
    found: dict[str, Cell], formats: tuple[str, ...], again: bool, *, sizes: bool = False, times: bool = False
) -> list[str]:
    """The formats that are still to be made of a model, or to be made again."""

    def is_missing(cell: Cell | None) -> bool:
        if cell is None or (again and cell["state"] != "verified"):
            return True
        is_made = cell["state"] in ARTIFACT
        return is_made and ((sizes and "bytes" not in cell) or (times and "p50_ms" not in cell))

    return [name for name in formats if is_missing(found.get(name))]


def outcomes(
    build: Build, model: str, formats: list[str], folder: Path, engine: Engine, *, times: bool = False
) -> dict[str, Cell]:
    """Export one model, and time it; what cannot even be built is `failed` in every format."""
    from polyexport.engine.export import requested
    from polyexport.formats import resolve

    try:
        with requested(*build(model), resolve(formats), folder) as request:
            report = engine.submit(request).result()
    except Exception as error:  # any library's model may raise anything; the page names it
        return dict.fromkeys(formats, cell("failed", f"{type(error).__name__}: {error}", None))
    timed = times_of(report) if times else {}
    return {
        each.format: cell(each.state, each.reason, each.route, **sizes_of(each, report), **timed.get(each.format, {}))
        for each in (report[name] for name in formats)
    }


def sizes_of(outcome: Outcome, report: Report) -> Measured:
    """The size of an artifact, and that of the model's weights in float32."""
    if outcome.artifact is None or report.model is None:
        return {}
    return {"bytes": outcome.artifact.bytes, "weights_bytes": 4 * report.model.parameters}


AT_ONCE = 12
"""How many runtimes are in memory while they are timed."""


def times_of(report: Report) -> dict[str, Measured]:
    """Latencies on one core by format, of those that are comparable with eager PyTorch's, or that cannot be timed."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from runtimes import timed

    found: dict[str, Measured] = {}
    made = [each for each in report.outcomes if each.state in ARTIFACT]
    for start in range(0, len(made), AT_ONCE):
        part = timed(replace(report, outcomes=tuple(made[start : start + AT_ONCE])), threads=1)
        eager = part.baseline
        for each in part.outcomes:
            if each.latency is None or each.latency.batch_1_p50_ms is None:
                found[each.format] = {"p50_ms": None}
            elif each.latency.speedup and eager and eager.batch_1_p50_ms:  # no speedup where the machine was busy
                found[each.format] = {"p50_ms": each.latency.batch_1_p50_ms, "eager_ms": eager.batch_1_p50_ms}
    return found


def run(
    table: Table,
    models: Sequence[str],
    formats: tuple[str, ...],
    again: bool,
    *,
    sizes: bool = False,
    times: bool = False,
) -> None:
    """Export what is missing, model after model by one engine, and record each as it ends."""
    from polyexport.engine.engine import Engine

    build = table.build()
    with Engine() as engine:
        for model in models:
            asked = missing(recorded(table.record).get(model, {}), formats, again, sizes=sizes, times=times)
            if not asked:
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
                cells = outcomes(build, model, asked, Path(folder, "export"), engine, times=times)
            record(table.record, model, cells)
            states = " ".join(f"{name}={each['state']}" for name, each in cells.items())
            print(f"{model}: {states} ({time.perf_counter() - start:.0f} s)", flush=True)


def enough(cells: Cells, models: Sequence[str], formats: Sequence[str], share: float) -> bool:
    """Whether the share of verified cells is reached; a cell that was not run is not verified."""
    reached = [
        cells.get(model, {}).get(name, {}).get("state") in BUILT.get(name, ("verified",))
        for model in models
        for name in formats
    ]
    return sum(reached) >= share * len(reached)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--formats", default="", help="what to make, by commas; all of the table by default")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--again", action="store_true", help="repeat what was not verified")
    parser.add_argument("--sizes", action="store_true", help="repeat what has an artifact of unknown size")
    parser.add_argument("--times", action="store_true", help="time artifacts; repeat what has one that was not timed")
    parser.add_argument("--page", type=Path, help="the page to write")
    asked = parser.parse_args()
    table = TABLES[asked.table]
    if table.is_layered:
        python = environments.interpreter("zoo", "timm==1.0.31", environments.TORCHVISION)
        if Path(sys.executable) != python:  # all of it runs there: workers start with the interpreter that we have
            os.execv(python, [str(python), *sys.argv])
    from polyexport.versions import versions

    formats = tuple(asked.formats.split(",")) if asked.formats else table.formats
    models = [name for name in table.models() if asked.models in name]
    run(table, models, formats, asked.again, sizes=asked.sizes, times=asked.times)
    cells = recorded(table.record)
    if asked.page:
        made = ", ".join(f"{name} {version}" for name, version in versions(table.packages).items())
        asked.page.parent.mkdir(parents=True, exist_ok=True)
        text = table.page(table.title, table.about.format(versions=made), cells, table.models(), table.formats)
        asked.page.write_text(text, encoding="utf-8")
        write(table.record, cells)
    wanted = [name for name in table.asked if name in formats]
    return 0 if enough(cells, models, wanted, table.share) else 1


if __name__ == "__main__":
    sys.exit(main())
