"""What every test shares: no network, no leftovers, one W&B folder a test, and the zoo, exported once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

import polyexport
import zoo
from polyexport import Report
from test_lowering import many


@pytest.fixture(autouse=True)
def wandb_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for kind in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb"))


@pytest.fixture(autouse=True)
def logs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """`exported(model)`: the report of that model in `zoo.FORMATS`."""
    folder = tmp_path_factory.mktemp("zoo")

    @functools.cache
    def export(model: str) -> Report:
        module, inputs = zoo.build(model)
        return polyexport.export(module, inputs, zoo.FORMATS, folder / model, bench=False)

    return export


@pytest.fixture(scope="session")
def lowered(exported: Callable[[str], Report]) -> dict[str, dict[str, str]]:
    """Every export of the zoo, by its folder, in TensorFlow's formats and what became of them: one process for all."""
    roots = [str(exported(name).folder) for name in zoo.GROUND | zoo.FURTHER]
    return many("tensorflow", "convert", ("saved_model", "graphdef", "tfjs", "tflite"), roots)
