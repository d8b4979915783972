"""What every test shares: no network, no leftovers, one W&B folder a test, the zoo exported once, and one browser."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import polyexport
import zoo
from isolated import many
from polyexport import Report


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


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A ResNet in TensorFlow.js, whose input and output are `pixel_values` and `logits`."""
    module, inputs = zoo.build("resnet")
    return polyexport.export(module, inputs, ["tfjs"], tmp_path_factory.mktemp("web") / "resnet", bench=False)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium, which keeps a log of its console and of its requests."""
    from selenium import webdriver

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no Chromium with its chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
        "--disable-background-networking", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip  # a line for each would bury them
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()
