"""What every test shares: no network, no leftovers, one W&B folder a test, the zoo exported once, and one browser."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  # servers import what is imported here, and their jobs need not
import networkx  # noqa: F401
import onnxscript.function_libs.torch_lib.ops
import onnxscript.rewriter  # noqa: F401
import pytest
import torch
import torch._dynamo
import torch.export._trace
import torch.onnx

import every_format
import outgoing
import polyexport
import zoo
from every_format import Everything
from isolated import many
from polyexport import FORMATS, Report, errors
from polyexport.engine import plan
from polyexport.workers import process
from polyexport.workers.toolchain import cache_folder
from sharing import pytest_addoption as pytest_addoption, pytest_configure as pytest_configure


@pytest.fixture(autouse=True)
def wandb_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for kind in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps the settings of the first who asked, a server on loopback say


@pytest.fixture(autouse=True)
def our_own_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "TOLERANT", False)


@pytest.fixture(autouse=True)
def logs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def memory_is_empty() -> None:
    """The files of fsspec's `memory://`, which are the process's."""
    if "fsspec.implementations.memory" in sys.modules:
        store = sys.modules["fsspec.implementations.memory"].MemoryFileSystem
        store.store.clear()
        store.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def import_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a test puts there, with a `queue.py` in it, would be what other tests' processes import."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage() -> None:
    """Each conversion by coremltools collects garbage, which takes half a second with all that is imported here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def servers_are_shared() -> Iterator[None]:
    """Each toolchain imports its framework once a session, whatever test asks; a job is a process of its own still."""
    with process.shared_servers():
        yield


@pytest.fixture
def own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines have their own, which start with the test's environment and end with the engine, as outside of tests."""
    monkeypatch.setattr(process, "_shared", None)


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
def small(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One linear layer in the formats that are made in a moment; not to be changed."""
    module, folder = torch.nn.Linear(4, 3), tmp_path_factory.mktemp("small") / "out"
    return polyexport.export(module, torch.rand(4, 4), ["torchscript", "pt2", "onnx"], folder, bench=False)


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    folder = tmp_path_factory.mktemp("everything")
    (folder / "home").mkdir()
    formats = [each for each in FORMATS.values() if not each.uses_gpu and not each.lacks()]
    for chain in {chain for chains in plan.toolchains(formats).values() for chain in chains}:
        chain.interpreter()  # what is installed comes over the network
    words = [sys.executable, str(Path(every_format.__file__)), str(folder / "out")]
    packets = None if outgoing.lacks() else folder / "packets.txt"
    subprocess.run(
        [*(outgoing.command(packets) if packets else ()), *words, *(each.name for each in formats)],
        check=True,
        cwd=folder,
        env={**os.environ, "HOME": str(folder / "home"), "POLYEXPORT_CACHE": str(cache_folder())},
    )
    return Everything(Report.load(folder / "out"), packets, folder / "home")


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
    """A headless Chromium with WebGPU, which keeps a log of its console and of its requests."""
    from selenium import webdriver

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no Chromium with its chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-unsafe-webgpu",  # by SwiftShader, on the CPU
        "--use-webgpu-adapter=swiftshader",
        "--disable-quic",
        "--no-first-run",
        "--disable-component-update",
        "--disable-background-networking",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()
