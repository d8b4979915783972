"""What only a machine with an NVIDIA GPU can show: training there, and the artifacts that came out of it there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

import polyexport
import runs
import zoo
from lightning_export import ExportCallback
from polyexport.measure.parity import compare
from polyexport.spec import read_arrays

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU here"),
    # what torch says of itself, and of the GPU's precision
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.*"),
]
FORMATS = ("torchscript", "pt2", "onnx")


class OnItsDevice(runs.Noisy):
    """Makes a tensor where it lies itself, as many a forward does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + torch.zeros(runs.FEATURES, device=self.device))


def weights(folder: Path, *, export: bool, **settings: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights after three epochs, and the callback's reports."""
    seed_everything(0)
    callbacks: list[Any] = [ModelCheckpoint(folder / "checkpoints", monitor="val_loss")]
    if export:
        callbacks.append(ExportCallback(formats=FORMATS, into=folder / "exports", bench=False))
    module = OnItsDevice()
    trainer = runs.trainer(folder, callbacks, accelerator="gpu", max_epochs=3, **settings)
    trainer.fit(module, runs.loader(shuffle=True), runs.loader())
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return state, callbacks[-1].reports if export else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "32-true"},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "bf16-true"},
        {"strategy": "ddp"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_training_there_is_bit_identical_and_comes_out_verified(settings: dict[str, Any], tmp_path: Path) -> None:
    without, _ = weights(tmp_path / "without", export=False, **settings)
    with_it, reports = weights(tmp_path / "with", export=True, **settings)
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert reports
    for outcome in reports[-1].outcomes:
        assert outcome.state == "verified", (outcome.format, outcome.reason)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_fsdp_comes_out_verified(kind: Any, tmp_path: Path) -> None:
    strategy = FSDPStrategy(auto_wrap_policy={torch.nn.Linear}, state_dict_type=kind)
    _, reports = weights(tmp_path, export=True, strategy=strategy)
    assert reports
    assert {outcome.format: (outcome.state, outcome.reason) for outcome in reports[-1].outcomes} == dict.fromkeys(
        FORMATS, ("verified", "")
    )


@pytest.mark.slow
def test_exports_take_no_memory_of_the_gpu(tmp_path: Path) -> None:
    greatest = []
    for export in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weights(tmp_path / str(export), export=export)
        greatest.append(torch.cuda.max_memory_allocated())
    assert greatest[1] <= greatest[0] + 4 * runs.ROWS * runs.FEATURES * 4  # its copy of the batch, for a moment


def cuda_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    exact = {"use_tf32": "0"}  # it keeps ten bits of a float32's mantissa
    session = onnxruntime.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", exact)])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    return session


def has_cuda_provider() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.slow
@pytest.mark.skipif(not has_cuda_provider(), reason="it needs `pip install onnxruntime-gpu`")
@pytest.mark.parametrize("model", ["resnet", "vit", "bert", "lstm"])
@pytest.mark.parametrize("name", ["onnx", "onnx-fp16"])
def test_onnx_agrees_there_too(name: str, model: str, tmp_path: Path) -> None:
    module, inputs = zoo.build(model)
    report = polyexport.export(module, inputs, [name], tmp_path / "out", bench=False)
    assert report[name].state == "verified", report[name].reason
    session = cuda_session(report.folder / name / "model.onnx")
    assert report.model is not None
    batch = read_arrays(report.folder / "validation_batch.npz")
    outputs = [each.name for each in session.get_outputs()]
    answer = session.run(outputs, {each.name: batch[each.name] for each in session.get_inputs()})
    reference = {key: batch[key] for key in outputs}
    parity = compare(dict(zip(outputs, answer, strict=True)), reference, polyexport.FORMATS[name].limits)
    assert parity.passed, parity.reason


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet", "vit", "bert", "lstm"])
def test_a_compiled_package_agrees_there_at_every_batch_size(model: str, tmp_path: Path) -> None:
    module, inputs = zoo.build(model)
    report = polyexport.export(module, inputs, ["aoti-cuda"], tmp_path / "out", bench=False)
    outcome = report["aoti-cuda"]
    assert (outcome.state, outcome.reason) == ("verified", "")
    assert "batch" in outcome.inputs[0].shape
    assert outcome.remark.startswith("compiled for NVIDIA GPUs of compute capability ")
