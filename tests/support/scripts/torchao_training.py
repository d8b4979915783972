"""Graphs that torchao quantizes in training, in an environment that has torchao; it ends with 1 where one is wrong."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization import pt2e
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

from lightning_export import ExportCallback
from polyexport import Report
from polyexport.capture import snapshot
from polyexport.capture.calls import save_call
from polyexport.capture.unwrap import settle
from polyexport.capture.weights import WEIGHTS
from polyexport.tracing.exported_program import export_program
from polyexport.tracing.fake_quantization import with_integers

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


OF_X86 = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
"""Gives the output of the last layer no scale."""

OF_XNNPACK = xnnpack.XNNPACKQuantizer().set_global(
    xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
)


def quantized(quantizer: Any = OF_X86) -> torch.fx.GraphModule:
    """A graph of `torch.export` that trains with fake quantization: with batch norms, with and without a bias."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6))
    net = nn.Sequential(*body, nn.Dropout(0.5), nn.Flatten(), nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, 5)).train()
    rows = ({0: torch.export.Dim("rows", min=1, max=64)},)
    graph = torch.export.export(net, (IMAGES,), dynamic_shapes=rows).module()
    return prepare_qat_pt2e(graph, quantizer)


def it_is_rebuilt_in_eval_mode_and_becomes_integers(folder: Path) -> None:
    """It refuses `eval()` and `pickle`, and scales weights for a batch norm that divides by the same factor again."""
    module = quantized()
    for _ in range(3):
        module(2 * IMAGES + 0.5)
    save_call((IMAGES,), {}, folder)
    assert snapshot.save_module(module, None, (IMAGES,), {}, folder) == ""
    torch.save(module.state_dict(), folder / WEIGHTS)
    loaded = snapshot.load(folder)
    pt2e.move_exported_model_to_eval(module.apply(pt2e.disable_observer))
    expected = module(IMAGES)
    torch.testing.assert_close(loaded(IMAGES), expected)
    settle(loaded)
    graph = export_program(loaded, (IMAGES,), [[0]]).module()
    assert with_integers(graph)
    torch.testing.assert_close(graph(IMAGES), expected, rtol=0, atol=1e-6)
    assert graph(IMAGES[:1]).shape == (1, 5)
    left = {str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"}
    assert {name for name in left if "quantize" not in name} == {"conv2d", "relu", "flatten", "linear"}, left


class Aware(LightningModule):
    """Trains such a graph; Lightning sets the modes of validation by these hooks."""

    def __init__(self, quantizer: Any) -> None:
        super().__init__()
        self.net = quantized(quantizer)
        self.in_training: list[bool] = []

    def on_validation_model_eval(self) -> None:
        pt2e.move_exported_model_to_eval(self.net)

    def on_validation_model_train(self) -> None:
        pt2e.move_exported_model_to_train(self.net)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        norms = [node for node in self.net.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
        self.in_training += [node.args[5] for node in norms]
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def trained(quantizer: Any, formats: list[str], folder: Path) -> tuple[Report, dict[str, torch.Tensor]]:
    """What is exported of the best checkpoint of a short training, and the scales that it has."""
    module = Aware(quantizer)
    data = DataLoader(TensorDataset(torch.cat([IMAGES, IMAGES + 1]), torch.arange(8) % 5), batch_size=4)
    best = ModelCheckpoint(folder / "checkpoints", monitor="val_loss")
    callbacks = [best, ExportCallback(formats, into=folder / "out", bench=False, when="fit_end")]
    Trainer(max_epochs=2, logger=False, callbacks=callbacks, enable_progress_bar=False).fit(module, data, data)
    assert module.in_training
    assert all(module.in_training)
    state = torch.load(best.best_model_path)["state_dict"]
    return Report.load(folder / "out" / "best"), {name: state[name] for name in state if name.endswith(".scale")}


def its_best_is_exported_with_the_trained_scales(folder: Path) -> None:
    report, scales = trained(OF_XNNPACK, ["onnx-int8", "executorch-int8", "tflite-int8", "tflite-int8-nhwc"], folder)
    assert [outcome.state for outcome in report.outcomes] == ["verified", "verified", "degraded", "verified"], report
    for outcome in report.outcomes:
        assert (outcome.route, outcome.calibration) == ("trained scales", None), outcome
        assert_has(report, outcome.format, scales)
        assert outcome.parity.max_abs_error <= 2.1 * scales["net.activation_post_process_9.scale"], outcome


def a_scale_that_training_left_out_is_calibrated(folder: Path) -> None:
    """The last layer's, where integers need one."""
    report, scales = trained(OF_X86, ["onnx-int8", "executorch-int8", "tflite-int8-nhwc"], folder)
    assert [outcome.state for outcome in report.outcomes] == ["verified"] * 3, report
    routes = ["trained scales", *["trained and calibrated scales"] * 2]
    assert [outcome.route for outcome in report.outcomes] == routes, report
    assert [outcome.calibration is None for outcome in report.outcomes] == [True, False, False], report
    for outcome in report.outcomes:
        assert_has(report, outcome.format, scales)


def assert_has(report: Report, name: str, scales: dict[str, torch.Tensor]) -> None:
    """Whether these numbers are in the artifact, as floats in memory are."""
    artifact = (report.folder / report[name].artifact.path).read_bytes()
    missing = [called for called, scale in scales.items() if scale.numpy().tobytes() not in artifact]
    assert not missing, (name, missing)


def main() -> None:
    checks = (
        it_is_rebuilt_in_eval_mode_and_becomes_integers,
        its_best_is_exported_with_the_trained_scales,
        a_scale_that_training_left_out_is_calibrated,
    )
    for check in checks:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
